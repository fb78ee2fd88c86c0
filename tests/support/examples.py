"""Small checkpoints that know what they hold, and files that someone might put in their place."""

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path, PosixPath

import numpy as np
import torch

from sslvit.storage import checkpoint

OBJECTS, NUMBER = np.dtype(object), np.float64(1).__reduce__()[0]


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(3, 5, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "count": torch.tensor(step),
        "mask": torch.rand(5, generator=generator) < 0.5,
        "none": torch.zeros(0, 4),
    }


def save(root: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(root, step, tensors_of(step), {"cursor": step * 8, "name": "é"}, keep)


def is_whole(found: checkpoint.Checkpoint) -> bool:
    """Bit for bit what was saved at its step."""
    expected = tensors_of(found.step)
    return (
        found.state == {"cursor": found.step * 8, "name": "é"}
        and found.tensors.keys() == expected.keys()
        and all(
            found.tensors[name].dtype == t.dtype and torch.equal(found.tensors[name], t) for name, t in expected.items()
        )
    )


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable, *arguments: object, state: object = None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.reduced


class Payload:
    """Unpickled, it leaves a canary."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)


def payloads(folder: Path, canary: Path) -> dict[str, bytes]:
    """Files that run code in readers which unpickle."""
    evil = Payload(canary)
    made: dict[str, Callable[[Path], object]] = {
        **{f"pickle {p}": lambda path, p=p: path.write_bytes(pickle.dumps(evil, p)) for p in range(6)},
        "in a dict": lambda path: path.write_bytes(pickle.dumps({"weight": evil})),
        "in a list": lambda path: path.write_bytes(pickle.dumps([[evil]] * 3)),
        "torch zip": lambda path: torch.save(evil, path),
        "torch zip in a dict": lambda path: torch.save({"weight": torch.ones(2), "hyper_parameters": evil}, path),
        "torch legacy": lambda path: torch.save({"weight": evil}, path, _use_new_zipfile_serialization=False),
        "module": lambda path: torch.save({"model": torch.nn.Linear(2, 2), "more": evil}, path),
        "numpy object": lambda path: np.array([evil], dtype=object).dump(path),
        "torch script-like zip": lambda path: torch.save([evil, {"code": "import os"}], path),
        "number of numpy": lambda path: torch.save({"weight": torch.ones(2), "lr": Call(NUMBER, OBJECTS, evil)}, path),
        "dtype of numpy": lambda path: torch.save({"weight": torch.ones(2), "lr": Call(np.dtype, evil)}, path),
        "path": lambda path: torch.save({"weight": torch.ones(2), "args": Call(PosixPath, evil, "a")}, path),
        "eval": lambda path: path.write_text(f"__import__('os').system('touch {canary}')"),
        "import chain": lambda path: path.write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()),
        "yaml": lambda path: path.write_text(f"!!python/object/apply:os.system ['touch {canary}']"),
        "behind a header": lambda path: path.write_bytes((8).to_bytes(8, "little") + b"{}      " + pickle.dumps(evil)),
    }
    contents = {}
    for name, make in made.items():
        make(folder / "payload")
        contents[name] = (folder / "payload").read_bytes()
    return contents


def hostile_headers(count: int) -> list[bytes]:
    """Safetensors files whose headers lie, and bytes at random."""
    chance = random.Random(0)

    def file(header: object, data: bytes = bytes(64), length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return (len(text) if length is None else length).to_bytes(8, "little") + text + data

    numbers = [
        -1,
        0,
        1,
        2,
        4,
        8,
        63,
        64,
        65,
        2**31,
        2**32,
        2**53,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        10**30,
        1.5,
        "4",
        None,
        True,
        [],
    ]
    dtypes = ["F32", "F64", "I8", "U8", "BOOL", "BF16", "F8_E4M3", "F8_E8M0", "F4", "C64", "X", "", None, 7]
    files = [
        b"",
        b"\0" * 7,
        bytes(8),
        b"\xff" * 8,
        file({}, b"", 2**64 - 1),
        file({}, b"", 2**62),
        file({}, b"", 100_000_000),
        file(b"{" + b'"a":' * 20_000),
        file(b"[" * 200_000),
        file(
            b'{"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        ),
    ]
    while len(files) < count:
        pick = chance.choice
        entry = {
            "dtype": pick(dtypes),
            "shape": pick([[pick(numbers) for _ in range(chance.randrange(4))], pick(numbers), [1] * 1000]),
            "data_offsets": pick([[pick(numbers), pick(numbers)], [pick(numbers)], pick(numbers), [0, 64, 64]]),
        }
        if chance.random() < 0.2:
            entry.pop(pick(list(entry)))
        header = {pick(["a", "", "../a", "a\0b", "__metadata__"]): entry}
        if chance.random() < 0.3:
            header["b"] = {"dtype": "F32", "shape": [16], "data_offsets": [pick([0, 32]), 64]}
        raw = bytearray(file(header, length=pick([None, None, None, chance.randrange(300)])))
        if chance.random() < 0.2:
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        files.append(bytes(raw))
    return files
