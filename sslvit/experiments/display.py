"""The progress of jobs in the terminal."""

import shutil
import sys
import time

from sslvit.experiments.jobs import Job
from sslvit.runs.log import duration


class Display:
    """A line whenever a job ends: how many are done, and about how long the rest will take. Before the first and, on a
    terminal, all the time, the jobs that run."""

    def __init__(self, jobs: list[Job]):
        self.jobs, self.began = jobs, time.perf_counter()
        self.work_before = sum(job.work for job in jobs if job.done)
        print(f"{len(jobs)} jobs, {sum(job.done for job in jobs)} of them done", flush=True)
        self.next_look, self.looks = 0.0, 0

    def running(self, seconds: dict[str, float]) -> None:
        """seconds: how long each job has been running, by name."""
        terminal = sys.stdout.isatty()
        if not seconds or time.perf_counter() < self.next_look or (self.looks and not terminal):
            return
        now = ", ".join(f"{name} for {duration(value)}" if self.looks else name for name, value in seconds.items())
        self.next_look, self.looks = time.perf_counter() + 1, self.looks + 1
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{f'now {now}'[:width]}" if terminal else f"now {now}", end="" if terminal else "\n", flush=True)

    def ended(self, job: Job, seconds: float, *, failed: bool) -> None:
        done = [one for one in self.jobs if one.done]
        if job not in done and not failed:
            return  # another worker has it
        work, all_work = sum(one.work for one in done), sum(one.work for one in self.jobs)
        here = work - self.work_before
        left = (all_work - work) * (time.perf_counter() - self.began) / here if here else 0
        rest = "failed" if failed else f"about {duration(left)} left" if len(done) < len(self.jobs) else "all done"
        self.clear()
        print(f"[{len(done)}/{len(self.jobs)}] {job.name} in {duration(seconds)}; {rest}", flush=True)

    def clear(self) -> None:
        if sys.stdout.isatty():
            print("\r\x1b[K", end="", flush=True)
