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

    def __init__(self, file: Path | None = None, rows: Iterable[Tensor] = ()):
        self.file, self.kept, self.empty, self.size = file, list[Tensor](), torch.empty(0, 0), 0
        self.writing = file.open("wb") if file else None
        for some in rows:
            self.add(some)

    def add(self, rows: Tensor) -> None:
        self.empty, self.size = rows[:0], self.size + rows.nbytes
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
        mapped = np.memmap(self.file, self.empty.numpy().dtype, "r+").reshape(-1, self.empty.shape[1])
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
    features, shares, numbers = Rows(), Rows(), list[Tensor]()
    for number, (windows, maps) in enumerate(seen):
        grid = maps.shape[1], maps.shape[2]
        known = patch_classes(windows.labels, grid, classes).flatten(0, 2)
        rows = known.any(-1).nonzero().squeeze(-1)
        if each and len(rows) > each:
            order = rng.permutation(rng.key("patches", torch.tensor([windows.id])), len(rows))[0]
            rows = rows[order[:each].sort().values]
        found = rearrange(maps, "k h w d -> (k h w) d")[rows].to(dtype)
        if half and not found.isfinite().all():
            raise DataError(f"patch features of image {windows.id} are beyond what float16 can hold: leave out --half")
        features.add(found)
        shares.add(known[rows].half())
        numbers.append(torch.full((len(rows),), number))
        stored = features.size + shares.size
        expected = stored / (number + 1) * images  # as many from each of the others
        if folder and expected > memory:
            check_room(folder, expected, expected - stored * bool(features.file), half)
            if not features.file:
                features, shares = Rows(folder / "features", features.kept), Rows(folder / "classes", shares.kept)
    if not sum(map(len, numbers)):
        raise DataError("all pixels of the training masks are ignored: there is no patch to learn from")
    return Bank(features.whole(), shares.whole(), torch.cat(numbers))


def check_room(folder: Path, size: float, missing: float, half: bool) -> None:
    """size: in bytes, when all is there. missing: of it."""
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise NoInput(
            f"the patch features take {size / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: take fewer "
            f"by --patches{'' if half else ', or half of it by --half'}"
        )
