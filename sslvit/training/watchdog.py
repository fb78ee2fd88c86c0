"""Lost or hanging workers and processes: an error that names them and the way out, in place of torch's."""

import os
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from sslvit.data import shared
from sslvit.data.loader import MicroBatches
from sslvit.data.readers.encoded import EncodedSource
from sslvit.data.source import Images
from sslvit.data.subset import Subset
from sslvit.data.waiting import WorkerDied, WorkerTimedOut
from sslvit.errors import INTERNAL, Error
from sslvit.processes import collectives
from sslvit.storage import durable

OF_PROCESSES = re.compile(r"gloo|nccl|processgroup|connection (closed|reset|refused)|broken pipe|timed? ?out", re.I)
FULL = re.compile(r"unable to (allocate|resize|open|mmap).*shared memory.*", re.I)
CONTINUE = "The same command with --resume continues from the newest checkpoint"


class Lost(Error):
    """A worker or a process of the run is gone or hangs."""

    code = INTERNAL


@contextmanager
def watched(sampler: MicroBatches, out: Path, save: Callable[[], bool]) -> Iterator[None]:
    """save: saves the steps that are done, which a lost worker does not undo: it is noticed between two steps."""
    try:
        yield
    except RuntimeError as error:
        message, sentence = str(error), ""
        if full := FULL.search(message):
            sentence = of_shared_memory(full[0])
        elif isinstance(error, WorkerDied | WorkerTimedOut):
            sentence = of_workers(error, sampler)
        if sentence:
            saved = False
            if collectives.processes() == 1:
                with suppress(OSError):  # what was lost is the message that matters
                    saved = save()
            raise Lost(sentence + (". The last step is saved" if saved else "")) from error
        if collectives.processes() == 1 or not OF_PROCESSES.search(message):
            raise
        stack = out / "stacks" / f"process-{collectives.rank()}.txt"
        durable.replace_text(stack, "".join(traceback.format_exception(error)))
        raise Lost(of_processes(message, stack)) from error


def of_workers(error: WorkerDied | WorkerTimedOut, sampler: MicroBatches) -> str:
    reading = {worker: f" at {where(sampler.source, id)}" for worker, id in enumerate(sampler.reading) if id >= 0}
    if isinstance(error, WorkerTimedOut) and error.stopped:
        stopped = " and ".join(f"worker {n} (pid {pid}){reading.get(n, '')}" for n, pid in error.stopped.items())
        return (
            f"no images came within {error.seconds:g} seconds: {stopped}, stopped by SIGSTOP or a debugger, had to be "
            f"killed. {CONTINUE}"
        )
    if isinstance(error, WorkerTimedOut):
        worker = (sampler.awaited - sampler.begun) % len(sampler.reading)
        return (
            f"worker {worker} (pid {error.pids[worker]}) gave no images within {error.seconds:g} seconds and seems to "
            f"hang{reading.get(worker, '')}. Check that this file can be read, or raise --timeout. {CONTINUE}"
        )
    pid = f" (pid {error.pid})" if error.pid else ""
    workers = f" Workers were{','.join(reading.values())}." if reading else ""
    return (
        f"a worker that reads images{pid} is gone: it crashed or was killed, as happens when memory runs out."
        f"{workers} Fewer --workers need less memory and shared memory (/dev/shm). {CONTINUE}. torch says: "
        f"{error.reason.splitlines()[0]}"
    )


def of_shared_memory(message: str) -> str:
    free = shared.room()
    now = "" if free is None else f" ({shared.SHARED}, {free / 1e6:,.1f} MB free now)"
    return (
        f"a worker that reads images found no room in shared memory{now}, which had enough when the run began: another "
        f"program uses it. {shared.MORE}; fewer --workers need less. {CONTINUE}. torch says: {message}"
    )


def where(source: Images, id: int) -> str:
    while isinstance(source, Subset):
        source = source.inner
    return source.store.where(id) if isinstance(source, EncodedSource) else f"image {id}"


def of_processes(message: str, stack: Path) -> str:
    """Names the processes on this machine that are gone or stopped. Those that are stopped are killed."""
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
            lines.append(f"process {rank} (pid {pid}) had been stopped, and was killed")
    lost = "; ".join(lines) or "another process does not answer, though all on this machine are alive"
    return f"{lost}. {CONTINUE}. This process's stack is in {stack}. torch says: {message.splitlines()[0][:200]}"
