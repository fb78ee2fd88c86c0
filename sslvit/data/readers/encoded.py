"""Images that are decoded as they are read: in the loader's workers, at reduced size, onto a canvas of one size."""

import json
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch

from sslvit.data.image import MAX_PIXELS, ImageError, fitted, levels, measure, open_image
from sslvit.data.levels import Levels, Span
from sslvit.data.readers.folders import Skipped
from sslvit.data.source import Samples, Source, Unreadable, check_ids, substitutes
from sslvit.errors import DataError

TRIES = 1000  # substitutes tried for one bad image before the set is called unusable
reading: tuple[Any, int] = None, 0  # in a loader's worker: a shared array of the images being read, and its index


class Store(Protocol):
    """Encoded images by number, wherever they lie."""

    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    unlabelled: str
    sizes: np.ndarray  # int64: bytes of each
    skipped: Skipped
    fingerprint: str  # of the set, wherever it lies
    version: str  # of these very files: another when one was only touched, or lies elsewhere

    def __len__(self) -> int: ...

    def where(self, id: int) -> str: ...  # for people

    def read(self, id: int, max_pixels: int) -> bytes: ...  # or ImageError


class EncodedSource(Source):
    """Decodes what a store holds. An image larger than the canvas is scaled down to lie within it, whole."""

    def __init__(
        self,
        store: Store,
        *,
        name: str,
        canvas: tuple[int, int],
        channels: int = 3,
        max_pixels: int = MAX_PIXELS,
        span: Span | None = None,
    ):
        self.store, self.name, self.canvas = store, name, canvas
        self.channels, self.max_pixels, self.span = channels, max_pixels, span
        self.labels, self.classes, self.unlabelled = store.labels, store.classes, store.unlabelled
        self.fingerprint = store.fingerprint

    def __len__(self) -> int:
        return len(self.store)

    @property
    def version(self) -> str:
        read = [self.store.version, self.channels, self.canvas, self.max_pixels]
        return json.dumps(read + ([self.span] if self.span else []))

    def image(self, id: int) -> torch.Tensor:
        """One image, or ImageError: c h w"""
        return self.decode(self.store.read(id, self.max_pixels))

    def decode(self, data: bytes) -> torch.Tensor:
        return open_image(data, channels=self.channels, max_pixels=self.max_pixels, fit=self.canvas, span=self.span)

    def read(self, ids: np.ndarray) -> Samples:
        ids = check_ids(ids, len(self))
        # From numpy, which asks the system for large pages: to get small ones takes longer than to fill them.
        pixels = torch.from_numpy(np.empty((len(ids), self.channels, *self.canvas), np.uint8))
        extents = torch.empty(len(ids), 2, dtype=torch.int64)
        shown, bad = ids.copy(), []
        current, worker = reading
        for slot, id in enumerate(ids.tolist()):
            if current is not None:
                current[worker] = id
            try:
                image = self.image(id)
            except ImageError as error:
                shown[slot], image = self._substitute(id, str(error))
                bad.append(Unreadable(id, self.store.where(id), str(error), int(shown[slot])))
            _, height, width = image.shape
            pixels[slot, :, :height, :width] = image
            pixels[slot, :, height:] = 0
            pixels[slot, :, :height, width:] = 0
            extents[slot, 0], extents[slot, 1] = height, width
        return Samples(
            pixels=pixels,
            extents=extents,
            ids=torch.from_numpy(ids.copy()),
            labels=None if self.labels is None else torch.from_numpy(self.labels[shown]),
            bad=tuple(bad),
        )

    def _substitute(self, id: int, last: str) -> tuple[int, torch.Tensor]:
        """last: why the image itself cannot be used."""
        tried = 0
        for other in islice(substitutes(id, len(self)), TRIES):
            try:
                return other, self.image(other)
            except ImageError as error:
                tried, last = tried + 1, str(error)
        raise DataError(f"{self.name}: image {id} and {tried:,} substitutes cannot be used, the last because: {last}")


def spread_ids(size: int, count: int) -> np.ndarray:
    """At most count ids spread evenly over the set."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(np.int64))


def look_at_sample(
    store: Store, box: tuple[int, int], max_pixels: int, *, decode: bool
) -> tuple[tuple[int, int], bool, Levels | None]:
    """The canvas: the box, or less where the images, by a sample, all have one size: padding costs time in every later
    step. Whether they lie on it unreduced. The values in files of more than eight bits, if decoded."""
    fitting, sizes, seen = set(), set(), None
    for id in spread_ids(len(store), 64).tolist():
        try:
            data = store.read(id, max_pixels)
            _, _, height, width = measure(data, max_pixels)
            fitting.add(fitted(height, width, box))
            sizes.add((height, width))
            here = levels(data, max_pixels) if decode else None
        except ImageError:
            continue
        seen = here.merged(seen) if here else seen
    canvas = fitting.pop() if len(fitting) == 1 else box
    return canvas, sizes == {canvas}, seen
