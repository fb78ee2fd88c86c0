"""Waiting for a loader's workers, so that nothing that one of them does, or fails to do, holds up the training process.

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

FAREWELL = 5.0  # seconds for the end of workers that have nothing left to do
NEWS = 0.5  # seconds in which the end of a process becomes known


class WorkerTimedOut(RuntimeError):
    """For as many seconds as were allowed."""

    def __init__(self, seconds: float, workers: list[BaseProcess]):
        super().__init__(f"DataLoader timed out after {seconds:g} seconds")
        self.seconds, self.pids = seconds, [worker.pid for worker in workers]
        self.stopped = {number: pid for number, pid in enumerate(self.pids) if pid and is_stopped(pid)}


def fetch(loaded: Iterator, count: int, workers: list[BaseProcess], timeout: float) -> Iterator:
    """What the workers make, count times. Their errors are raised here, and NothingCame after timeout seconds."""
    asked: queue.SimpleQueue = queue.SimpleQueue()
    came: queue.SimpleQueue = queue.SimpleQueue()
    Finalize(loaded, kill, args=(workers,), exitpriority=1)  # before multiprocessing waits for them at exit
    reader = threading.Thread(target=read, args=(loaded, asked, came), daemon=True)
    # A thread that is still taking its loader down when Python ends could crash it, and change the exit code.
    Finalize(None, leave, args=(asked, reader), exitpriority=0)
    del loaded  # the thread's alone, and with it the end of the workers
    reader.start()
    try:
        for _ in range(count):
            asked.put(True)
            try:
                found, error = came.get(timeout=timeout)
            except queue.Empty:
                raise WorkerTimedOut(timeout, workers) from None
            if error is not None:
                raise death(error, workers) or error
            yield found
        leave(asked, reader)
    except BaseException:
        kill(workers)
        raise
    finally:
        asked.put(False)


def death(error: Exception, workers: list[BaseProcess]) -> RuntimeError | None:
    """What torch says of a worker that was killed, if that is why a message of its broke off: torch may not have heard
    of it yet."""
    of_a_message = isinstance(error, OSError | EOFError | RuntimeError) or type(error).__name__ == "UnpicklingError"
    if not of_a_message or str(error).startswith(("Caught ", "DataLoader")):
        return None
    ended = wait([worker.sentinel for worker in workers], timeout=NEWS)
    gone = next((worker.pid for worker in workers if worker.sentinel in ended), None)
    if gone is None:
        return None
    return RuntimeError(f"DataLoader worker (pid {gone}) ended: {str(error) or type(error).__name__}")


def leave(asked: queue.SimpleQueue, reader: threading.Thread) -> None:
    asked.put(False)
    reader.join(FAREWELL)


def read(loaded: Iterator, asked: queue.SimpleQueue, came: queue.SimpleQueue) -> None:
    while asked.get():
        try:
            came.put((next_of(loaded), None))
        except Exception as error:
            came.put((None, error))


def next_of(loaded: Iterator) -> Any:
    """torch looks for dead workers as often as it times out, which says nothing about those that are slow."""
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
