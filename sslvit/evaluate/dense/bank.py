"""Features of the training images' patches with their classes: in memory, or above a limit in a file that is mapped."""

import os
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


def fill(
    seen: Iterable[Seen],
    images: int,
    classes: int,
    *,
    file: Path,
    patches: int = 0,
    memory: float = 2e9,
    half: bool = False,
) -> Bank:
    """patches: at most so many in all, equally many of each image, drawn at random; 0 takes all. memory: bytes of
    features above which they are written to the file, and mapped from it."""
    each = max(1, patches // images) if patches else 0
    kept: list[Tensor] = []
    shares: list[Tensor] = []
    numbers: list[Tensor] = []
    dtype, writing = torch.float16 if half else torch.float32, None
    for number, (windows, features) in enumerate(seen):
        grid = features.shape[1], features.shape[2]
        known = patch_classes(windows.labels, grid, classes).flatten(0, 2)
        rows = known.any(-1).nonzero().squeeze(-1)
        if each and len(rows) > each:
            order = rng.permutation(rng.key("patches", torch.tensor([windows.id])), len(rows))[0]
            rows = rows[order[:each].sort().values]
        chosen = rearrange(features, "k h w d -> (k h w) d")[rows].to(dtype)
        if number == 0:
            total = images * (each or len(features) * grid[0] * grid[1]) * features.shape[-1] * dtype.itemsize
            writing = _opened(file, total) if total > memory else None
        if writing:
            writing.write(chosen.numpy().data)
        else:
            kept.append(chosen)
        shares.append(known[rows].half())
        numbers.append(torch.full((len(rows),), number))
    if not sum(map(len, shares)):
        raise DataError("all pixels of the training masks are ignored: there is no patch to learn from")
    if writing:
        writing.close()
        width = features.shape[-1]
        # Opened for writing, since torch warns of tensors that cannot be; nothing writes to it.
        mapped = np.memmap(file, np.float16 if half else np.float32, "r+").reshape(-1, width)
        whole = torch.from_numpy(mapped)
    else:
        whole = torch.cat(kept)
    return Bank(whole, torch.cat(shares), torch.cat(numbers))


def _opened(file: Path, size: int):
    file.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(file.parent).free
    if size > free:
        raise NoInput(
            f"the patch features take {size / 1e9:.1f} GB in {file.parent}, where {free / 1e9:.1f} GB are free: take "
            "fewer by --patches, or half of it by --half"
        )
    return os.fdopen(os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), "wb")
