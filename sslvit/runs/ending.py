"""How a run ended, or whether it still goes on: recorded in its folder, and read from it without disturbing the run.

A run that ends before its last step leaves ended.json. One that is killed leaves nothing: no process has its lock then.
"""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import psutil

from sslvit.errors import Diverged, Error, Preempted, shortened
from sslvit.runs.files import CHECKPOINTS, LOCK, METRICS
from sslvit.runs.folder import holder, pids, still_held
from sslvit.runs.public import without_secrets
from sslvit.storage import checkpoint, sealed

ENDED = "ended.json"
LOCKS = Path("/proc/locks")
SILENT = 900.0  # seconds without a line after which a run on another machine counts as dead
State = Literal["running", "finished", "stopped", "diverged", "failed", "dead"]
EARLY: tuple[State, ...] = ("stopped", "diverged", "failed")  # before the last step, and said so


class Status(NamedTuple):
    state: State
    message: str = ""  # why, and what to do


class Watcher(Protocol):
    """Sees what a run logs, in its main process. Nothing that it does may fail, or take long."""

    def log(self, values: dict[str, Any], *, step: int) -> None:
        """After each line of the log."""

    def finish(self) -> None:
        """When the run has ended with its last step, and its model is saved."""

    def ended(self, status: Status) -> None:
        """Instead, when the run ends early."""


@contextmanager
def recorded(folder: AbstractContextManager[Path], watchers: Sequence[Watcher] = ()) -> Iterator[Path]:
    """A run's folder, opened, in which an early end is recorded; watchers are told of any end. What an earlier attempt
    said stays until training goes on (see `begin_anew`), so that a refused --resume does not hide it."""
    with folder as out:
        try:
            yield out
        except BaseException as error:
            status = of_error(error)
            with suppress(OSError):  # a full disk, perhaps the very reason of the end
                if still_held(out) and not (out / ENDED).exists():  # not in the place of a folder that was moved
                    sealed.write(out / ENDED, {"state": status.state, "message": status.message, "time": time.time()})
            for watcher in watchers:
                watcher.ended(status)
            raise
        for watcher in watchers:
            watcher.finish()


def begin_anew(out: Path) -> None:
    (out / ENDED).unlink(missing_ok=True)


def of_error(error: BaseException) -> Status:
    message = without_secrets(shortened(" ".join(str(error).split())))
    if isinstance(error, Preempted):
        return Status("stopped", message)
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return Status("stopped", "interrupted; --resume continues from the newest checkpoint")
    if isinstance(error, Diverged):
        return Status("diverged", message)
    named = isinstance(error, Error | ValueError)
    return Status("failed", message if named else f"{type(error).__name__}: {message}")


def status_of(folder: Path, locks: set[tuple[int, int]] | None = None) -> Status:
    """Of the run in this folder, by what is there. locks: `held_locks`, where many runs are asked about."""
    owner = holder(folder)
    here = owner.get("host") == socket.gethostname() and owner.get("pids", pids()) == pids()
    if here and is_locked(folder, owner, held_locks() if locks is None else locks):
        return Status("running")
    if is_finished(folder):
        return Status("finished")
    ended = sealed.intact(folder / ENDED)
    if ended.get("state") in EARLY:
        return Status(ended["state"], str(ended.get("message", "")))
    recent = time.time() - last_change(folder) < SILENT
    unseen = is_alive(owner) and (recent or not LOCKS.exists()) if here else recent  # where its lock cannot be seen
    if owner and unseen:
        return Status("running")
    step = checkpoint.newest_step(folder / CHECKPOINTS)
    way_out = "it had saved no checkpoint" if step is None else f"--resume continues from step {step:,}"
    return Status("dead", f"no process writes here, and the run did not say why it ended: {way_out}")


def is_locked(folder: Path, owner: dict[str, Any], locks: set[tuple[int, int]]) -> bool:
    """By a process of this machine. The lock is not touched: to try it could keep out a run that starts just then."""
    return (owner.get("pid"), (folder / LOCK).stat().st_ino) in locks


def is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process that took the lock still exists. Not every file system shows its locks."""
    try:
        began = datetime.fromisoformat(owner["start"]).timestamp()
        return psutil.Process(owner["pid"]).create_time() < began + 1
    except (psutil.Error, LookupError, TypeError, ValueError):
        return False


def last_change(folder: Path) -> float:
    """When the log last grew, or the run began."""
    return max((file.stat().st_mtime for file in (folder / METRICS, folder / LOCK) if file.exists()), default=0.0)


def held_locks() -> set[tuple[int, int]]:
    """Process and inode of every lock of a file that is held on this machine."""
    locks = set()
    with suppress(OSError):
        for line in LOCKS.read_text().splitlines():
            words = line.split()
            with suppress(ValueError, IndexError):  # waiting ones have an arrow, and are not held
                locks.add((int(words[4]), int(words[5].rpartition(":")[2])))
    return locks


def is_finished(folder: Path) -> bool:
    """Whether it left the model of its last step. A run that was made longer has the model of its former length."""
    model = sealed.intact(folder / "model" / "config.json").get("sslvit")
    steps = model.get("steps") if isinstance(model, dict) else None
    return isinstance(model, dict) and sealed.intact(folder / "environment.json").get("steps", steps) == steps
