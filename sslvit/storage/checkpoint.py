"""Checkpoints of a run: complete or invisible, and pruned only after the new one was verified.

    root/step-00000300/tensors.safetensors    weights, optimizer state, teachers, queues
                       state.json             everything else
                       MANIFEST.json          written last: schema, step, versions; size and hash of the two files

`.1`, `.2`, ... after the step are later saves of the same step: a rename cannot replace a folder, and deleting the old
one first would leave a moment with neither.

Neither torch.save nor safetensors notices a changed byte in a tensor: only the hashes of the manifest do. The manifest
carries its own hash, so no byte of a checkpoint is unguarded. Nothing here can unpickle.

The caller holds the lock of the run folder: nothing is guaranteed with two writers.
"""

import json
import logging
import os
import platform
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor
from xxhash import xxh3_128

from sslvit import __version__
from sslvit.errors import BAD_CONFIGURATION, CannotWrite, DataError, Error
from sslvit.storage import durable

log = logging.getLogger(__name__)

SCHEMA = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "MANIFEST.json"
LONGEST_MANIFEST = 1 << 20
NAME = re.compile(r"step-([0-9]{8,})(?:\.([0-9]+))?")


class Damaged(DataError):
    """One checkpoint does not verify; the message is one line, `step-00000300/file: reason`."""

    def __init__(self, folder: Path, name: str, reason: str):
        line = f"{folder.name}/{name}: {reason}"
        super().__init__("".join(c if c.isprintable() else "?" for c in line))  # names may hold control sequences


class NewerSchema(Error):
    """The checkpoint was written by a later version of the package."""

    code = BAD_CONFIGURATION


class Checkpoint(NamedTuple):
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    versions: dict[str, str]
    path: Path
    rejected: list[str]  # newer ones that did not verify, one line each


def save(root: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 2) -> Path:
    """Writes a checkpoint, reads it back, makes it visible, and deletes all but the newest `keep`.

    Raises CannotWrite if the disk refuses, at whatever point; then the earlier checkpoints are as they were.
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
        durable.write(temporary / MANIFEST, [seal(manifest)])
        durable.sync_folder(temporary)
        for name, written in files.items():
            if durable.fingerprint(temporary / name) != written:
                raise OSError(f"{name} reads back other than it was written")
        final = _free_name(root, step)
        os.rename(temporary, final)
        durable.sync_folder(root)
    except OSError as error:
        raise CannotWrite(
            f"{root}: the checkpoint of step {step} was not saved: {error.strerror or error} "
            f"(needs {need / 1e6:,.1f} MB, {_free(root)} MB free); earlier checkpoints are untouched"
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            durable.discard(temporary)
    try:
        _prune(root, final, max(keep, 2))
    except (OSError, ValueError) as error:  # leftovers do no harm; ValueError: somebody moved the newest away
        log.warning("%s: older checkpoints could not be pruned: %s", root, error)
    return final


def _free(root: Path) -> str:
    try:
        return f"{shutil.disk_usage(root).free / 1e6:,.1f}"
    except OSError:
        return "unknown"


def latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint of which every byte is as it was written; None if there is none at all. Reads only."""
    seen = None
    while (folders := _checkpoints(root)) != seen:  # a run that saves meanwhile may prune one before it is read
        rejected: list[str] = []
        for folder in folders:
            try:
                return _read(folder, rejected)
            except Damaged as error:
                rejected.append(str(error))
        seen = folders
    if not folders:
        return None
    # To start afresh instead would be a silent loss of the run.
    raise DataError(f"{root}: no checkpoint verifies, restore one from a backup: " + "; ".join(rejected))


def restore(root: Path) -> Checkpoint | None:
    """`latest`, for the run that will continue to write here.

    Those that did not verify are logged and set aside as `rejected-...`, so that they never count against `keep`.
    """
    if os.path.isdir(root):
        durable.sweep(Path(root))
    checkpoint = latest(root)
    if checkpoint is not None:
        folders = _checkpoints(root)
        for folder, reason in zip(folders[: folders.index(checkpoint.path)], checkpoint.rejected, strict=True):
            log.warning("checkpoint rejected and set aside: %s", reason)
            aside = folder.with_name(f"rejected-{folder.name}")
            if aside.exists():
                durable.discard(aside)
            os.rename(folder, aside)
    return checkpoint


def newest_step(root: Path) -> int | None:
    """By name alone, for messages: nothing is verified."""
    return next((_age(path)[0] for path in _checkpoints(root)), None)


def read_state(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The state and the versions, verified; the tensors are not read. Raises Damaged, or NewerSchema."""
    manifest = _manifest(folder, step)
    return _state(folder, manifest), manifest["versions"]


def seal(manifest: dict[str, Any]) -> bytes:
    """The one way to write this manifest. A file that is read must be exactly this, so that every byte of it counts.

    This envelope is the same for every schema to come: else an older version could not distinguish newer from damaged.
    """
    own = xxh3_128(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"manifest": manifest, "xxh3_128": own}, indent=1, sort_keys=True) + "\n").encode()


def _versions() -> dict[str, str]:
    return {
        "sslvit": __version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }


def _read(folder: Path, rejected: list[str]) -> Checkpoint:
    """Every byte is verified before any is used, and exactly the verified bytes are used: each file is read once.

    Raises Damaged, or NewerSchema.
    """
    try:
        for name in set(os.listdir(folder)) - {MANIFEST, TENSORS, STATE}:
            raise Damaged(folder, name, "no manifest names such a file")
    except OSError as error:
        raise Damaged(folder, "", str(error.strerror)) from error
    step = _age(folder)[0]
    manifest = _manifest(folder, step)
    content = _bytes(folder, TENSORS, written=manifest["files"][TENSORS])
    state = _state(folder, manifest)
    try:
        durable.check_header(content)
        tensors = load_safetensors(content)
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise Damaged(folder, TENSORS, str(error)) from error
    return Checkpoint(step, tensors, state, manifest["versions"], folder, rejected)


def _state(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    text = _bytes(folder, STATE, written=manifest["files"][STATE])
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(folder, STATE, str(error)) from error
    if not isinstance(state, dict):
        raise Damaged(folder, STATE, f"holds a {type(state).__name__}, not an object")
    return state


def _manifest(folder: Path, step: int) -> dict[str, Any]:
    text = _bytes(folder, MANIFEST, longest=LONGEST_MANIFEST)
    try:
        manifest = json.loads(text)["manifest"]
        if text != seal(manifest):
            raise ValueError("does not match its own hash")
        schema = manifest["schema"]
        if type(schema) is int and schema > SCHEMA:
            raise NewerSchema(
                f"{folder} has schema {schema}, written by sslvit {manifest.get('versions', {}).get('sslvit')}; "
                f"sslvit {__version__} reads schema {SCHEMA} at most: upgrade sslvit"
            )
        if not _is_in_form(manifest):
            raise ValueError(f"is not of schema {SCHEMA}")
        if manifest["step"] != step:
            raise ValueError(f"is of step {manifest['step']}")
    except ValueError as error:
        raise Damaged(folder, MANIFEST, str(error)) from error
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(folder, MANIFEST, f"is not a manifest ({error!r})") from error
    return manifest


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


def _bytes(folder: Path, name: str, **limits: Any) -> bytes:
    try:
        return durable.read(folder / name, **limits)
    except OSError as error:
        raise Damaged(folder, name, str(error.strerror)) from error
    except ValueError as error:
        raise Damaged(folder, name, str(error)) from error


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
    folders = _checkpoints(root)
    kept = {_age(newest)[0]}
    for path in folders[folders.index(newest) + 1 :]:
        step = _age(path)[0]
        if step in kept or len(kept) == keep:
            durable.discard(path)
        else:
            kept.add(step)


@cache
def _warn_of_keep_1() -> None:
    log.warning("keep=1 is taken as 2: with one checkpoint, damage to it would lose the run")
