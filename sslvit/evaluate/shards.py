"""The shards of an unfinished file of features: a folder of safetensors files, named by number, rows and hash.

.features.parquet.unfinished/about.json                    what they are of; sealed
                             00000003-2047-6f0a....safetensors    features, ids, and what could not be read
                             made                     from when the products are here until they have moved out
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor
from xxhash import xxh3_128

from sslvit.data.source import Unreadable
from sslvit.errors import CannotWrite, DataError
from sslvit.storage import durable, sealed

ABOUT, LOCK = "about.json", "lock"
MADE = "made"  # a file that is there once the products are, which are then moved out of the folder


class Shard(NamedTuple):
    features: Tensor  # n d, or n p d
    ids: Tensor  # n: of the images that could be read
    unreadable: list[Unreadable]


class Shards:
    def __init__(self, out: Path):
        self.out, self.folder = out, out.with_name(f".{out.name}.unfinished")

    def files(self) -> dict[int, Path]:
        """Those that are there, by number, in order."""
        files = sorted(self.folder.glob("*-*-*.safetensors"))
        return {int(path.name.partition("-")[0]): path for path in files}

    def different(self, of: dict[str, Any]) -> list[str]:
        """In what the work that was begun here differs from this; empty if it is the same, or none."""
        about = sealed.intact(self.folder / ABOUT)
        return [name for name, value in json.loads(json.dumps(of)).items() if about and about.get(name) != value]

    def sweep(self) -> None:
        """Deletes this folder if a command was killed after it had moved all out of it, or while it deleted it."""
        if self.out.exists() and (self.folder / MADE).exists() and not (self.folder / self.out.name).exists():
            durable.discard(self.folder)
        for deleted in self.folder.parent.glob(f".del-{escape(self.folder.name)}-*"):
            shutil.rmtree(deleted, ignore_errors=True)

    @contextmanager
    def locked(self, of: dict[str, Any]) -> Iterator[None]:
        """For one command at a time, with the shards of the same work alone."""
        durable.make_folder(self.folder)
        with open(self.folder / LOCK, "ab", opener=durable.without_links) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CannotWrite(f"--out {self.out}: another process is writing it") from error
            (self.folder / MADE).unlink(missing_ok=True)
            if self.different(of) or not sealed.intact(self.folder / ABOUT):
                for path in self.folder.iterdir():
                    if path.name != LOCK:
                        durable.delete(path)
                sealed.write(self.folder / ABOUT, of)
            yield

    def made(self) -> None:
        """Records that the products are in the folder, whole."""
        durable.sync_folder(self.folder)
        (self.folder / MADE).touch()

    def write(self, number: int, shard: Shard) -> None:
        unreadable = torch.frombuffer(bytearray(json.dumps(shard.unreadable).encode()), dtype=torch.uint8)
        tensors = {"features": shard.features.contiguous(), "ids": shard.ids, "unreadable": unreadable}
        name = f"{number:08}-{len(shard.ids)}-{durable.tensors_hash(tensors)}.safetensors"
        durable.replace(self.folder / name, durable.tensor_pieces(tensors))

    def is_whole(self, path: Path) -> bool:
        """Whether a shard is as it was written; if not, it is deleted."""
        if _digest(path) == xxh3_128(durable.read(path)).hexdigest():
            return True
        path.unlink()
        return False

    def read(self, path: Path) -> Shard:
        content = durable.read(path)
        if _digest(path) != xxh3_128(content).hexdigest():
            raise DataError(f"{path} was damaged while this ran: the same command makes it again")
        tensors = load_safetensors(content)
        unreadable = json.loads(tensors["unreadable"].numpy().tobytes())
        return Shard(tensors["features"], tensors["ids"], [Unreadable(*line) for line in unreadable])

    def rows(self) -> int:
        return sum(int(path.name.split("-")[1]) for path in self.files().values())


def _digest(path: Path) -> str:
    return path.stem.rpartition("-")[2]
