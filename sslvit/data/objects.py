"""Images that a program holds already: arrays, datasets of torch and of Hugging Face, lists of pictures."""

import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from xxhash import xxh3_128

from sslvit.data.image import MAX_PIXELS, ImageError
from sslvit.data.labels import Labels, no_labels, to_class_numbers
from sslvit.data.levels import Span
from sslvit.data.readers.arrays import as_uint8
from sslvit.data.readers.columns import ReadOptions
from sslvit.data.readers.encoded import EncodedSource, spread_ids
from sslvit.data.readers.folders import Skipped
from sslvit.data.readers.tables import TableStore, choose_split, hub_caches, open_table
from sslvit.data.source import ArraySource, Source, digest
from sslvit.data.spec import on_canvas
from sslvit.errors import DataError, NoInput
from sslvit.processes.progress import progress_bar

KEPT = 1 << 30  # bytes: small images of one size are decoded into memory up to this size
EXACT = 0.1  # of a level: what a float may be off from n / 255; half precision is off by half of it
READ_TWICE = 8  # items that are compared with themselves
CHANNELS = (1, 3)
AS_THEY_ARE = "give images as they are, from 0 to 255: they are cropped, augmented and standardised later"


class How(NamedTuple):
    """How images are read."""

    box: int  # the side of the canvas at most
    channels: int | None = None
    max_pixels: int = MAX_PIXELS
    span: Span | None = None


def open_object(images: Any, labels: Any, options: ReadOptions, how: How) -> Source:
    """A source of an array, a torch Dataset or a sequence of images or pairs, or a datasets.Dataset."""
    if isinstance(images, np.ndarray | torch.Tensor):
        source: Source = of_array(images, labels, options, how)
    elif is_table(images):
        source = of_table(images, labels, options, how)
    elif isinstance(images, Sequence) or (isinstance(images, Dataset) and is_numbered(images)):
        source = of_items(images, labels, options, how)
    else:
        raise DataError(
            f"images are a {type(images).__name__}: give text like folder:/dir, an array, a Dataset of torch or of "
            "datasets with a length, or a list of images"
        )
    if how.channels not in (None, source.channels):
        raise DataError(f"channels {how.channels}: {source.name} has {source.channels}")
    return source


def is_numbered(dataset: Any) -> bool:
    """Whether a torch Dataset has a length, and items by number."""
    return hasattr(dataset, "__len__") and not isinstance(dataset, torch.utils.data.IterableDataset)


def one_split(options: ReadOptions, what: str) -> None:
    """Else the same images would be trained and tested on."""
    if options.split != "train":
        raise DataError(f"split {options.split!r}: {what} has no splits. Open the test images by themselves")


def given_labels(labels: Any, size: int, options: ReadOptions) -> Labels:
    """Those of the argument `labels`, which must be usable."""
    values = labels.numpy(force=True) if isinstance(labels, torch.Tensor) else labels
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise DataError(f"labels are {str(values)[:40]!r}, a {type(labels).__name__}: give one per image, in a list")
    values = values if isinstance(values, np.ndarray) else list(values)
    if len(values) != size:
        raise DataError(f"{len(values):,} labels for {size:,} images")
    found = to_class_numbers(values, "labels", options.classes, indexed=options.classes is not None)
    if found.numbers is None:
        raise DataError(found.problem)
    return found


# Arrays


def of_array(images: np.ndarray | torch.Tensor, labels: Any, options: ReadOptions, how: How) -> ArraySource:
    array = images.numpy(force=True) if isinstance(images, torch.Tensor) else images
    one_split(options, "an array")
    what = f"the array of shape {array.shape}"
    if array.dtype.kind == "f" and not how.span:
        array = exact_bytes(array, what)
    pixels = as_uint8(array, what, how.span)
    found = no_labels("labels= was not given") if labels is None else given_labels(labels, len(pixels), options)
    shape = " x ".join(map(str, pixels.shape[1:]))
    fingerprint = digest(pixels.data)
    return ArraySource(pixels, name=f"array ({len(pixels):,} x {shape})", fingerprint=fingerprint, labels=found)


def exact_bytes(values: np.ndarray, what: str) -> np.ndarray:
    """Floats that are n / 255, as ToTensor makes them of pixels, as these pixels. Others would have to be rounded."""
    result = np.empty(values.shape, np.uint8)
    for row in range(len(values)):
        scaled = values[row].astype(np.float64) * 255
        rounded = np.rint(scaled)
        if not (np.abs(scaled - rounded) < EXACT).all() or rounded.min() < 0 or rounded.max() > 255:
            raise DataError(
                f"{what} holds floats from {values[row].min():g} to {values[row].max():g} that are not n / 255: "
                f"{AS_THEY_ARE}. Floats in [0, 1] are rounded by (255 * images).round() as uint8"
            )
        result[row] = rounded
    return result


# Tables of `datasets`


def is_table(images: Any) -> bool:
    if "datasets" not in sys.modules:
        return False
    import datasets

    return isinstance(images, datasets.Dataset | datasets.DatasetDict)


def of_table(table: Any, labels: Any, options: ReadOptions, how: How) -> Source:
    import datasets

    if isinstance(table, datasets.DatasetDict):
        table = choose_split(table, options.split, "the DatasetDict")
    else:
        one_split(options, "one datasets.Dataset")
    own = hub_caches() + sorted({Path(file["filename"]).parent for file in table.cache_files})
    name = f"datasets.Dataset ({len(table):,} rows)"
    store = open_table(table, own, name, options)
    if isinstance(store, TableStore) and not table.cache_files:  # in memory: no file whose time and size would tell
        content = xxh3_128()
        for chunk in store.values.chunks:
            content.update(repr(chunk.to_pylist()).encode())
        store.fingerprint = store.version = f"{store.fingerprint}:{content.hexdigest()}"
    if labels is not None:
        store.labels, store.classes, store.unlabelled = given_labels(labels, len(store), options)
    return kept(*on_canvas(store, name, how.box, how.channels or 3, how.max_pixels, how.span))


# Datasets of torch


class ItemStore:
    """A dataset's images by number, each as a file without loss, so that all is done to them that is done to files."""

    def __init__(self, items: Any, labels: Any, options: ReadOptions):
        self.items, self.name, self.skipped = items, type(items).__name__, Skipped()
        if not len(items):
            raise NoInput(f"the {self.name} is empty")
        sizes, found, hashes = [], [], xxh3_128()
        before = {id: xxh3_128(self._item(id)[0]).digest() for id in spread_ids(len(items), READ_TWICE).tolist()}
        for id in progress_bar(range(len(items)), desc=f"reading {self.name}", delay=3, disable=None):
            data, label = self._item(id)
            hashes.update(one := xxh3_128(data).digest())
            if before.get(id, one) != one:
                raise DataError(
                    f"item {id} of the {self.name} is another image each time: leave out its random transforms, "
                    "views are drawn later"
                )
            sizes.append(len(data))
            found.append(label)
        self.sizes = np.array(sizes, np.int64)
        self.fingerprint = self.version = hashes.hexdigest()
        self.labels, self.classes, self.unlabelled = self._labels(found, labels, options)

    def _labels(self, found: list[Any], labels: Any, options: ReadOptions) -> Labels:
        if labels is not None:
            return given_labels(labels, len(self), options)
        known = [label for label in found if label is not None]
        if not known:
            return no_labels(f"the items of the {self.name} are images alone; give labels=")
        readable = (self.sizes > 0).tolist()
        if any(good and label is None for good, label in zip(readable, found, strict=True)):
            return no_labels(f"some items of the {self.name} have no label")
        # An item that cannot be read is replaced by another wherever it would be seen, with that one's label.
        filled = [known[0] if label is None else label for label in found]
        names = getattr(self.items, "classes", None)
        names = tuple(map(str, names)) if isinstance(names, Sequence) and not isinstance(names, str) else None
        classes = options.classes or names
        return to_class_numbers(filled, "labels", classes, indexed=classes is not None)

    def _item(self, id: int) -> tuple[bytes, Any]:
        """The image and the label, or nothing of an item that cannot be read."""
        try:
            return self._read(id)
        except ImageError:
            return b"", None

    def __len__(self) -> int:
        return len(self.items)

    def where(self, id: int) -> str:
        return f"item {id}"

    def read(self, id: int, max_pixels: int) -> bytes:
        return self._read(id)[0]

    def _read(self, id: int) -> tuple[bytes, Any]:
        try:
            item = self.items[id]
        except Exception as error:  # whatever a dataset raises for a broken file
            raise ImageError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        image, label = item[:2] if isinstance(item, tuple | list) and len(item) > 1 else (item, None)
        if isinstance(label, torch.Tensor | np.generic | np.ndarray) and label.ndim == 0:
            label = label.item()
        return as_file(image), label


def as_file(image: Any) -> bytes:
    """A picture or one image's array as the bytes of an image file, without loss."""
    if isinstance(image, torch.Tensor | np.ndarray):
        image = picture(image)
    if not isinstance(image, Image.Image):
        raise DataError(
            f"an item is a {type(image).__name__}: items must be images (of Pillow, arrays or tensors), or pairs of an "
            "image and a label"
        )
    form = "BMP" if image.mode in ("L", "RGB") else "TIFF" if image.mode in ("CMYK", "F", "I", "LAB") else "PNG"
    file = io.BytesIO()
    try:
        image.save(file, form)
    except Exception as error:  # pictures are decoded when they are first used
        raise ImageError(f"{type(error).__name__}: {error}") from error
    return file.getvalue()


def picture(values: torch.Tensor | np.ndarray) -> Image.Image:
    """c h w (as tensors are), h w c (as arrays are) or h w, of uint8, bool, or floats that are n / 255."""
    first = isinstance(values, torch.Tensor)
    array = values.numpy(force=True) if isinstance(values, torch.Tensor) else values
    what = f"an item, of shape {array.shape},"
    if array.ndim == 3:
        axes = [axis for axis in ((0, 2) if first else (2, 0)) if array.shape[axis] in CHANNELS]
        if not axes:
            raise DataError(f"{what} has neither 1 nor 3 channels")
        array = np.moveaxis(array, axes[0], 2)
        array = array[..., 0] if array.shape[2] == 1 else array
    elif array.ndim != 2:
        raise DataError(f"{what} is no image")
    if array.dtype.kind == "f":
        array = exact_bytes(array, what)
    elif array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype != np.uint8:
        raise DataError(f"{what} holds {array.dtype}: {AS_THEY_ARE}")
    return Image.fromarray(np.ascontiguousarray(array))


def of_items(items: Any, labels: Any, options: ReadOptions, how: How) -> Source:
    store = ItemStore(items, labels, options)
    one_split(options, f"a {store.name}")
    name = f"{store.name} ({len(store):,} images)"
    return kept(*on_canvas(store, name, how.box, how.channels or 3, how.max_pixels, how.span))


def kept(source: EncodedSource, small: bool) -> Source:
    """Small images of one size, decoded in memory."""
    shape = (len(source), source.channels, *source.canvas)
    if not small or np.prod(shape) > KEPT:
        return source
    pixels, bad = np.zeros(shape, np.uint8), {}
    for id in range(len(source)):
        try:
            image = source.image(id)
        except ImageError as error:
            bad[id] = (source.store.where(id), str(error))
            continue
        if image.shape[1:] != source.canvas:
            return source
        pixels[id] = image.numpy()
    found = Labels(source.labels, source.classes, source.unlabelled)
    return ArraySource(
        pixels, name=source.name, fingerprint=source.fingerprint, labels=found, bad=bad, decoded_from=source
    )
