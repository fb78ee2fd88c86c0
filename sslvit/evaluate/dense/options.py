"""Options of commands that read images with masks."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from sslvit import rng
from sslvit.config import EVALUATION, FREE, Options, option
from sslvit.data.image import MAX_PIXELS
from sslvit.data.masks import MaskedSource, MaskedSubset, Masking, open_masked
from sslvit.errors import DataError, NoInput

HELD_OUT = 10  # without a test split, one image of so many is held out


@dataclass(frozen=True)
class MaskedConfig(Options):
    group: ClassVar[str] = "Images"
    data: str = option("shapes:scenes", FREE)
    """Images with masks: folder:/dir (ADE20K's and VOC's layouts, or images beside masks), hf:name, disk:/dir,
    parquet:/files; shapes:scenes are built in."""
    test_data: str = option("", EVALUATION)
    """Images to test on, in the form of --data; by default its test split, or a tenth held out."""
    masks: str = option("", FREE)
    """Folders: where the masks are, if not beside the images."""
    test_masks: str = option("", EVALUATION)
    """The same for --test_data."""
    image_column: str | None = None
    """Tables only: the image column, if there are several."""
    mask_column: str | None = None
    """Tables only: the column of the masks, if it has no usual name."""
    classes: int = option(0, least=0)
    """Number of classes; 0 counts them in the training masks."""
    ignore: int = 255
    """The value of pixels that are not scored."""
    reduce_zero_label: bool = False
    """0 is not scored either, and class 0 has the value 1, as in ADE20K."""
    binary: bool = False
    """Masks of two classes: 0, and any other value."""
    max_pixels: int = MAX_PIXELS
    """Larger image files are refused."""
    follow_links: bool = False
    """Folders: also follow links that point outside, and linked folders."""

    def open_images(self, image_size: int) -> tuple[MaskedSource, MaskedSource, str]:
        """Training and test images, and a sentence if the latter are held out of the former."""
        if self.test_masks and self.test_data in ("", self.data):
            raise ValueError(f"--test_masks {self.test_masks} are of --test_data, which is not given")
        if self.binary and (self.classes not in (0, 2) or self.reduce_zero_label):
            raise ValueError("--binary makes two classes itself: leave out --classes and --reduce_zero_label")
        masking = Masking(2 if self.binary else self.classes, self.ignore, self.reduce_zero_label, self.binary)
        train = self._open(self.data, "train", image_size, masking)
        masking = masking._replace(classes=len(train.classes))
        note = ""
        if self.test_data:
            try:
                test = self._open(self.test_data, "test", image_size, masking)
            except NoInput:
                test = self._open(self.test_data, "train", image_size, masking)
        else:
            try:
                test = self._open(self.data, "test", image_size, masking)
            except NoInput as error:
                train, test = held_out(train)
                note = f"{error}: {len(test):,} images are held out of {len(train) + len(test):,}"
        return train, test, note

    def _open(self, spec: str, split: str, image_size: int, masking: Masking) -> MaskedSource:
        return open_masked(
            spec,
            split=split,
            image_size=image_size,
            masks=self.masks if spec == self.data else self.test_masks,
            image_column=self.image_column,
            mask_column=self.mask_column,
            masking=masking,
            max_pixels=self.max_pixels,
            follow_links=self.follow_links,
        )


@dataclass(frozen=True)
class DenseOptions:
    group: ClassVar[str] = "Method"
    image_size: int = option(0, least=0)
    """Side of the window, in pixels; 0 takes the model's own. An image's shorter side is resized to it."""
    heads: tuple[Literal["knn", "logistic"], ...] = ("knn", "logistic")
    """knn, logistic or both."""
    k: int = option(20, above=0)
    """Nearest neighbours that vote."""
    temperature: float = option(0.07, above=0)
    """A vote is weighted by exp(cosine / temperature)."""
    patches: int = option(50_000, least=0)
    """Learn from at most this many patches, equally many of each image; 0 takes all."""
    limit_train: int = option(2_000, least=0)
    """Use at most this many training images, drawn at random; 0 takes all."""
    limit_test: int = option(1_000, least=0)
    """The same for the test images."""
    blocks: int = option(1, above=0)
    """Join the patches of this many last blocks."""
    stride: int = option(0, least=0)
    """Step of the windows over larger images; 0 takes two thirds of the window."""
    memory: float = option(2.0, above=0)
    """GB of patch features above which they are kept in a file in --out, and mapped."""
    half: bool = False
    """Keep patch features in float16."""
    batch_size: int = option(64, above=0)
    """Windows that the model sees at a time."""
    workers: int = option(0, least=0)
    """Processes that read images."""


def held_out(source: MaskedSource) -> tuple[MaskedSubset, MaskedSubset]:
    """All but a random tenth, and that tenth."""
    count = len(source) // HELD_OUT
    if not count:
        raise DataError(f"{source.name} has {len(source)} images and no test split: none can be held out")
    order = rng.permutation(rng.key(0, "held out"), len(source))
    order = order.flatten()
    rest, held = (ids.sort().values.to(torch.int64).numpy() for ids in (order[count:], order[:count]))
    return MaskedSubset(source, rest), MaskedSubset(source, held)
