"""Running jobs: several at a time, each in a process of its own, shared with others who work in the same folder."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from sslvit.cli import run_cli
from sslvit.errors import BAD_CONFIGURATION, INTERNAL, Error, Preempted
from sslvit.experiments.display import Display
from sslvit.experiments.jobs import Job, locked, options_of, recipe_of
from sslvit.processes import signals
from sslvit.runs.folder import CHECKPOINTS
from sslvit.storage import durable

DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
LAST_LINES = 12
TAKEN = 113  # the exit code of a job that another worker runs


Running = dict[Job, tuple[BaseProcess, int, float]]  # with the process's slot, and when it began


class JobFailed(Error):
    """A job ended with an error, which is in its log."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


def work_on(jobs: list[Job], out: Path, *, at_a_time: int, after_each: Callable[[], None] = lambda: None) -> None:
    """Runs the jobs that are not done, several at a time, and returns when all are done, here or elsewhere. Passes a
    signal on to the jobs that run, and ends when they have saved. after_each: called when a job has ended."""
    check_needs(jobs)
    context = multiprocessing.get_context("forkserver")  # torch is imported once, and each job starts in no time
    context.set_forkserver_preload(["torch", "torch._dynamo", "sslvit.train", "sslvit.finetuning"])
    start_deaf_to_signals(resource_tracker.ensure_running, forkserver.ensure_running)
    for job in jobs:
        delete_checkpoints(job, out)
    gpus = torch.cuda.device_count()
    display, failed = Display(jobs), {}
    running: Running = {}
    slots, terminated = list(range(at_a_time)), False
    with signals.listening(), signals.stepping():
        while True:
            for job, process, slot, began in take_ended(running):
                slots.append(slot)
                if not job.done and process.exitcode != TAKEN and not signals.stop_requested():
                    failed[job] = process.exitcode
                display.ended(job, time.perf_counter() - began, failed=job in failed)
                after_each()
            waiting = [job for job in jobs if not (job.done or job in running or job in failed)]
            for job in ready(waiting, jobs) if not (failed or signals.stop_requested()) else []:
                if slots and is_free(job, out):
                    slot = slots.pop()
                    process = context.Process(target=run_job, args=(job, out, slot % gpus if gpus else None))
                    process.start()
                    running[job] = (process, slot, time.perf_counter())
                    display.started(job)
            if signals.stop_requested() and not terminated:
                terminated = True
                for process, _, _ in running.values():
                    process.terminate()
            if not running and (failed or terminated or not waiting):
                break
            time.sleep(0.2)
        asked = signals.stop_requested()
    for job, code in failed.items():
        raise job_failed(job, code, out)
    if waiting or asked:
        done = sum(job.done for job in jobs)
        raise Preempted(f"asked to stop, with {done} of {len(jobs)} jobs done; the same command continues")


def check_needs(jobs: list[Job]) -> None:
    names = {job.name for job in jobs}
    if len(names) < len(jobs) or any(set(job.needs) - names for job in jobs):
        raise ValueError(f"jobs are named twice, or need others that are not there: {sorted(names)}")


def take_ended(running: Running) -> list[tuple[Job, BaseProcess, int, float]]:
    ended = [(job, *about) for job, about in running.items() if not about[0].is_alive()]
    for job, *_ in ended:
        del running[job]
    return ended


def ready(waiting: list[Job], jobs: list[Job]) -> list[Job]:
    """Those whose needs are done, the longest first."""
    done = {job.name for job in jobs if job.done}
    return sorted((job for job in waiting if done.issuperset(job.needs)), key=lambda job: -job.work)


def is_free(job: Job, out: Path) -> bool:
    with locked(out / "locks" / job.name) as free:
        return free


def job_failed(job: Job, code: int | None, out: Path) -> JobFailed:
    return JobFailed(
        f"{job.name} ended with exit code {code}; finished jobs are kept, and when the cause is gone the same command "
        f"continues. {end_of(out / 'logs' / f'{job.name}.log')}",
        code if code and 0 < code <= BAD_CONFIGURATION else INTERNAL,
    )


def start_deaf_to_signals(*starts: Callable[[], None]) -> None:
    """Starts what starts the jobs, so that it outlives a signal to all processes of the comparison: somebody must wait
    for the jobs."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for start in starts:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)  # the tracker unblocks them when it has started
        start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_of(log: Path) -> str:
    """The end of what the last attempt printed."""
    if not log.exists():
        return f"There is no log {log}"
    last_attempt = f"\n{log.read_text(errors='replace')}".rpartition("\n$ ")[2]
    return f"{log} ends:\n" + "\n".join(last_attempt.splitlines()[1:][-LAST_LINES:])


def run_job(job: Job, out: Path, device: int | None) -> None:
    """In a process of its own: the recipe as from the command line, its output in a log."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    with locked(out / "locks" / job.name) as ours:
        if not ours:  # another worker was quicker
            sys.exit(TAKEN)
        if job.done:
            return
        log = out / "logs" / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            for name in DISTRIBUTED:  # a job is one process, whatever started the whole
                os.environ.pop(name, None)
            if device is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
            print(f"$ {job.command()}", flush=True)
            recipe = recipe_of(job.recipe)
            sys.argv = [str(recipe.__file__), *job.words]
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            run_cli(recipe.main, options_of(recipe))
    delete_checkpoints(job, out)


def delete_checkpoints(job: Job, out: Path) -> None:
    """Of a job that is done: they are most of what it takes on the disk. Its models, logs and numbers stay."""
    if job.run is None or not job.done:
        return
    with locked(out / "locks" / job.name) as ours:
        for folder in job.run.glob(f"**/{CHECKPOINTS}") if ours else ():
            durable.discard(folder)


def end_with_the_parent() -> None:
    """Saves and ends a job too whose comparison was killed, so that it does not train on beside the next one."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
