"""Sources of images by number, and the two that need not decode: arrays, and the built-in shapes."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from math import gcd
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from sslvit.data.labels import Labels, no_labels
from sslvit.data.readers import shapes
from sslvit.errors import DataError

IN_MEMORY = 1 << 28  # bytes: a built-in set up to this size is drawn once, a larger one whenever it is read


def digest(*pieces: bytes | memoryview, size: int = 16) -> str:
    """The hash of fingerprints: blake2b of all pieces in sequence."""
    content = hashlib.blake2b(digest_size=size)
    for piece in pieces:
        content.update(piece)
    return content.hexdigest()


class Unreadable(NamedTuple):
    """An image that cannot be used, and its substitute."""

    id: int
    path: str
    reason: str
    substitute: int


class Samples(NamedTuple):
    pixels: Tensor  # uint8 b c H W: a canvas with the image in its top left corner, zero elsewhere
    extents: Tensor  # int64 b 2: the height and width of the image on the canvas
    ids: Tensor  # int64 b: as requested, also of substituted images, because ids key all randomness
    labels: Tensor | None  # int64 b: of the image that is shown
    bad: Sequence[Unreadable] = ()  # a tuple, which torch's DataLoader makes a list


class Images(ABC):
    """The images of a source, or of a stream (stream.py)."""

    name: str
    channels: int
    canvas: tuple[int, int]  # height, width of the pixels of Samples
    labels: np.ndarray | None  # int64, one per image
    classes: tuple[str, ...] | None  # the labels' names
    unlabelled: str  # why there are no labels

    @abstractmethod
    def __len__(self) -> int:
        """Images of one pass."""

    def required_labels(self) -> np.ndarray:
        if self.labels is None:
            raise DataError(f"{self.name} has no usable labels: {self.unlabelled}")
        return self.labels


class Source(Images):
    """Images 0 .. len - 1. It is pickled for loader workers, so it has the names of files, not open ones."""

    fingerprint: str  # changes when the set does

    @property
    def version(self) -> str:
        """Changes also when only the pixels may differ: files written anew, or decoded otherwise."""
        return self.fingerprint

    @abstractmethod
    def read(self, ids: np.ndarray) -> Samples: ...


def substitutes(id: int, size: int) -> Iterator[int]:
    """Candidates to replace a bad image: every other id once, in an order that depends on the id alone, by steps of
    about the golden section of the set, which leave a damaged folder or shard."""
    step = next(step for step in range(max(1, round(size * 0.618)), 2 * size) if gcd(step, size) == 1)
    return ((id + turn * step) % size for turn in range(1, size))


def check_ids(ids: np.ndarray, size: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise ValueError(f"ids must be a vector of int64, got {ids.dtype} of shape {ids.shape}")
    if len(ids) and not (ids.min() >= 0 and ids.max() < size):
        raise ValueError(f"ids {ids.min()} to {ids.max()} of a source of {size} images")
    return ids


def whole(canvas: tuple[int, int], count: int) -> Tensor:
    """The extents of images that fill their canvas: b 2"""
    return repeat(torch.tensor(canvas), "two -> b two", b=count)


def room(side: int) -> int:
    """The side of a canvas that views of this size are cut from."""
    return -(-int(2.25 * side) // 32) * 32


class Mapped(NamedTuple):
    """A uint8 array n c H W inside a file, mapped into memory by every process that reads it."""

    file: Path
    offset: int
    shape: tuple[int, int, int, int]


class ArraySource(Source):
    """Images of one size in one uint8 array n c H W, in memory or mapped from a file. Reading is one gather."""

    def __init__(
        self,
        pixels: np.ndarray | Mapped,
        *,
        name: str,
        fingerprint: str,
        labels: Labels | None = None,
        bad: dict[int, tuple[str, str]] | None = None,  # id -> path, reason
        decoded_from: Source | None = None,
    ):
        if isinstance(pixels, np.ndarray) and (pixels.dtype != np.uint8 or pixels.ndim != 4):
            raise ValueError(f"pixels must be uint8 n c H W, got {pixels.dtype} of shape {pixels.shape}")
        size, self.channels, *canvas = pixels.shape
        self.labels, self.classes, self.unlabelled = labels or no_labels("none were given")
        if self.labels is not None and len(self.labels) != size:
            raise DataError(f"{name}: {len(self.labels)} labels for {size} images")
        self.name, self.fingerprint, self.canvas = name, fingerprint, tuple(canvas)
        self.bad, self.decoded_from = bad or {}, decoded_from
        if len(self.bad) == size:
            raise DataError(f"{name}: none of {size} images can be used, the first because: {self.bad[0][1]}")
        self._stored = pixels
        self._array: np.ndarray | None = None

    def __getstate__(self) -> dict:
        # A mapped array would be pickled as its whole content. Workers do not need what it was decoded from.
        return self.__dict__ | {"_array": None, "decoded_from": None}

    @property
    def version(self) -> str:
        return self.decoded_from.version if self.decoded_from else self.fingerprint

    @property
    def pixels(self) -> np.ndarray:
        if self._array is None:
            stored = self._stored
            if isinstance(stored, Mapped):
                stored = np.memmap(stored.file, np.uint8, "r", stored.offset, stored.shape)
            self._array = np.asarray(stored)
        return self._array

    def __len__(self) -> int:
        return self._stored.shape[0]

    def read(self, ids: np.ndarray) -> Samples:
        ids = check_ids(ids, len(self))
        shown = ids
        bad: tuple[Unreadable, ...] = ()
        if self.bad:
            bad = tuple(Unreadable(id, *self.bad[id], self._substitute(id)) for id in ids.tolist() if id in self.bad)
            shown = ids.copy()
            for line in bad:
                shown[ids == line.id] = line.substitute
        return Samples(
            pixels=torch.from_numpy(self.pixels[shown]),
            extents=whole(self.canvas, len(ids)),
            ids=torch.from_numpy(ids.copy()),
            labels=None if self.labels is None else torch.from_numpy(self.labels[shown]),
            bad=bad,
        )

    def _substitute(self, id: int) -> int:
        return next(other for other in substitutes(id, len(self)) if other not in self.bad)


class ShapesSource(Source):
    """The built-in set. Ids are counted from `first`, so that two splits share no image."""

    channels = 3
    unlabelled = ""

    def __init__(self, size: int, *, image_size: int, first: int, by: str):
        ids = torch.arange(first, first + size)
        self.first, self.image_size = first, image_size
        self.canvas = (image_size, image_size)
        label = {"shape": shapes.shape_label, "texture": shapes.texture_label}[by]
        self.labels: np.ndarray = label(ids).numpy()
        self.classes = {"shape": shapes.SHAPES, "texture": shapes.TEXTURES}[by]
        self.name = f"shapes ({size:,} labelled by {by})"
        self.fingerprint = f"shapes:{first}+{size}@{image_size}"
        self.small, self._drawn = size * 3 * image_size**2 <= IN_MEMORY, None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> Samples:
        ids = check_ids(ids, len(self))
        wanted = torch.from_numpy(ids.copy())
        if self.small and self._drawn is None:
            self._drawn = shapes.make(torch.arange(self.first, self.first + len(self)), self.image_size)
        return Samples(
            pixels=shapes.make(wanted + self.first, self.image_size) if self._drawn is None else self._drawn[wanted],
            extents=whole(self.canvas, len(ids)),
            ids=wanted,
            labels=torch.from_numpy(self.labels[ids]),
        )
