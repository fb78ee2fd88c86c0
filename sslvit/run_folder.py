"""The folder of a run: who may enter, one process at a time, and the log of its metrics."""

import errno
import fcntl
import json
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sslvit import checkpoint, durable
from sslvit.errors import CannotWrite

log = logging.getLogger(__name__)

LOCK, CHECKPOINTS = "run.lock", "checkpoints"
HELD: set[int] = set()  # descriptors of the locks that this process holds


class FolderRefused(CannotWrite):
    """The folder cannot be written, or holds something that must not be mixed with or replaced by a run."""


class RunLocked(CannotWrite):
    """Another process is writing to this folder."""


@contextmanager
def prepare_folder(out: str | Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """Opens a run folder for writing, and holds its lock until the end of the `with` block.

    `resume` on a missing or empty folder starts a run, so that one command line serves for start and restart.
    """
    folder = Path(out)
    if resume and overwrite:
        raise ValueError(f"{folder}: resume continues the run that overwrite deletes; choose one")
    with ExitStack() as entered:
        try:
            _enter(folder, entered, resume, overwrite)
        except CannotWrite:
            raise
        except OSError as error:
            reason = "it is a file" if folder.is_file() else error.strerror or error
            raise FolderRefused(
                f"{folder} cannot be written as a run folder: {reason}; choose another --out"
            ) from error
        yield folder


def _enter(folder: Path, entered: ExitStack, resume: bool, overwrite: bool) -> None:
    durable.make_folder(folder)
    content = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    if content and not _holds_a_run(folder):
        more = f" and {len(content) - 3} more" if len(content) > 3 else ""
        raise FolderRefused(
            f"{folder} is not empty ({', '.join(content[:3])}{more}) and holds no run: choose another --out"
        )
    entered.enter_context(lock(folder))  # before anything is judged or deleted: another process may be at work in here
    durable.sweep(folder)
    _try_writing(folder)
    content = [path for path in folder.iterdir() if path.name != LOCK]
    if content and overwrite:
        trash = durable.temporary(folder, "overwritten")
        for path in content:
            os.rename(path, trash / path.name)
        durable.delete(trash)
    elif content and not resume:
        step = checkpoint.newest_step(folder / CHECKPOINTS)
        newest = "none" if step is None else f"step {step}"
        raise FolderRefused(
            f"{folder} already holds a run (newest checkpoint: {newest}): continue it with --resume, "
            "replace it with --overwrite, or name another folder with --out"
        )


def _holds_a_run(folder: Path) -> bool:
    """Only what no other program leaves: a bare config.json could be anybody's model."""
    return "sslvit" in _holder(folder) or checkpoint.newest_step(folder / CHECKPOINTS) is not None


def _try_writing(folder: Path) -> None:
    """All that a checkpoint needs of a file system, so that it fails now and not after the first hour."""
    probe = durable.temporary(folder, "probe")
    try:
        durable.write(probe / "probe", [b"probe"])
        durable.sync_folder(probe)
        renamed = probe.with_name(f".del-{probe.name}")
        os.rename(probe, renamed)
        probe = renamed
        durable.sync_folder(folder)
    finally:
        durable.delete(probe)


@contextmanager
def lock(folder: Path) -> Iterator[str]:
    """Keeps other processes out, and yields the id of this run. The kernel frees the lock however the process ends."""
    fd = os.open(Path(folder) / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    HELD.add(fd)
    try:
        _take(fd, Path(folder))
        me = {
            "sslvit": "This folder belongs to a run. Whoever holds a lock on this file is writing here.",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "start": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": uuid.uuid4().hex[:8],
        }
        # One write of constant length over the last holder's: the file is never empty, at no moment, once it was used.
        os.pwrite(fd, f"{json.dumps(me):<511}\n".encode(), 0)
        os.fsync(fd)
        yield me["run"]
    finally:
        if fd in HELD:
            HELD.remove(fd)
            os.close(fd)


def _take(fd: int, folder: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        deadline = time.monotonic() + 1.0
        while not (holder := _holder(folder)) and time.monotonic() < deadline:  # it may be about to write its name
            time.sleep(0.05)
        raise RunLocked(
            f"{folder} is being written by process {holder.get('pid', 'unknown')} on {holder.get('host', 'unknown')} "
            f"(run {holder.get('run')}, since {holder.get('start')}): stop it, wait for it, or choose another --out"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        log.warning("%s is on a file system without locks: nothing will stop a second run in it", folder)


def _holder(folder: Path) -> dict[str, Any]:
    try:
        holder = json.loads((folder / LOCK).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _let_go_in_child() -> None:
    """A forked loader worker would otherwise hold the lock too, and keep it for seconds after its parent was killed."""
    while HELD:
        os.close(HELD.pop())


os.register_at_fork(after_in_child=_let_go_in_child)


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, steps strictly increasing, across however many restarts.

    Opened with the step of the checkpoint that the run continues from: lines of later steps, which will come again,
    and a torn last line are dropped. Step 0 starts afresh. `sync` before a checkpoint makes the log as durable as it.
    """

    def __init__(self, path: str | Path, step: int):
        self.path, self.last, self.pending = Path(path), -1, b""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        kept = []
        for line in lines:
            if step > 0 and self.last < (number := _step_of(line)) <= step:
                kept.append(line)
                self.last = number
        if len(kept) < len(lines):
            log.warning("%s: %d lines after step %d or incomplete were dropped", path, len(lines) - len(kept), step)
            rewritten = durable.temporary(self.path.parent, self.path.name)
            durable.write(rewritten / self.path.name, kept)
            os.replace(rewritten / self.path.name, self.path)
            os.rmdir(rewritten)
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.size = os.fstat(self.fd).st_size

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Numbers that are not finite become null, which every JSON reader knows. A full disk delays lines, no more."""
        if step <= self.last:
            raise ValueError(f"{self.path}: step {step} follows step {self.last}")
        self.last = step
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.pending += json.dumps({"step": step} | finite).encode() + b"\n"
        self._put_out()

    def sync(self) -> None:
        self._put_out(durably=True)

    def _put_out(self, durably: bool = False) -> None:
        try:
            done = 0
            while done < len(self.pending):
                done += os.pwrite(self.fd, self.pending[done:], self.size + done)
            if durably:
                os.fsync(self.fd)
        except OSError as error:
            os.ftruncate(self.fd, self.size)
            log.warning("%s: %s; the lines since the last good write wait for the next", self.path, error.strerror)
        else:
            self.size, self.pending = self.size + done, b""

    def close(self) -> None:
        os.close(self.fd)


def _step_of(line: bytes) -> int:
    """-1 for a line that is torn or none of ours."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else -1
    except (ValueError, LookupError, TypeError):
        return -1
    return step if type(step) is int else -1
