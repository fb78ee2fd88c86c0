"""The progress of jobs in the terminal."""

import time

from sslvit.experiments.jobs import Job
from sslvit.runs.log import duration


class Display:
    """A line whenever a job starts or ends, with how many are done and about how long the rest will take."""

    def __init__(self, jobs: list[Job]):
        self.jobs, self.began = jobs, time.perf_counter()
        self.work_before = sum(job.work for job in jobs if job.done)
        print(f"{len(jobs)} jobs, {sum(job.done for job in jobs)} of them done", flush=True)

    def started(self, job: Job) -> None:
        print(f"{job.name} started", flush=True)

    def ended(self, job: Job, seconds: float, *, failed: bool) -> None:
        done = [one for one in self.jobs if one.done]
        if job not in done and not failed:
            return  # another worker has it
        work, all_work = sum(one.work for one in done), sum(one.work for one in self.jobs)
        here = work - self.work_before
        left = (all_work - work) * (time.perf_counter() - self.began) / here if here else 0
        rest = "failed" if failed else f"about {duration(left)} left" if len(done) < len(self.jobs) else "all done"
        print(f"[{len(done)}/{len(self.jobs)}] {job.name} in {duration(seconds)}; {rest}", flush=True)
