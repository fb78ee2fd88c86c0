"""Other people's files as named tensors. Nothing in a file is executed, and sizes are checked first.

safetensors is read by its library after a check that the header is short. In an .npz every header is compared with the
size of its entry before an array is made, and the sum with the file's. A .pth is a pickle, which a child process with
limits reads.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from sslvit.data.readers import npz
from sslvit.errors import DataError, NoInput
from sslvit.storage import durable, sealed

MOST_BYTES = 32 << 30  # as in sslvit.weights.foreign.unpickle; DINOv3's 7B has 27 GB
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in folders of timm and transformers
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pyth")
CHILD_HAS = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR", "LANG")  # of the environment: no tokens


class Contents(NamedTuple):
    file: Path
    state_dicts: dict[str, dict[str, Tensor]]  # by the path of keys that leads to each; "" is the file itself
    config: dict[str, Any] | None  # of the folder, if it is one that timm or transformers wrote
    preprocessor: dict[str, Any] | None
    torchvision: dict[str, Any] | None = None  # of our export to its layout


def read(path: str | Path, seconds: float = 600) -> Contents:
    """A file, or a folder with config.json and model.safetensors or pytorch_model.bin. seconds: for a pickle."""
    path = Path(path)
    file = next((path / name for name in WEIGHTS if (path / name).is_file()), path)
    try:
        if file.is_dir():
            held = ", ".join(sorted(os.listdir(path))[:10]) or "nothing"
            raise NoInput(f"{path} is a folder without {' or '.join(WEIGHTS)}, it has {held}")
        real = file.resolve(strict=True)  # the Hub's cache is made of links
        if not real.is_file():  # to open a named pipe would wait forever
            raise DataError(f"{file} is not a regular file")
        size = real.stat().st_size
        if size > MOST_BYTES:
            raise DataError(f"{file} has {size:,} bytes, more than the {MOST_BYTES:,} that are read")
        refuse_by_its_first_bytes(file, real)
        if (suffix := file.suffix.lower()) in PICKLES:
            state_dicts = _unpickled(file, real, seconds)
        elif suffix == ".npz":
            state_dicts = {"": _arrays(file, real)}
        elif suffix == ".safetensors":
            state_dicts = {"": _tensors(real)}
        else:
            raise DataError(f"{file} must be one of .safetensors, .npz, {', '.join(PICKLES)}")
    except OSError as error:
        raise NoInput(f"{file}: {error.strerror or error}") from error
    except DataError:
        raise
    except (safetensors.SafetensorError, ValueError) as error:
        raise DataError(f"{file} is not a whole safetensors file of weights: {error}") from error
    if file.name not in WEIGHTS:  # a config beside it may belong to another model
        return Contents(file, state_dicts, None, None)
    names = ("config.json", "preprocessor_config.json", "torchvision.json")
    return Contents(file, state_dicts, *(_json(file.with_name(name)) for name in names))


def refuse_by_its_first_bytes(file: Path, real: Path) -> None:
    """Names the kind of a file that cannot be one of weights."""
    with real.open("rb") as stream:
        first = stream.read(300)
    kinds = {
        "empty": not first,
        "a page of HTML, such as a site gives instead of a file": re.match(
            rb"\s*<(!doctype|html)", first, re.IGNORECASE
        ),
        "a pointer of git-lfs: fetch the file itself": first.startswith(b"version https://git-lfs"),
        "compressed by gzip: unpack it": first.startswith(b"\x1f\x8b"),
        "a tar archive: unpack it": first[257:262] == b"ustar",
    }
    if kind := next((kind for kind, it_is in kinds.items() if it_is), None):
        raise DataError(f"{file} is {kind}")


def config_of(folder: Path) -> dict[str, Any] | None:
    """config.json, if there is one."""
    return _json(folder / "config.json")


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        return sealed.read(file)
    except ValueError as error:
        raise DataError(f"{file} cannot be used: {error}") from error


def _unpickled(file: Path, real: Path, seconds: float) -> dict[str, dict[str, Tensor]]:
    """By a child without our environment, which holds secrets; its file is deleted whatever happens."""
    with tempfile.TemporaryDirectory(prefix="sslvit-") as folder:
        target, output = Path(folder) / "tensors.safetensors", Path(folder) / "output"
        environment = {name: os.environ[name] for name in CHILD_HAS if name in os.environ}
        with output.open("wb") as stream:
            try:
                child = subprocess.run(
                    [sys.executable, "-W", "ignore", "-m", "sslvit.weights.foreign.unpickle", str(real), str(target)],
                    cwd=Path(__file__).parents[3],  # where -m finds sslvit, installed or not
                    env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    timeout=seconds,
                )
            except subprocess.TimeoutExpired as error:
                raise DataError(f"{file} took longer than {seconds:g} seconds to read, and was given up") from error
        if child.returncode:
            raise DataError(f"{file} {_reason(output, child.returncode)}")
        tensors = _tensors(target)
    state_dicts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        *path, last = json.loads(name)
        state_dicts.setdefault(".".join(path), {})[last] = tensor
    return state_dicts


def _reason(output: Path, code: int) -> str:
    with output.open("rb") as stream:
        stream.seek(max(0, output.stat().st_size - 4096))
        text = "".join(c if c.isprintable() else " " for c in stream.read().decode(errors="replace"))
    if code < 0:
        return f"was not read: its reader was stopped by signal {-code}"
    if named := re.search(r"GLOBAL ([\w.]+\.[\w.]+)", text):
        return (
            f"asks for {named[1]}, which is no tensor and might run code: nothing of it was executed. If you trust "
            "where it is from, save its tensors as safetensors there"
        )
    if "weights_only" in text:  # torch advises to give up safety, which is not passed on
        return "is not a PyTorch file of tensors, or not a whole one: save a state dict of it, best as safetensors"
    return f"is not a PyTorch file of tensors, or not a whole one: {text[:300].strip() or 'its reader said nothing'}"


def _arrays(file: Path, real: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(real) as archive:
            entries = archive.infolist()
            if len(entries) > durable.MOST_TENSORS:
                raise ValueError(f"{len(entries)} entries are more than the {durable.MOST_TENSORS} that are read")
            npz.check_sizes(archive, real.stat().st_size)
            return {entry.filename.removesuffix(".npy"): _tensor(npz.array_of(archive, entry)) for entry in entries}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{file} is not a whole .npz of numbers: {error}") from error


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))


def _tensors(file: Path) -> dict[str, Tensor]:
    """Of a safetensors file."""
    with file.open("rb") as stream:
        durable.check_header(stream.read(8 + durable.LONGEST_HEADER))
    return load_file(file)
