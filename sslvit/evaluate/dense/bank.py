"""Features of the training images' patches with their classes: in memory, or above a limit in a file that is mapped."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sslvit import rng
from sslvit.errors import DataError, NoInput
from sslvit.evaluate.dense.windows import Seen, patch_classes


class Bank(NamedTuple):
    """A row for each patch, those of an image one after another."""

    features: Tensor  # n d, float32 or float16; perhaps of a mapped file
    shares: Tensor  # n classes: of the patch's pixels, float16
    images: Tensor  # n: which image, counted from 0, ascending

    @property
    def classes(self) -> Tensor:
        """The most frequent class of each patch: n"""
        return self.shares.argmax(-1)

    def before(self, image: int) -> "Bank":
        rows = slice(0, int((self.images < image).sum()))
        return Bank(*(part[rows] for part in self))

    def since(self, image: int) -> "Bank":
        rows = slice(int((self.images < image).sum()), None)
        return Bank(*(part[rows] for part in self))


class Rows:
    """Rows that come one after another, in memory or in a file."""

    def __init__(self, file: Path | None):
        self.file, self.kept, self.shape = file, list[Tensor](), torch.empty(0, 0)
        self.writing = file.open("wb") if file else None

    def add(self, rows: Tensor) -> None:
        self.shape = rows[:0]
        if self.writing:
            self.writing.write(rows.contiguous().numpy().data)
        else:
            self.kept.append(rows)

    def whole(self) -> Tensor:
        if not self.writing:
            return torch.cat(self.kept)
        self.writing.close()
        # Opened for writing, since torch warns of tensors that cannot be; nothing writes to it.
        assert self.file
        mapped = np.memmap(self.file, self.shape.numpy().dtype, "r+").reshape(-1, self.shape.shape[1])
        return torch.from_numpy(mapped)


def fill(
    seen: Iterable[Seen],
    images: int,
    classes: int,
    *,
    folder: Path | None,
    patches: int = 0,
    memory: float = 2e9,
    half: bool = False,
) -> Bank:
    """patches: at most this many in all, the same number per image, drawn at random; 0 takes all. memory: bytes above
    which features and classes are written to files in the folder, and mapped from them."""
    each = max(1, patches // images) if patches else 0
    dtype = torch.float16 if half else torch.float32
    features, shares, numbers = Rows(None), Rows(None), list[Tensor]()
    for number, (windows, maps) in enumerate(seen):
        grid = maps.shape[1], maps.shape[2]
        known = patch_classes(windows.labels, grid, classes).flatten(0, 2)
        rows = known.any(-1).nonzero().squeeze(-1)
        if each and len(rows) > each:
            order = rng.permutation(rng.key("patches", torch.tensor([windows.id])), len(rows))[0]
            rows = rows[order[:each].sort().values]
        if number == 0:
            total = images * (each or len(known)) * (maps.shape[-1] * dtype.itemsize + 2 * classes)
            if total > memory and folder:
                check_room(folder, total)
                features, shares = Rows(folder / "features"), Rows(folder / "classes")
        features.add(rearrange(maps, "k h w d -> (k h w) d")[rows].to(dtype))
        shares.add(known[rows].half())
        numbers.append(torch.full((len(rows),), number))
    if not sum(map(len, numbers)):
        raise DataError("all pixels of the training masks are ignored: there is no patch to learn from")
    return Bank(features.whole(), shares.whole(), torch.cat(numbers))


def check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise NoInput(
            f"the patch features take {size / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: take fewer "
            "by --patches, or half of it by --half"
        )
