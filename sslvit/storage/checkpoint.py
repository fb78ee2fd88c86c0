"""Checkpoints of a run: complete or invisible, pruned only after the new one was verified.

`root/step-00000300` is one; `.1`, `.2`, ... after the step are later saves of the same step: a rename cannot replace a
folder, and deleting the old one first would leave a moment with neither.

The caller holds the lock of the run folder: with two writers nothing here is promised.
"""

import json
import logging
import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sslvit.errors import CannotWrite, DataError
from sslvit.storage import durable, manifest
from sslvit.storage.manifest import MANIFEST, STATE, TENSORS, CheckpointError, Damaged

log = logging.getLogger(__name__)

NAME = re.compile(r"step-([0-9]{8,})(?:\.([0-9]+))?")


class SaveFailed(CheckpointError, CannotWrite):
    """The new checkpoint was not written, and the earlier ones are untouched: training can go on and save later."""


class NoneVerifies(CheckpointError, DataError):
    """There are checkpoints, and all are damaged. To start afresh instead would be a silent loss of the run."""


class Checkpoint(NamedTuple):
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    versions: dict[str, str]
    path: Path
    rejected: list[str]  # newer ones that did not verify, one line each


def save(root: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 2) -> Path:
    """Writes a checkpoint, reads it back, makes it visible, and deletes all but the newest `keep`.

    Raises SaveFailed if the disk refuses, at whatever point; then the earlier checkpoints are as they were.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step {step} must be at least 0 and keep {keep} at least 1")
    if keep == 1:
        _warn_of_keep_1()
    try:
        state_text = json.dumps(state, indent=1).encode()
    except TypeError as error:
        raise ValueError(f"the state of a checkpoint must be JSON: {error}") from error

    root = Path(root)
    need = round(1.2 * (len(state_text) + sum(t.numel() * t.element_size() for t in tensors.values())))
    temporary = None
    try:
        durable.make_folder(root)
        durable.sweep(root)
        if shutil.disk_usage(root).free < need:
            raise OSError("too little free space")
        temporary = durable.temporary(root, f"{step:08d}")
        files = {
            TENSORS: durable.write(temporary / TENSORS, durable.tensor_pieces(tensors)),
            STATE: durable.write(temporary / STATE, [state_text]),
        }
        durable.write(temporary / MANIFEST, [manifest.seal(manifest.make(step, files))])
        durable.sync_folder(temporary)
        for name, written in files.items():
            if durable.fingerprint(temporary / name) != written:
                raise OSError(f"{name} reads back other than it was written")
        final = _free_name(root, step)
        os.rename(temporary, final)
        durable.sync_folder(root)
    except OSError as error:
        raise SaveFailed(
            f"{root}: the checkpoint of step {step} was not saved: {error.strerror or error} "
            f"(needs {need / 1e6:,.1f} MB, {_free_megabytes(root)} MB free); earlier checkpoints are untouched"
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            durable.discard(temporary)
    try:
        _prune(root, final, max(keep, 2))
    except (OSError, ValueError) as error:  # what is left over is no harm; ValueError: somebody moved the newest away
        log.warning("%s: older checkpoints could not be looked through: %s", root, error)
    return final


def latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint of which every byte is as it was written; None if there is none at all. Reads only."""
    seen = None
    while (found := _checkpoints(root)) != seen:  # a run that saves meanwhile prunes what we meant to read: look again
        rejected: list[str] = []
        for folder in found:
            try:
                step = _age(folder)[0]
                return Checkpoint(step, *manifest.read(folder, step), folder, rejected)
            except Damaged as error:
                rejected.append(str(error))
        seen = found
    if not found:
        return None
    raise NoneVerifies(f"{root}: no checkpoint verifies, restore one from a backup: " + "; ".join(rejected))


def restore(root: Path) -> Checkpoint | None:
    """`latest`, for the run that will go on to write here.

    What did not verify is logged and set aside as `rejected-...`, so that it is never counted among the kept ones.
    """
    if os.path.isdir(root):
        durable.sweep(Path(root))
    checkpoint = latest(root)
    if checkpoint is not None:
        found = _checkpoints(root)
        for folder, reason in zip(found[: found.index(checkpoint.path)], checkpoint.rejected, strict=True):
            log.warning("checkpoint rejected and set aside: %s", reason)
            aside = folder.with_name(f"rejected-{folder.name}")
            if aside.exists():
                durable.discard(aside)
            os.rename(folder, aside)
    return checkpoint


def newest_step(root: Path) -> int | None:
    """By name alone, for messages: nothing is verified."""
    return next((_age(path)[0] for path in _checkpoints(root)), None)


def _checkpoints(root: Path) -> list[Path]:
    """Newest first."""
    try:
        names = [name for name in os.listdir(root) if NAME.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((Path(root) / name for name in names), key=_age, reverse=True)


def _age(path: Path) -> tuple[int, int]:
    """The step, and which save of this step it is."""
    name = NAME.fullmatch(path.name)
    assert name, path
    step, again = name.groups()
    return int(step), int(again or 0)


def _free_name(root: Path, step: int) -> Path:
    again = max((_age(path)[1] + 1 for path in _checkpoints(root) if _age(path)[0] == step), default=0)
    return root / (f"step-{step:08d}.{again}" if again else f"step-{step:08d}")


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Keeps the last save of each of the newest `keep` steps. Those of later steps are left to `restore`."""
    found = _checkpoints(root)
    kept = {_age(newest)[0]}
    for path in found[found.index(newest) + 1 :]:
        step = _age(path)[0]
        if step in kept or len(kept) == keep:
            durable.discard(path)
        else:
            kept.add(step)


def _free_megabytes(root: Path) -> str:
    try:
        return f"{shutil.disk_usage(root).free / 1e6:,.1f}"
    except OSError:  # the folder itself may be what is gone
        return "unknown"


@cache
def _warn_of_keep_1() -> None:
    log.warning("keep=1 is taken as 2: with one checkpoint, damage to it would lose the run")
