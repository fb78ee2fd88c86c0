"""The folder of a run: access to it, by one process at a time."""

import errno
import json
import logging
import os
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sslvit.errors import CannotWrite
from sslvit.processes.system import fcntl
from sslvit.runs import files
from sslvit.runs.files import CHECKPOINTS, LOCK
from sslvit.storage import checkpoint, durable

log = logging.getLogger(__name__)

LONGEST_LOCK = 1 << 16
NAMED = 5  # at most, of the files that a message is about
HELD: dict[int, str] = {}  # the ids of the runs that this process has locked, by the descriptors of their locks


class FolderRefused(CannotWrite):
    """The folder cannot be written, or has content that must not be mixed with or replaced by a run."""


class RunLocked(CannotWrite):
    """Another process is writing to this folder."""


@contextmanager
def prepare_folder(out: str | Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """Opens a run folder for writing, and holds its lock until the end of the `with` block.

    `resume` on a missing or empty folder starts a run, so that one command line serves for start and restart.
    """
    folder = Path(out)
    if resume and overwrite:
        raise ValueError(f"{folder}: --resume continues the run that --overwrite deletes; choose one")
    with ExitStack() as locked:
        try:
            _enter(folder, locked, resume, overwrite)
        except CannotWrite:
            raise
        except OSError as error:
            reason = "it is a file" if folder.is_file() else error.strerror or error
            raise FolderRefused(f"{folder} cannot be written: {reason}; choose another --out") from error
        yield folder


def _enter(folder: Path, locked: ExitStack, resume: bool, overwrite: bool) -> None:
    durable.make_folder(folder)
    names = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    if names and not holds_a_run(folder):
        raise FolderRefused(f"{folder} is not empty ({_some(names)}) and holds no run: choose another --out")
    locked.enter_context(lock(folder))  # before anything is judged or deleted: another process may be at work in here
    for place in (folder, *(folder / name for name in files.WRITTEN_INTO)):
        if place.is_dir() and (place == folder or not place.is_symlink()):
            durable.sweep(place)
    _try_writing(folder)
    content = [path for path in folder.iterdir() if path.name != LOCK]
    if content and overwrite:
        _delete_run(folder, content)
    elif content and resume:
        _check_can_resume(folder)
    elif content:
        step = checkpoint.newest_step(folder / CHECKPOINTS)
        newest = "none" if step is None else f"step {step}"
        raise FolderRefused(
            f"{folder} already holds a run (newest checkpoint: {newest}): continue it with --resume, "
            "replace it with --overwrite, or name another folder with --out"
        )


def _delete_run(folder: Path, content: list[Path]) -> None:
    if others := files.foreign(folder):
        raise FolderRefused(
            f"--overwrite: {folder} holds more than a run: {_some(others)}. Move these away, or choose another --out"
        )
    trash = durable.temporary(folder, "overwritten")
    for path in sorted(content, key=lambda path: path.name != "model"):  # never a model without its checkpoints
        os.rename(path, trash / path.name)
    durable.delete(trash)


def _check_can_resume(folder: Path) -> None:
    check_no_links(folder)
    for path in (folder / name for name in files.APPENDED):
        # Lines appended to the log of a run must not appear in its copy by `cp -al` too, which shares the file.
        if path.exists() and path.stat().st_nlink > 1:
            durable.replace(path, [path.read_bytes()])
    if (folder / "model").exists() and checkpoint.newest_step(folder / CHECKPOINTS) is None:
        raise FolderRefused(
            f"--resume: {folder} holds a trained model and no checkpoint to continue from. --init_from {folder} with "
            "another --out trains its model further; --overwrite deletes it and starts again"
        )


def check_no_links(folder: Path) -> None:
    """A link under a name that a run writes would have the run write elsewhere."""
    if odd := files.misplaced(folder):
        raise FolderRefused(
            f"{folder} has links, or other things that are not regular files or folders, where a run writes: "
            f"{_some(odd)}. Nothing is written through them: remove them, or replace them by copies of their targets"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def still_held(folder: Path) -> bool:
    """Whether the folder is still the one that this process has locked: not deleted, moved or created again."""
    return holder(folder).get("run") in HELD.values()


def check_still_ours(folder: Path) -> None:
    if not still_held(folder):
        raise CannotWrite(f"{folder} was deleted or moved while the run was writing there")


def holds_a_run(folder: Path) -> bool:
    """By files that no other program leaves: a bare config.json could be any model's."""
    return "sslvit" in holder(folder) or checkpoint.newest_step(folder / CHECKPOINTS) is not None


def _try_writing(folder: Path) -> None:
    """Tries all that a checkpoint needs of a file system, so that it fails now and not after the first hour."""
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
    fd, run = _locked(Path(folder) / LOCK), uuid.uuid4().hex[:8]
    HELD[fd] = run
    try:
        me = {
            "sslvit": "This folder belongs to a run. The process that has locked this file is writing here.",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "pids": pids(),
            "start": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": run,
        }
        # One write of constant length over the last holder's: once it was used, the file is never empty.
        os.ftruncate(fd, os.pwrite(fd, f"{json.dumps(me):<511}\n".encode(), 0))
        os.fsync(fd)
        yield run
    finally:
        if HELD.pop(fd, None) is not None:
            os.close(fd)


def _locked(file: Path) -> int:
    """A descriptor of the lock file, locked. The file must be this folder's alone: one that has another name elsewhere
    (a hard link, as in a copy by `cp -al`) is replaced by its copy, and one that has been replaced is opened again.
    """
    for last in (False,) * 9 + (True,):  # a file system may have no stable inode numbers: then any locked file will do
        try:
            fd = durable.without_links(file, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):
                raise
            raise _not_regular(file) from error
        try:
            mine = os.fstat(fd)
            if not stat.S_ISREG(mine.st_mode):
                raise _not_regular(file)
            _take(fd, file.parent)
            mine = os.fstat(fd)  # from here on no other process replaces it
            in_place = os.path.lexists(file) and os.path.samestat(mine, os.lstat(file))
            if last or (in_place and mine.st_nlink == 1):
                return fd
            if in_place:
                durable.replace(file, [os.pread(fd, LONGEST_LOCK, 0)])
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise AssertionError("the last turn returns or raises")


def _not_regular(file: Path) -> FolderRefused:
    return FolderRefused(f"{file} is a link, or not a regular file: remove it, or choose another --out")


def _take(fd: int, folder: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        deadline = time.monotonic() + 1.0
        while not (owner := holder(folder)) and time.monotonic() < deadline:  # it may not have written its name yet
            time.sleep(0.05)
        raise RunLocked(
            f"{folder} is being written by process {owner.get('pid', 'unknown')} on {owner.get('host', 'unknown')} "
            f"(run {owner.get('run')}, since {owner.get('start')}): stop it, wait for it, or choose another --out"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        log.warning("%s is on a file system without locks: nothing prevents a second run in it", folder)


def pids() -> str:
    """What the numbers of processes are of: containers of one machine may count theirs apart."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def holder(folder: Path) -> dict[str, Any]:
    """What the process that has the lock wrote into it, or the last one that had."""
    try:
        owner = json.loads(durable.read(folder / LOCK, longest=LONGEST_LOCK))
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _let_go_in_child() -> None:
    """A forked loader worker would hold the lock too, and keep it for seconds after its parent was killed."""
    while HELD:
        os.close(HELD.popitem()[0])


os.register_at_fork(after_in_child=_let_go_in_child)
