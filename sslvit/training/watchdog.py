"""A worker or another process is gone, or hangs: who, at what, and what to do, instead of what torch says of it."""

import os
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from sslvit.data import shared
from sslvit.data.loader import MicroBatches
from sslvit.data.readers.encoded import EncodedSource
from sslvit.data.source import Images
from sslvit.data.subset import Subset
from sslvit.data.waiting import WorkerDied, WorkerTimedOut
from sslvit.errors import INTERNAL, Stop
from sslvit.processes import collectives
from sslvit.storage import durable

OF_PROCESSES = re.compile(r"gloo|nccl|processgroup|connection (closed|reset|refused)|broken pipe|timed? ?out", re.I)
FULL = re.compile(r"unable to (allocate|resize|open|mmap).*shared memory.*", re.I)
GO_ON = "The same command with --resume goes on from the newest checkpoint"


class Lost(Stop):
    """Part of a run is gone or hangs."""

    code = INTERNAL


@contextmanager
def watched(row: MicroBatches, out: Path, save: Callable[[], bool]) -> Iterator[None]:
    """save: keeps the steps that are done, which a lost worker does not undo: it is noticed between two steps."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        full = FULL.search(said)
        what = ""
        if full:
            what = of_shared_memory(full[0])
        elif isinstance(error, WorkerDied | WorkerTimedOut):
            what = of_workers(error, row)
        if what:
            kept = collectives.processes() == 1 and save()
            raise Lost(what + (". The last step is saved" if kept else "")) from error
        if collectives.processes() == 1 or not OF_PROCESSES.search(said):
            raise
        stack = out / "stacks" / f"process-{collectives.rank()}.txt"
        durable.replace_text(stack, "".join(traceback.format_exception(error)))
        raise Lost(of_processes(said, stack)) from error


def of_workers(error: WorkerDied | WorkerTimedOut, row: MicroBatches) -> str:
    at = {worker: where(row.source, id) for worker, id in enumerate(row.reading) if id >= 0}
    if isinstance(error, WorkerTimedOut):
        waited = f"within {error.seconds:g} seconds"
        if error.stopped:
            who = " and ".join(
                f"worker {worker} (pid {pid}){f' at {at[worker]}' if worker in at else ''}"
                for worker, pid in error.stopped.items()
            )
            were, have = ("was", "has") if len(error.stopped) == 1 else ("were", "have")
            return (
                f"no images came {waited}: {who} {were} stopped (SIGSTOP or a debugger) and {have} been killed. {GO_ON}"
            )
        worker = (row.awaited - row.begun) % len(row.reading)
        place = f" at {at[worker]}" if worker in at else ""
        return (
            f"worker {worker} (pid {error.pids[worker]}) gave no images {waited} and seems to hang{place}. Look "
            f"whether that file can be read, or give --timeout more seconds. {GO_ON}"
        )
    who = f" (pid {error.pid})" if error.pid else ""
    reading = f" Workers were at {', '.join(at.values())}." if at else ""
    return (
        f"a worker that reads images{who} is gone: it crashed or was killed, as happens "
        f"when memory runs out.{reading} Fewer --workers need less memory and shared memory (/dev/shm). {GO_ON}. torch "
        f"says: {error.reason.splitlines()[0]}"
    )


def of_shared_memory(said: str) -> str:
    free = shared.room()
    now = "" if free is None else f" ({shared.SHARED}, {free / 1e6:,.1f} MB free now)"
    return (
        f"a worker that reads images found no room in shared memory{now}, which had enough when the run began: "
        f"something else uses it. {shared.MORE}; fewer --workers need less. {GO_ON}. torch says: {said}"
    )


def where(source: Images, id: int) -> str:
    while isinstance(source, Subset):
        source = source.inner
    return source.store.where(id) if isinstance(source, EncodedSource) else f"image {id}"


def of_processes(said: str, stack: Path) -> str:
    """Which of the others on this machine is gone or stopped. One that is stopped is ended: nobody else will."""
    lines = []
    for rank, pid in collectives.peers().items():
        try:
            status = psutil.Process(pid).status()
        except psutil.NoSuchProcess:
            status = psutil.STATUS_DEAD
        if status in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE):
            lines.append(f"process {rank} (pid {pid}) is gone")
        elif status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            os.kill(pid, signal.SIGKILL)
            lines.append(f"process {rank} (pid {pid}) had been stopped, and was ended")
    who = "; ".join(lines) or "another process does not answer, and all on this machine are there"
    return f"{who}. {GO_ON}. Where this one waited is in {stack}. torch says: {said.splitlines()[0][:200]}"
