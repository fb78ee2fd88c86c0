"""A look at a source before a long run: how many images, how large, which labels, what is wrong, what it will cost.

What needs the images themselves is taken from a sample that is spread over the set and ends after a few seconds, so a
million images take no longer.
"""

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

from sslvit.data.cache import cache_root, decoded_bytes
from sslvit.data.image import BadImage, levels, measure
from sslvit.data.levels import Levels
from sslvit.data.readers.encoded import EncodedSource, Store, sample_ids
from sslvit.data.source import ArraySource, Samples, ShapesSource, Source
from sslvit.data.subset import Subset
from sslvit.storage import durable
from sslvit.views.batching import Size, to_pair

SAMPLE = 512  # images
SECONDS = 5.0  # for the sample, and as long again for comparing files
PAIRS = 500  # of files of one size, compared
PICTURED = 64
SLOW = 50  # images a second on one core
GREY = ("1", "L", "LA", "I;16", "I;16B")


@dataclass(frozen=True)
class Report:
    name: str
    images: int
    sampled: int
    sizes: dict[tuple[int, int], int]  # (height, width) in the sample, and how many
    kinds: dict[str, int]  # e.g. "JPEG RGB"
    levels: str  # the values of images of more than 8 bits
    channels: int  # as the source gives them
    canvas: tuple[int, int]
    class_sizes: dict[str, int]  # images of each class
    unlabelled: str  # why there are no classes
    duplicates: int  # of `compared`, those whose bytes another one has too
    compared: int
    unreadable: int  # of the sample
    reasons: tuple[str, ...]  # the first few
    skipped: str  # what lies among the images and is not read
    stored_bytes: int  # all images as they are
    decoded_bytes: int  # all images as uint8 on their canvas
    free_bytes: int  # where the cache lies
    per_second: float  # images read on one core
    advice: tuple[str, ...]

    def text(self) -> str:
        """For a terminal."""
        heights, widths = zip(*(self.sizes or {(0, 0): 0}), strict=True)
        one = f"{heights[0]} x {widths[0]}"
        several = f"{min(heights)} to {max(heights)} high, {min(widths)} to {max(widths)} wide"
        classes = f"none: {self.unlabelled}"
        if self.class_sizes:
            least, most = (pick(self.class_sizes, key=self.class_sizes.__getitem__) for pick in (min, max))
            spread = f"{self.class_sizes[least]:,} images ({least}) to {self.class_sizes[most]:,} ({most})"
            alike = f"{self.class_sizes[least]:,} images each"
            even = self.class_sizes[least] == self.class_sizes[most]
            classes = f"{len(self.class_sizes):,}, {alike if even else f'from {spread}'}"
        lines = {
            "images": f"{self.images:,}, read at {self.per_second:,.0f} a second on one core",
            "sizes": one if len(self.sizes) == 1 else several,
            "canvas": f"{self.channels} x {self.canvas[0]} x {self.canvas[1]}",
            "kinds": ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items()),
            "values": self.levels,
            "classes": classes,
            "unreadable": "; ".join((f"{self.unreadable:,} of {self.sampled:,} sampled", *self.reasons)),
            "not read": self.skipped,
            "duplicates": f"{self.duplicates:,} of {self.compared:,} compared",
            "disk": f"{self.stored_bytes / 1e6:,.1f} MB stored, {self.decoded_bytes / 1e6:,.1f} MB decoded, "
            f"{self.free_bytes / 1e6:,.0f} MB free at {cache_root()}",
        }
        told = [f"  {title:<11} {line}" for title, line in lines.items() if line]
        return "\n".join([self.name, *told, *(f"  ! {sentence}" for sentence in self.advice)])


def preflight(source: Source, *, image_size: Size, batch_size: int, canvas: int = 0) -> Report:
    """canvas: the side that the smallest crops of the views would need, 0 if nobody knows."""
    files = _files(source)
    look = _Look(source, files)
    class_sizes = {}
    if source.labels is not None:
        counts = np.bincount(source.labels).tolist()
        names = (source.classes or [str(number) for number in range(len(counts))])[: len(counts)]
        class_sizes = {name: count for name, count in zip(names, counts, strict=True) if count}
    decoded = decoded_bytes(source)
    existing = next(folder for folder in (cache_root(), *cache_root().absolute().parents) if folder.exists())
    return Report(
        name=source.name,
        images=len(source),
        sampled=look.sampled,
        sizes=dict(look.sizes.most_common()),
        kinds=dict(look.kinds.most_common()),
        levels=_levels(look, files),
        channels=source.channels,
        canvas=source.canvas,
        class_sizes=class_sizes,
        unlabelled=source.unlabelled,
        duplicates=sum(look.hashes.values()) - len(look.hashes),
        compared=sum(look.hashes.values()),
        unreadable=len(look.reasons),
        reasons=tuple(look.reasons[:3]),
        skipped="nothing" if files is None else str(files.store.skipped),
        stored_bytes=decoded if files is None else int(files.store.sizes.sum()),
        decoded_bytes=decoded,
        free_bytes=shutil.disk_usage(existing).free,
        per_second=look.sampled / look.seconds,
        advice=(*_advice(source, look, class_sizes, image_size, batch_size), *_canvas_advice(look, files, canvas)),
    )


def _levels(look: "_Look", files: EncodedSource | None) -> str:
    if look.levels is None:
        return ""
    span = (files and files.span) or (0, look.levels.full)
    return f"{look.levels} in images of more than 8 bits; {span[0]:,.7g} becomes black, {span[1]:,.7g} white"


def _files(source: Source) -> EncodedSource | None:
    """The encoded images, also of a source that reads them from the cache."""
    decoded = source.decoded_from if isinstance(source, ArraySource) else source
    return decoded if isinstance(decoded, EncodedSource) else None


class _Look:
    """What the sample shows."""

    def __init__(self, source: Source, files: EncodedSource | None):
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.kinds: Counter[str] = Counter()
        self.levels: Levels | None = None
        self.hashes: Counter[bytes] = Counter()
        self.reasons: list[str] = []
        self.sampled = 0
        ids = np.random.default_rng(0).permutation(sample_ids(len(source), SAMPLE))
        start = time.perf_counter()
        if files is None:
            self._arrays(source, ids)
        else:
            for id in ids.tolist():
                self._encoded(files, id)
                self.sampled += 1
                if time.perf_counter() - start > SECONDS:
                    break
            ids = ids[: self.sampled]
            if source is not files:  # its speed is the cache's
                start = time.perf_counter()
                source.read(ids)
        self.seconds = time.perf_counter() - start
        if files is not None:
            self._compare(files.store, set(ids.tolist()), files.max_pixels)

    def _encoded(self, source: EncodedSource, id: int) -> None:
        try:
            data = source.store.read(id, source.max_pixels)
            self.hashes[hashlib.blake2b(data, digest_size=16).digest()] += 1
            form, mode, height, width = measure(data, source.max_pixels)
            source.decode(data)
            if seen := levels(data, source.max_pixels):
                self.levels = seen.with_(self.levels)
        except BadImage as error:
            self.reasons.append(f"{source.store.where(id)}: {error}")
            return
        self.sizes[height, width] += 1
        self.kinds[f"{form} {mode}"] += 1

    def _arrays(self, source: Source, ids: np.ndarray) -> None:
        samples = source.read(ids)
        replaced = {line.id for line in samples.bad}
        self.sampled = len(ids)
        self.reasons = [f"{line.path}: {line.reason}" for line in samples.bad]
        for id, pixels in zip(ids.tolist(), samples.pixels.numpy(), strict=True):
            if id not in replaced:
                self.hashes[hashlib.blake2b(pixels, digest_size=16).digest()] += 1
        self.sizes[source.canvas] = len(ids) - len(replaced)
        whole = source
        while isinstance(whole, Subset):
            whole = whole.inner
        self.kinds["drawn" if isinstance(whole, ShapesSource) else "decoded"] = len(ids) - len(replaced)

    def _compare(self, store: Store, known: set[int], max_pixels: int) -> None:
        """Duplicates are rare in any sample of a large set, but they have one size: compare files that do."""
        order = np.argsort(store.sizes, kind="stable")
        twins = np.flatnonzero(store.sizes[order][1:] == store.sizes[order][:-1])
        twins = twins[sample_ids(len(twins), PAIRS)] if len(twins) else twins
        start = time.perf_counter()
        for id in np.unique(order[np.concatenate([twins, twins + 1])]).tolist():
            if id in known:
                continue
            try:
                data = store.read(id, max_pixels)
            except BadImage:
                continue
            self.hashes[hashlib.blake2b(data, digest_size=16).digest()] += 1
            if time.perf_counter() - start > SECONDS:
                break


def _advice(
    source: Source, look: _Look, class_sizes: dict[str, int], image_size: Size, batch_size: int
) -> Iterator[str]:
    if len(look.reasons) == look.sampled:
        yield "not one sampled image can be read"
    if len(source) < batch_size:
        yield f"{len(source):,} images are fewer than a batch of {batch_size:,}: every step repeats some"
    height, width = to_pair(image_size)
    small = sum(count for (h, w), count in look.sizes.items() if h < height or w < width)
    if small:
        shown = height if height == width else f"{height} x {width}"
        yield f"{small:,} of {look.sampled:,} sampled images are smaller than {shown} pixels: views enlarge them"
    if any(min(size) == 1 for size in look.sizes):
        yield "images one pixel high or wide have nothing to learn from"
    alone = sum(count == 1 for count in class_sizes.values())
    if alone:
        yield f"{alone:,} classes have one image: they cannot be both learned and tested"
    if source.channels == 3 and look.kinds and all(kind.split()[-1] in GREY for kind in look.kinds):
        yield "all sampled images are grey: --channels 1 costs less"
    if look.sampled / look.seconds < SLOW:
        yield "reading is slow: store the images smaller, once"
    if look.hashes.total() > len(look.hashes):
        yield "some images are duplicates: none of them should be in both the training and the test set"


def _canvas_advice(look: _Look, files: EncodedSource | None, canvas: int) -> Iterator[str]:
    """Where images are reduced so far that the smallest crops are enlarged, which the papers' pipelines, cutting before
    they reduce, do not have."""
    if files is None or canvas <= max(files.canvas):
        return
    reduced = sum(n for (h, w), n in look.sizes.items() if h > files.canvas[0] or w > files.canvas[1])
    if reduced:
        yield (
            f"{reduced:,} of {look.sampled:,} sampled images are reduced to the canvas of {files.canvas[0]} x "
            f"{files.canvas[1]} pixels before views are cut: the smallest crops are enlarged and not sharp. --canvas "
            f"{canvas} keeps their pixels, for {(canvas / max(files.canvas)) ** 2:.1f} times the memory"
        )


def contact_sheet(samples: Samples, file: Path) -> None:
    """A PNG of the first images of a batch, as the source gives them, eight a row."""
    pixels = samples.pixels[:PICTURED].numpy()
    pixels = np.pad(pixels, ((0, -len(pixels) % 8), (0, 0), (1, 1), (1, 1)))
    grid = rearrange(pixels, "(rows columns) c H W -> (rows H) (columns W) c", columns=8)
    durable.replace_picture(file, Image.fromarray(grid[..., 0] if grid.shape[-1] != 3 else grid))
