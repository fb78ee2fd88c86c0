"""What the folder of a checkpoint holds, and whether it is whole.

    tensors.safetensors    weights, optimizer state, teachers, queues
    state.json             everything else
    MANIFEST.json          written last: schema, step, versions; size and hash of the two files

Neither torch.save nor safetensors notices a changed byte in a tensor: only the hashes of the manifest do. The manifest
carries its own hash, so no byte of a checkpoint is unguarded. Nothing here can unpickle.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor
from xxhash import xxh3_128

from sslvit import __version__
from sslvit.errors import BAD_CONFIGURATION, Stop
from sslvit.storage import durable

SCHEMA = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "MANIFEST.json"
LONGEST_MANIFEST = 1 << 20


class CheckpointError(Stop):
    """A checkpoint cannot be written or read."""


class Damaged(CheckpointError):
    """One checkpoint does not verify; the message is one line, `step-00000300/file: reason`."""

    def __init__(self, folder: Path, name: str, reason: str):
        line = f"{folder.name}/{name}: {reason}"
        super().__init__("".join(c if c.isprintable() else "?" for c in line))  # names may hold control sequences


class NewerSchema(CheckpointError):
    """The checkpoint was written by a later version of the package."""

    code = BAD_CONFIGURATION


class Contents(NamedTuple):
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    versions: dict[str, str]


def make(step: int, files: dict[str, dict[str, int | str]]) -> dict[str, Any]:
    versions = {
        "sslvit": __version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }
    return {"schema": SCHEMA, "step": step, "versions": versions, "files": files}


def seal(manifest: dict[str, Any]) -> bytes:
    """The one way to write this manifest. What is read must be exactly this, so that every byte of it counts.

    This envelope is the same for every schema to come: else an older version could not tell newer from damaged.
    """
    own = xxh3_128(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"manifest": manifest, "xxh3_128": own}, indent=1, sort_keys=True) + "\n").encode()


def read(folder: Path, step: int) -> Contents:
    """Every byte is verified before any is used, and exactly the verified bytes are used: each file is read once.

    Raises Damaged, or NewerSchema.
    """
    try:
        for name in set(os.listdir(folder)) - {MANIFEST, TENSORS, STATE}:
            raise Damaged(folder, name, "no manifest names such a file")
    except OSError as error:
        raise Damaged(folder, "", str(error.strerror)) from error
    manifest = _manifest(folder, step)
    contents = {name: _bytes(folder, name, written=manifest["files"][name]) for name in (TENSORS, STATE)}
    try:
        durable.check_header(contents[TENSORS])
        tensors = load_safetensors(contents[TENSORS])
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise Damaged(folder, TENSORS, str(error)) from error
    return Contents(tensors, _state(folder, contents[STATE]), manifest["versions"])


def read_state(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The state and the versions, verified; the tensors are not looked at. Raises as `read` does."""
    manifest = _manifest(folder, step)
    return _state(folder, _bytes(folder, STATE, written=manifest["files"][STATE])), manifest["versions"]


def _state(folder: Path, text: bytes) -> dict[str, Any]:
    try:
        state = json.loads(text)
        if not isinstance(state, dict):
            raise ValueError(f"holds a {type(state).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise Damaged(folder, STATE, str(error)) from error
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
        raise Damaged(folder, MANIFEST, f"is no manifest ({error!r})") from error
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


def _bytes(folder: Path, name: str, **known: Any) -> bytes:
    try:
        return durable.read(folder / name, **known)
    except OSError as error:
        raise Damaged(folder, name, str(error.strerror)) from error
    except ValueError as error:
        raise Damaged(folder, name, str(error)) from error
