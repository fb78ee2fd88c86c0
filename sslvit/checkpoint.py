"""Checkpoints of a run: complete or invisible, hashed, never pickled, pruned only after the new one was verified.

    root/step-00000300/tensors.safetensors    weights, optimizer state, teachers, queues
    root/step-00000300/state.json             everything else
    root/step-00000300/MANIFEST.json          written last: schema, step, versions; size and hash of the two files

Neither torch.save nor safetensors notices a changed byte in a tensor: only the hashes of the manifest do. The manifest
carries its own hash, so no byte of a checkpoint is unguarded. `.1`, `.2`, ... after the step are later saves of
the same step: a rename cannot replace a folder, and deleting the old one first would leave a moment with neither.

The caller holds the lock of the run folder: with two writers nothing here is promised.
"""

import json
import logging
import os
import platform
import re
import shutil
import stat
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor
from xxhash import xxh3_128

from sslvit import __version__, durable
from sslvit.errors import BAD_CONFIGURATION, CannotWrite, DataError, Stop

log = logging.getLogger(__name__)

SCHEMA = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "MANIFEST.json"
NAME = re.compile(r"step-([0-9]{8,})(?:\.([0-9]+))?")
LONGEST_MANIFEST = 1 << 20


class CheckpointError(Stop):
    """A checkpoint cannot be written or read."""


class SaveFailed(CheckpointError, CannotWrite):
    """The new checkpoint was not written, and the earlier ones are untouched: training can go on and save later."""


class NoneVerifies(CheckpointError, DataError):
    """There are checkpoints, and all are damaged. To start afresh instead would be a silent loss of the run."""


class NewerSchema(CheckpointError):
    """The newest checkpoint was written by a later version of the package."""

    code = BAD_CONFIGURATION


class Damaged(CheckpointError):
    """One checkpoint does not verify; the message is `step-00000300/file: reason`."""


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
        manifest = {"schema": SCHEMA, "step": step, "versions": _versions(), "files": files}
        durable.write(temporary / MANIFEST, [_seal(manifest)])
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
    _prune(root, final, max(keep, 2))
    return final


def latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint of which every byte is as it was written; None if there is none at all. Reads only."""
    seen = None
    while (found := _checkpoints(root)) != seen:  # a run that saves meanwhile prunes what we meant to read: look again
        rejected = []
        for folder in found:
            try:
                return _read(folder)._replace(rejected=rejected)
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
    step, again = NAME.fullmatch(path.name).groups()
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


def _seal(manifest: dict[str, Any]) -> bytes:
    """The one way to write this manifest. What is read must be exactly this, so that every byte of it counts."""
    own = xxh3_128(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"manifest": manifest, "xxh3_128": own}, indent=1, sort_keys=True) + "\n").encode()


def _read(folder: Path) -> Checkpoint:
    """Every byte is verified before any is used, and exactly the verified bytes are used: each file is read once."""
    try:
        for name in set(os.listdir(folder)) - {MANIFEST, TENSORS, STATE}:
            raise Damaged(f"{folder.name}/{name}: no manifest names such a file")
    except OSError as error:
        raise Damaged(f"{folder.name}/: {error.strerror}") from error
    try:
        sealed = json.loads(text := _contents(folder, MANIFEST))
        manifest = sealed["manifest"]
        if text != _seal(manifest):
            raise ValueError("does not match its own hash")
        schema, step = manifest["schema"], manifest["step"]
        if type(schema) is int and schema > SCHEMA:
            raise NewerSchema(
                f"{folder} has schema {schema}, written by sslvit {manifest.get('versions', {}).get('sslvit')}; "
                f"sslvit {__version__} reads schema {SCHEMA} at most: upgrade sslvit"
            )
        if not _is_in_form(manifest):
            raise ValueError(f"is not a manifest of schema {SCHEMA}")
        if step != _age(folder)[0]:
            raise ValueError(f"is of step {step}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{folder.name}/{MANIFEST}: {error}") from error
    contents = {name: _contents(folder, name, manifest["files"][name]) for name in (TENSORS, STATE)}
    try:
        tensors = load_safetensors(contents[TENSORS])
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise Damaged(f"{folder.name}/{TENSORS}: {error}") from error
    try:
        state = json.loads(contents[STATE])
        if not isinstance(state, dict):
            raise ValueError(f"holds a {type(state).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{folder.name}/{STATE}: {error}") from error
    return Checkpoint(step, tensors, state, manifest["versions"], folder, rejected=[])


def _is_in_form(manifest: dict[str, Any]) -> bool:
    files = manifest["files"]
    return (
        set(manifest) == {"schema", "step", "versions", "files"}
        and type(manifest["schema"]) is type(manifest["step"]) is int
        and manifest["schema"] == SCHEMA
        and isinstance(manifest["versions"], dict)
        and set(files) == {TENSORS, STATE}
        and all(set(written) == {"size", "xxh3_128"} for written in files.values())
    )


def _contents(folder: Path, name: str, expected: dict[str, int | str] | None = None) -> bytes:
    """All bytes of a file, if they are the expected ones. A manifest, of which nothing is known yet, must be short."""
    path = folder / name
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):  # to open a named pipe would wait for ever
            raise Damaged(f"{folder.name}/{name}: is not a regular file")
        if expected is None and status.st_size > LONGEST_MANIFEST:
            raise Damaged(f"{folder.name}/{name}: has {status.st_size} bytes, more than any manifest")
        if expected is not None and status.st_size != expected["size"]:
            raise Damaged(f"{folder.name}/{name}: has {status.st_size} bytes instead of {expected['size']}")
        contents = path.read_bytes()
    except Damaged:
        raise
    except OSError as error:
        raise Damaged(f"{folder.name}/{name}: {error.strerror}") from error
    if expected is not None and xxh3_128(contents).hexdigest() != expected["xxh3_128"]:
        raise Damaged(f"{folder.name}/{name}: the bytes are not those that were written (hash differs)")
    return contents


def _versions() -> dict[str, str]:
    return {
        "sslvit": __version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }


def _free_megabytes(root: Path) -> str:
    try:
        return f"{shutil.disk_usage(root).free / 1e6:,.1f}"
    except OSError:  # the folder itself may be what is gone
        return "unknown"


@cache
def _warn_of_keep_1() -> None:
    log.warning("keep=1 is taken as 2: with one checkpoint, damage to it would lose the run")
