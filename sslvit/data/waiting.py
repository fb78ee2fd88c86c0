"""Waiting for a loader's workers, so that nothing that one of them does, or fails to do, blocks the training process.

A worker that is stopped (SIGSTOP, a debugger, a cgroup's freezer) while it sends a batch leaves its reader in a read
that no timeout of torch's ends: bytes have come, and the rest never does. So a thread reads, and the training process
waits for the thread, with a limit, and open to signals. Workers that are left are killed: SIGTERM ends no stopped one.
"""

import queue
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import psutil

GRACE = 5.0  # seconds for the end of workers that have nothing left to do
SENTINEL_WAIT = 0.5  # seconds until the end of a process is known


class WorkerTimedOut(RuntimeError):
    """No batch came for as many seconds as were allowed."""

    def __init__(self, seconds: float, workers: list[BaseProcess]):
        super().__init__(f"DataLoader timed out after {seconds:g} seconds")
        self.seconds, self.pids = seconds, [worker.pid for worker in workers]
        self.stopped = {number: pid for number, pid in enumerate(self.pids) if pid and is_stopped(pid)}


class WorkerDied(RuntimeError):
    """A worker crashed or was killed. reason: what torch, or the broken connection, says of it."""

    def __init__(self, pid: int | None, reason: str):
        super().__init__(f"DataLoader worker (pid {pid}) ended: {reason}")
        self.pid, self.reason = pid, reason


def fetch(loaded: Iterator, count: int, workers: list[BaseProcess], timeout: float) -> Iterator:
    """The next `count` batches of the workers. Raises their errors, WorkerDied, and WorkerTimedOut after timeout
    seconds."""
    requests: queue.SimpleQueue = queue.SimpleQueue()
    answers: queue.SimpleQueue = queue.SimpleQueue()
    Finalize(loaded, kill, args=(workers,), exitpriority=1)  # before multiprocessing waits for them at exit
    reader = threading.Thread(target=read, args=(loaded, requests, answers), daemon=True)
    # A thread that is still taking its loader down when Python ends could crash it, and change the exit code.
    Finalize(None, finish, args=(requests, reader), exitpriority=0)
    del loaded  # the thread's alone, and with it the end of the workers
    reader.start()
    try:
        for _ in range(count):
            requests.put(True)
            try:
                batch, error = answers.get(timeout=timeout)
            except queue.Empty:
                raise WorkerTimedOut(timeout, workers) from None
            if error is not None:
                raise death(error, workers) or error
            yield batch
    except BaseException:
        kill(workers)
        raise
    finally:
        finish(requests, reader)


def death(error: Exception, workers: list[BaseProcess]) -> WorkerDied | None:
    """The death of a worker, if that is why a message of its broke off: torch may not have heard of it yet, and has no
    class for it."""
    text = str(error)
    broken = isinstance(error, OSError | EOFError | RuntimeError) or type(error).__name__ == "UnpicklingError"
    if not broken or text.startswith("Caught "):  # in the worker, which lives
        return None
    ended = wait([worker.sentinel for worker in workers], timeout=SENTINEL_WAIT)
    pid = next((worker.pid for worker in workers if worker.sentinel in ended), None)
    if pid is None and not text.startswith("DataLoader worker"):
        return None
    return WorkerDied(pid, text or type(error).__name__)


def finish(requests: queue.SimpleQueue, reader: threading.Thread) -> None:
    requests.put(False)
    reader.join(GRACE)


def read(loaded: Iterator, requests: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    while requests.get():
        try:
            answers.put((next_of(loaded), None))
        except Exception as error:
            answers.put((None, error))


def next_of(loaded: Iterator) -> Any:
    """torch looks for dead workers whenever it times out, which does not mean that one is too slow."""
    while True:
        try:
            return next(loaded)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise


def is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.NoSuchProcess:
        return False


def kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
