"""Images of any kind as a source."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from sslvit.api.calls import check_names, public
from sslvit.config import DataConfig, ImagesConfig
from sslvit.data.objects import How, open_object
from sslvit.data.readers.columns import ReadOptions
from sslvit.data.source import Images, Source, room
from sslvit.errors import DataError, NoInput
from sslvit.evaluate.labelled import hold_out as held_out
from sslvit.views.batching import Size, to_pair

READING = {field.name for field in fields(ImagesConfig)} - {"data", "eval_crop"} | {"channels", "epoch_images"}


@public
def open_images(
    images: Any,
    split: str = "train",
    *,
    image_size: Size | None = None,
    labels: Any = None,
    classes: tuple[str, ...] | None = None,
    **reading: Any,
) -> Images:
    """The images of a split, as `pretrain` and `extract_features` take them.

    images: text as of --data (shapes, folder:/dir, csv:/file, hf:name, stream:..., see docs/data.md) or a path; an
    array or a tensor, n h w, n h w c or n c h w, of uint8, or of floats that are n / 255; a torch Dataset or a list of
    pairs (image, label) or of images alone, without random transforms: each item is read once now; a datasets.Dataset.
    image_size: that of the model, by default 224; images are stored large enough to cut views of it.
    labels: of the images, numbers or text; by default what the images come with.
    classes: the names of a training set's classes, so that the labels of a test set have the same numbers.
    reading: channels (1 or 3), canvas, image_column, label_column, root, range, max_pixels, only_classes, follow_links,
    epoch_images; they mean what they mean on the command line.

    >>> import numpy as np, sslvit
    >>> images = sslvit.open_images(np.zeros((6, 32, 32, 3), np.uint8), labels=[0, 1, 2, 0, 1, 2])
    >>> len(images), images.channels, images.labels.tolist()
    (6, 3, [0, 1, 2, 0, 1, 2])
    >>> len(sslvit.open_images("shapes", "test", image_size=32))
    4000
    """
    check_names(reading, READING, "open_images")
    return opened(images, split, image_size=image_size, labels=labels, classes=classes, **reading)


def opened(
    images: Any,
    split: str = "train",
    *,
    image_size: Size | None = None,
    labels: Any = None,
    classes: tuple[str, ...] | None = None,
    channels: int | None = None,
    **reading: Any,
) -> Images:
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    if isinstance(images, Images):
        return as_it_is(images, split, labels, channels, reading)
    config = DataConfig(image_size=image_size or 224, channels=channels, **reading)  # type: ignore[arg-type]
    if isinstance(images, str | Path):
        if labels is not None:
            raise DataError(f"labels= is for images that are given as such, and {images} may have its own")
        config = DataConfig(data=str(images), image_size=config.image_size, channels=config.channels, **reading)
        if split == "train" and classes is None:
            return config.open()
        return config.source(split, channels=channels, classes=classes)
    if config.only_classes or config.follow_links or config.epoch_images:
        raise DataError("only_classes, follow_links and epoch_images are for images that are named by a text")
    given = config.reading()  # checked
    side = max(to_pair(config.image_size))
    options = ReadOptions(split, given["root"], given["image_column"], given["label_column"], classes)
    how = How(given["canvas"] or room(side), channels, given["max_pixels"], given["span"])
    return open_object(images, labels, options, how)


def as_it_is(images: Images, split: str, labels: Any, channels: int | None, reading: dict[str, Any]) -> Images:
    if split != "train" or labels is not None or reading:
        what = f"split {split!r}" if split != "train" else "labels" if labels is not None else ", ".join(reading)
        raise DataError(f"{images.name} is open already: give {what} to open_images")
    if channels not in (None, images.channels):
        raise DataError(f"{images.name} has {images.channels} channels, the model takes {channels}")
    return images


def labelled_pair(
    images: Any, train: Source, test: Any, image_size: Size, *, hold_out: bool, **reading: Any
) -> tuple[Source, Source] | str:
    """The training images and those to evaluate on: `test`, or the test split of images that are named by a text, or a
    tenth that is held out. Or why there are none. reading: as the training images were opened."""
    common: dict[str, Any] = {"image_size": image_size, "channels": train.channels, "classes": train.classes}
    if test is not None:
        return train, same_classes(train, first_of(test, common))
    reason = f"{train.name} has no test images"
    if isinstance(images, str | Path):
        try:
            return train, same_classes(train, opened(images, "test", **common, **reading))
        except NoInput as error:
            reason = str(error)
    if not hold_out:
        return f"{reason}; give test_images"
    try:
        return held_out(train, reason)
    except DataError as error:
        return str(error)


def first_of(test: Any, common: dict[str, Any]) -> Images:
    """Opens images to test on: of a text its test split, or all of it if it has no splits."""
    if isinstance(test, str | Path):
        try:
            return opened(test, "test", **common)
        except NoInput:
            return opened(test, **common)
    return opened(test, **(common if not isinstance(test, Images) else {"channels": common["channels"]}))


def same_classes(train: Source, test: Images) -> Source:
    assert isinstance(test, Source), "streams have no labels"
    highest, label = train.required_labels().max(), test.required_labels().max()
    if label > highest:
        raise DataError(f"{test.name} has label {label}, beyond the training images' {highest}")
    if train.classes and test.classes and test.classes != train.classes[: len(test.classes)]:
        raise DataError(
            f"the classes of {test.name} are not those of {train.name}: open the test images with classes= of these"
        )
    return test
