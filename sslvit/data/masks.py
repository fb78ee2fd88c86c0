"""Images whose pixels have classes. As `Samples` the mask is one more channel, so that readers, loaders and views carry
it with its image.

    shapes:scenes         the built-in scenes (readers/scenes.py); shapes:scenes,n=10000 is a larger training split
    folder:/dir           images and masks in folders of the same layout, the files of a pair with the same stem:
                          images and masks, or annotations, with or without train and val inside (ADE20K's layout), or
                          train and val with these inside; or VOC's JPEGImages, SegmentationClass and ImageSets
    hf: disk: parquet:    a column of images and one of masks

A mask is a PNG or TIFF with one number per pixel: palette indices or grey. 255 is ignored, by custom.
"""

import os
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sslvit.data.image import MAX_PIXELS, ImageError, fitted, measure, open_image, open_mask
from sslvit.data.readers import scenes
from sslvit.data.readers.columns import MASK_NAMES, ReadOptions, choose_mask_column
from sslvit.data.readers.encoded import Store, spread_ids
from sslvit.data.readers.mask_folders import MASKED, open_pairs
from sslvit.data.readers.tables import TableStore, open_disk, open_hub, open_parquet
from sslvit.data.source import IN_MEMORY, Samples, Source, check_ids, digest, room, whole
from sslvit.data.subset import Subset
from sslvit.errors import DataError
from sslvit.views.segmentation import IGNORED

MOST = 255  # classes: a mask is uint8
SCENES = {"train": 4_000, "test": 1_000}
SCENES_TEST = 1 << 40


class Masking(NamedTuple):
    """What the numbers in a mask file mean."""

    classes: int = 0  # 0: one more than the highest number in the training masks
    ignore: int = 255
    reduce_zero_label: bool = False  # 0 is ignored too, and class k is number k + 1, as in ADE20K
    binary: bool = False  # every number but 0 is class 1, and nothing is ignored

    def read(self, values: np.ndarray) -> np.ndarray:
        """Class numbers, -1 where ignored."""
        if self.binary:
            return (values > 0).astype(np.int32)
        ignored = values == self.ignore
        if self.reduce_zero_label:
            ignored, values = ignored | (values == 0), values - 1
        return np.where(ignored, -1, values)


AS_WRITTEN = Masking()


class MaskedSource(Source):
    """Images with masks. `classes` are of the pixels."""

    channels = 3
    labels = None
    unlabelled = "its classes are of pixels, not of images"
    classes: tuple[str, ...]

    @abstractmethod
    def pair(self, id: int, fit: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """An image, c h w, and its mask, h w, both uint8; scaled down to lie within `fit` if they are larger."""

    def read(self, ids: np.ndarray) -> Samples:
        """With the mask as the last channel. It is IGNORED outside the image."""
        ids = check_ids(ids, len(self))
        pixels = torch.zeros(len(ids), self.channels + 1, *self.canvas, dtype=torch.uint8)
        pixels[:, -1] = IGNORED
        extents = torch.empty(len(ids), 2, dtype=torch.int64)
        for slot, id in enumerate(ids.tolist()):
            image, mask = self.pair(id, self.canvas)
            height, width = mask.shape
            pixels[slot, :-1, :height, :width], pixels[slot, -1, :height, :width] = image, mask
            extents[slot, 0], extents[slot, 1] = height, width
        return Samples(pixels, extents, torch.from_numpy(ids.copy()), None)


class ScenesSource(MaskedSource):
    """The built-in scenes. Ids are counted from `first`, so that two splits share none. Plain images without masks."""

    classes = scenes.CLASSES
    unlabelled = "they have masks, no labels of their own"

    def __init__(self, size: int, *, image_size: int, first: int, masks: bool = True):
        self.size, self.image_size, self.first, self.masks = size, image_size, first, masks
        self.canvas = (image_size, image_size)
        self.name = f"shapes ({size:,} scenes)"
        self.fingerprint = f"scenes:{first}+{size}@{image_size}"
        self.small, self._drawn = size * 4 * image_size**2 <= IN_MEMORY, None

    def __len__(self) -> int:
        return self.size

    def pair(self, id: int, fit: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        image = self._made(np.array([id]))[0]
        return image[:-1], image[-1]

    def read(self, ids: np.ndarray) -> Samples:
        ids = check_ids(ids, len(self))
        pixels = self._made(ids)
        return Samples(
            pixels if self.masks else pixels[:, :-1], whole(self.canvas, len(ids)), torch.from_numpy(ids.copy()), None
        )

    def _made(self, ids: np.ndarray) -> Tensor:
        """With the mask as the last channel. All are drawn at once if they fit, since drawing takes as long as a step
        of a small model."""
        if self.small and self._drawn is None:
            self._drawn = self._render(torch.arange(len(self)))
        return self._render(torch.from_numpy(ids)) if self._drawn is None else self._drawn[ids]

    def _render(self, ids: Tensor) -> Tensor:
        made = scenes.make(ids + self.first, self.image_size)
        return torch.cat([made.images, made.masks[:, None]], 1)


class StoredPairs(MaskedSource):
    """Images and masks of two stores: row i is image pairs[i, 0] and mask pairs[i, 1]."""

    def __init__(
        self,
        images: Store,
        masks: Store,
        pairs: np.ndarray,
        masking: Masking,
        *,
        name: str,
        box: tuple[int, int],
        max_pixels: int = MAX_PIXELS,
    ):
        self.images, self.masks, self.pairs, self.masking = images, masks, pairs, masking
        self.name, self.max_pixels = name, max_pixels
        about = f"{images.fingerprint} {masks.fingerprint} {masking}"
        self.fingerprint = digest(about.encode(), np.ascontiguousarray(pairs).data)
        self.canvas = self._canvas(box)
        if not masking.classes:
            self.masking = masking._replace(classes=self._count_classes())
        self.classes = tuple(map(str, range(self.masking.classes)))

    def __len__(self) -> int:
        return len(self.pairs)

    def pair(self, id: int, fit: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        row = int(self.pairs[id, 0])
        try:
            image = open_image(self.images.read(row, self.max_pixels), max_pixels=self.max_pixels)
        except ImageError as error:
            raise DataError(f"{self.name}: {self.images.where(row)}: {error}") from error
        values, where = self._values(id), self.masks.where(int(self.pairs[id, 1]))
        if values.shape != image.shape[1:]:
            of_mask, of_image = (" x ".join(map(str, size)) for size in (values.shape, image.shape[1:]))
            raise DataError(f"{where} is {of_mask} px, and its image {self.images.where(row)} is {of_image} px")
        if (highest := int(values.max())) >= self.masking.classes:
            number = highest + self.masking.reduce_zero_label
            raise DataError(
                f"{where} has the value {number}, beyond {self.masking.classes} classes and the ignored "
                f"{self.masking.ignore}: give --classes, or --ignore {number} if it marks no class"
            )
        mask = torch.from_numpy(np.where(values < 0, IGNORED, values).astype(np.uint8))
        size = (image.shape[1], image.shape[2])
        if fit and (target := fitted(*size, fit)) != size:
            image = F.interpolate(image[None], target, mode="bicubic", antialias=True)[0]
            mask = F.interpolate(mask[None, None], target, mode="nearest-exact")[0, 0]
        return image, mask

    def _values(self, id: int) -> np.ndarray:
        row = int(self.pairs[id, 1])
        try:
            values = self.masking.read(open_mask(self.masks.read(row, self.max_pixels), self.max_pixels))
        except ImageError as error:
            raise DataError(f"{self.name}: {self.masks.where(row)}: {error}") from error
        if int(values.min()) < -1:
            raise DataError(f"{self.name}: {self.masks.where(row)} has the value {values.min()}, which is no class")
        return values

    def _count_classes(self) -> int:
        with ThreadPoolExecutor(8) as pool:
            highest = max(pool.map(lambda id: int(self._values(id).max()), range(len(self))))
        if highest < 1:
            way = "; if 255 marks an object, give --binary" if self.masking.ignore == IGNORED else ""
            raise DataError(f"{self.name}: its masks have {highest + 1} class, and at least 2 are needed{way}")
        if highest >= MOST:
            raise DataError(f"{self.name}: its masks have values up to {highest}: at most {MOST} classes are possible")
        return highest + 1

    def _canvas(self, box: tuple[int, int]) -> tuple[int, int]:
        """The box, or less where all images, by a sample, have one size."""
        sizes = set()
        for row in self.pairs[spread_ids(len(self.pairs), 64), 0].tolist():
            try:
                sizes.add(fitted(*measure(self.images.read(row, self.max_pixels), self.max_pixels)[2:], box))
            except ImageError as error:
                raise DataError(f"{self.name}: {self.images.where(row)}: {error}") from error
        return sizes.pop() if len(sizes) == 1 else box


class MaskedSubset(Subset, MaskedSource):
    def pair(self, id: int, fit: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        assert isinstance(self.inner, MaskedSource)
        return self.inner.pair(int(self.rows[id]), fit)


def open_masked(
    spec: str,
    *,
    image_size: int,
    split: str = "train",
    masks: str = "",
    image_column: str | None = None,
    mask_column: str | None = None,
    masking: Masking = AS_WRITTEN,
    canvas: int | None = None,
    max_pixels: int = MAX_PIXELS,
    follow_links: bool = False,
) -> MaskedSource:
    """The images and masks that a line of text names. masks: the folder of the masks, if they are elsewhere."""
    if masking.classes > MOST or masking.classes == 1:
        raise ValueError(f"--classes {masking.classes} must be 2 to {MOST}, or 0 to count them")
    kind, colon, rest = spec.partition(":")
    if kind == "shapes":
        if masks:
            raise ValueError(f"--masks {masks}: the masks of {spec} are made with its images")
        return open_scenes(rest, split, image_size)
    if not colon or kind not in ("folder", "hf", "disk", "parquet") or Path(spec).exists():
        kind, rest = "folder", spec.removeprefix("folder:")
    if not rest.strip():  # which would be the working directory
        raise ValueError(f"data {spec!r} lacks a path or name: is a variable of the shell unset?")
    if kind != "hf":
        rest = os.path.expanduser(rest)  # which a shell does not do behind a colon
    if kind == "folder":
        images: Store
        of_masks: Store
        images, of_masks, pairs, name = open_pairs(Path(rest), masks, split, follow_links)
    else:
        if masks:
            raise ValueError(f"--masks {masks}: the masks of {kind}:{rest} are in a column; name it by --mask_column")
        names = (mask_column,) if mask_column else MASK_NAMES
        options = ReadOptions(MASKED[split], None, image_column, None, None, names)
        opener = {"hf": open_hub, "parquet": open_parquet}.get(kind)
        images = opener(rest, options) if opener else open_disk(Path(rest), options)
        assert isinstance(images, TableStore)  # which it is without a root
        column = choose_mask_column(images.table.features, mask_column)
        of_masks = TableStore(
            images.table, [Path(os.fsdecode(root)) for root in images.roots], options._replace(image_column=column)
        )
        if len(images) != len(of_masks):
            raise DataError(f"{kind}:{rest}: {len(images):,} images and {len(of_masks):,} masks in its columns")
        pairs, name = np.repeat(np.arange(len(images))[:, None], 2, 1), f"{kind}:{rest} ({split})"
    side = canvas or room(image_size)
    return StoredPairs(images, of_masks, pairs, masking, name=name, box=(side, side), max_pixels=max_pixels)


def open_scenes(options: str, split: str, image_size: int, masks: bool = True) -> ScenesSource:
    first, *others = options.split(",")
    number = "".join(others).removeprefix("n=")
    if first != "scenes" or len(others) > 1 or (others and not (number.isdecimal() and 0 < int(number) < SCENES_TEST)):
        raise ValueError(f"shapes:{options} has no masks: shapes:scenes has, or shapes:scenes,n=10000")
    size = int(number) if others and split == "train" else SCENES[split]
    return ScenesSource(size, image_size=image_size, first=0 if split == "train" else SCENES_TEST, masks=masks)
