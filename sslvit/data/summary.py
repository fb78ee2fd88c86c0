"""A summary of a source before a long run: how many images, how large, which labels, what is wrong, the cost.

Statistics of the images are from a sample that is spread over the set and takes a few seconds, for a million images
too.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

from sslvit.data.cache import cache_root, decoded_bytes
from sslvit.data.image import ImageError, levels, measure
from sslvit.data.levels import Levels
from sslvit.data.readers.encoded import EncodedSource, spread_ids
from sslvit.data.source import ArraySource, Samples, ShapesSource, Source, digest
from sslvit.data.subset import Subset
from sslvit.storage import durable
from sslvit.views.batching import Size, to_pair

SAMPLE, AT_ONCE = 512, 64  # images
SECONDS = 5.0  # for the sample, and the same for comparing files
PAIRS = 500  # of files of one size, compared
PICTURED = 64
SLOW = 50  # images per second on one core
GREY = ("1", "L", "LA", "I;16", "I;16B")


class Summary:
    """The labels and files of a source, and what a sample of its images shows."""

    def __init__(self, source: Source, *, image_size: Size, batch_size: int, canvas: int = 0):
        """canvas: the side that the smallest crops of the views would need, 0 if unknown."""
        self.source, self.image_size, self.batch_size, self.crop_canvas = (
            source,
            to_pair(image_size),
            batch_size,
            canvas,
        )
        # The encoded images, also of a source that reads them from the cache.
        files = source.decoded_from if isinstance(source, ArraySource) else source
        self.files = files if isinstance(files, EncodedSource) else None
        self.images, self.decoded_bytes = len(source), decoded_bytes(source)
        self.stored_bytes = self.decoded_bytes if self.files is None else int(self.files.store.sizes.sum())
        self.class_sizes: dict[str, int] = {}
        if source.labels is not None:
            counts = np.bincount(source.labels).tolist()
            names = source.classes or map(str, range(len(counts)))
            self.class_sizes = {name: count for name, count in zip(names, counts, strict=False) if count}
        self.sampled = 0
        self.sizes: Counter[tuple[int, int]] = Counter()  # (height, width) in the sample
        self.kinds: Counter[str] = Counter()  # e.g. "JPEG RGB"
        self.levels: Levels | None = None  # of images of more than 8 bits
        self.hashes: Counter[str] = Counter()
        self.reasons: list[str] = []  # why images of the sample cannot be used
        self._sample()
        self.unreadable, self.compared = len(self.reasons), self.hashes.total()
        self.duplicates = self.compared - len(self.hashes)
        self.advice = (*self._advice(), *self._canvas_advice())

    def text(self) -> str:
        """For a terminal."""
        heights, widths = zip(*(self.sizes or {(0, 0): 0}), strict=True)
        one = f"{heights[0]} x {widths[0]}"
        several = f"{min(heights)} to {max(heights)} high, {min(widths)} to {max(widths)} wide"
        height, width = self.source.canvas
        skipped = "nothing" if self.files is None else str(self.files.store.skipped)
        existing = next(folder for folder in (cache_root(), *cache_root().absolute().parents) if folder.exists())
        lines = {
            "images": f"{self.images:,}, read at {self.per_second:,.0f} per second on one core",
            "sizes": one if len(self.sizes) == 1 else several,
            "canvas": f"{self.source.channels} x {height} x {width}",
            "kinds": ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common()),
            "values": self._values(),
            "classes": self._classes(),
            "unreadable": "; ".join((f"{self.unreadable:,} of {self.sampled:,} sampled", *self.reasons[:3])),
            "not read": skipped,
            "duplicates": f"{self.duplicates:,} of {self.compared:,} compared",
            "disk": f"{self.stored_bytes / 1e6:,.1f} MB stored, {self.decoded_bytes / 1e6:,.1f} MB decoded, "
            f"{shutil.disk_usage(existing).free / 1e6:,.0f} MB free at {cache_root()}",
        }
        listed = [f"  {title:<11} {line}" for title, line in lines.items() if line]
        return "\n".join([self.source.name, *listed, *(f"  ! {sentence}" for sentence in self.advice)])

    def _values(self) -> str:
        if self.levels is None:
            return ""
        low, high = (self.files and self.files.span) or (0, self.levels.full)
        return f"{self.levels} in images of more than 8 bits; {low:,.7g} becomes black, {high:,.7g} white"

    def _classes(self) -> str:
        sizes = self.class_sizes
        if not sizes:
            return f"none: {self.source.unlabelled}"
        least, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        if sizes[least] == sizes[most]:
            return f"{len(sizes):,}, {sizes[least]:,} images each"
        return f"{len(sizes):,}, from {sizes[least]:,} images ({least}) to {sizes[most]:,} ({most})"

    def _sample(self) -> None:
        ids = np.random.default_rng(0).permutation(spread_ids(self.images, SAMPLE))
        start = time.perf_counter()
        if self.files is None:
            self._look_at_arrays(ids)
        else:
            for id in ids.tolist():
                self._look_at_file(self.files, id)
                self.sampled += 1
                if time.perf_counter() - start > SECONDS:
                    break
            ids = ids[: self.sampled]
            if self.source is not self.files:  # the speed of the cache
                start = time.perf_counter()
                self.source.read(ids)
        self.per_second = self.sampled / (time.perf_counter() - start)  # images on one core
        if self.files is not None:
            self._compare(self.files, set(ids.tolist()))

    def _look_at_file(self, files: EncodedSource, id: int) -> None:
        try:
            data = files.store.read(id, files.max_pixels)
            self._hash(data)
            form, mode, height, width = measure(data, files.max_pixels)
            files.decode(data)
            if seen := levels(data, files.max_pixels):
                self.levels = seen.merged(self.levels)
        except ImageError as error:
            self.reasons.append(f"{files.store.where(id)}: {error}")
            return
        self.sizes[height, width] += 1
        self.kinds[f"{form} {mode}"] += 1

    def _look_at_arrays(self, ids: np.ndarray) -> None:
        whole = self.source
        while isinstance(whole, Subset):
            whole = whole.inner
        kind, self.sampled = "drawn" if isinstance(whole, ShapesSource) else "decoded", len(ids)
        for some in np.split(ids, range(AT_ONCE, len(ids), AT_ONCE)):
            samples = self.source.read(some)
            self.reasons += [f"{line.path}: {line.reason}" for line in samples.bad]
            replaced = {line.id for line in samples.bad}
            sizes = samples.extents.tolist()
            for id, pixels, (height, width) in zip(some.tolist(), samples.pixels.numpy(), sizes, strict=True):
                if id not in replaced:
                    self._hash(pixels.data)
                    self.sizes[height, width] += 1
                    self.kinds[kind] += 1

    def _compare(self, files: EncodedSource, known: set[int]) -> None:
        """Duplicates are rare in any sample of a large set, but they have one size: compare files that do."""
        sizes = files.store.sizes
        order = np.argsort(sizes, kind="stable")
        twins = np.flatnonzero(sizes[order][1:] == sizes[order][:-1])
        twins = twins[spread_ids(len(twins), PAIRS)] if len(twins) else twins
        start = time.perf_counter()
        for id in np.unique(order[np.concatenate([twins, twins + 1])]).tolist():
            if id in known:
                continue
            try:
                self._hash(files.store.read(id, files.max_pixels))
            except ImageError:
                continue
            if time.perf_counter() - start > SECONDS:
                break

    def _hash(self, data: bytes | memoryview) -> None:
        self.hashes[digest(data)] += 1

    def _advice(self) -> Iterator[str]:
        if self.unreadable == self.sampled:
            yield "not one sampled image can be read"
        if self.images < self.batch_size:
            yield f"{self.images:,} images are fewer than a batch of {self.batch_size:,}: every step repeats some"
        height, width = self.image_size
        if small := sum(count for (h, w), count in self.sizes.items() if h < height or w < width):
            shown = height if height == width else f"{height} x {width}"
            yield f"{small:,} of {self.sampled:,} sampled images are smaller than {shown} pixels: views enlarge them"
        if any(min(size) == 1 for size in self.sizes):
            yield "images one pixel high or wide have nothing to learn from"
        if alone := sum(count == 1 for count in self.class_sizes.values()):
            classes, they = ("class has", "it") if alone == 1 else ("classes have", "they")
            yield f"{alone:,} {classes} one image: {they} cannot be both learned and tested"
        if self.source.channels == 3 and self.kinds and all(kind.split()[-1] in GREY for kind in self.kinds):
            yield "all sampled images are grey: --channels 1 costs less"
        if self.per_second < SLOW:
            yield "reading is slow: store the images smaller, once"
        if self.duplicates:
            yield "some images are duplicates: none of them should be in both the training and the test set"

    def _canvas_advice(self) -> Iterator[str]:
        """Where images are reduced so far that the smallest crops are enlarged, which the papers' pipelines, cutting
        before they reduce, do not have."""
        if self.files is None or self.crop_canvas <= max(self.files.canvas):
            return
        height, width = self.files.canvas
        if reduced := sum(count for (h, w), count in self.sizes.items() if h > height or w > width):
            yield (
                f"{reduced:,} of {self.sampled:,} sampled images are reduced to the canvas of {height} x {width} "
                f"pixels before views are cut: the smallest crops are enlarged and not sharp. --canvas "
                f"{self.crop_canvas} keeps their pixels, for {(self.crop_canvas / max(height, width)) ** 2:.1f} times "
                "the memory"
            )


def contact_sheet(samples: Samples, file: Path) -> None:
    """A PNG of the first images of a batch, as the source gives them, eight a row."""
    pixels = samples.pixels[:PICTURED].numpy()
    pixels = np.pad(pixels, ((0, -len(pixels) % 8), (0, 0), (1, 1), (1, 1)))
    grid = rearrange(pixels, "(rows columns) c H W -> (rows H) (columns W) c", columns=8)
    durable.replace_picture(file, Image.fromarray(grid[..., 0] if grid.shape[-1] != 3 else grid))
