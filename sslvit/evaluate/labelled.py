"""Labelled images to learn from and to test on. Without a test set a tenth is held out, and a sentence says so."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from sslvit.config import ImagesConfig, LabelledConfig
from sslvit.data.source import Source
from sslvit.data.subset import HeldOut, Subset
from sslvit.errors import DataError, NoInput
from sslvit.evaluate import split
from sslvit.runs.public import public
from sslvit.views.batching import Size

REST = " (without its held-out tenth)"


class Labelled(NamedTuple):
    """The training and the test images, of the same classes."""

    train: Source
    test: Source
    note: str  # a sentence about held-out images; empty if there is a test set


def open_labelled(
    config: LabelledConfig, image_size: Size, channels: int | None, *, about: dict[str, Any] | None = None
) -> Labelled:
    """The images of --test_data, or else of the test split, or else held out of the training images.

    about: the description of the model that they are for, which may have seen the held-out images.
    """
    train = config.source(image_size=image_size, channels=channels)
    train.required_labels()
    reading = {"classes": train.classes, "image_size": image_size, "channels": channels}
    note = ""
    try:
        test = _named(config, reading) if config.test_data else config.source("test", **reading)
    except NoInput as error:
        if config.test_data:
            raise
        whole, (train, test) = train, hold_out(train, f"{error}. --test_data may name another test set")
        note = f"{_held_out(test)}: {error}"
        note += f". {seen}" if (seen := _seen(about or {}, whole)) else ""
    test.required_labels()
    return Labelled(train, test, note)


def open_split(config: ImagesConfig, name: str, image_size: Size, channels: int | None) -> tuple[Source, str]:
    """The images of one split, labelled or not, and a sentence if they are held out of labelled training images because
    there is no test split."""
    try:
        return config.source(name, image_size=image_size, channels=channels), ""
    except NoInput as error:
        train = config.source(image_size=image_size, channels=channels) if name == "test" else None
        if train is None or train.labels is None:
            raise
        _, test = hold_out(train, str(error))
        return test, f"{_held_out(test)}: {error}"


def _held_out(test: HeldOut) -> str:
    return f"The test images are {len(test):,} held out of {len(test.inner):,} labelled ones"


def hold_out(source: Source, why: str) -> tuple[Subset, HeldOut]:
    """The training images and the held-out tenth of a labelled source, for every use the same. why: what is said too if
    nothing can be held out."""
    try:
        rows, held = split.hold_out(torch.tensor(source.required_labels()))
    except ValueError as error:
        raise DataError(f"{why}; and {error}") from error
    rest = Subset(source, rows.numpy())
    rest.name = f"{source.name}{REST}"
    return rest, HeldOut(source, held.numpy())


def _named(config: LabelledConfig, reading: dict[str, Any]) -> Source:
    """The test split of --test_data, or all of it; another table has other columns."""
    other = replace(config, data=config.test_data, image_column=None, label_column=None, root=None)
    try:
        return other.source("test", **reading)
    except NoInput:
        return other.source(**reading)


def _seen(about: dict[str, Any], source: Source) -> str:
    """A sentence about a model that may have seen all of these images. Of their names it knows only the last parts."""
    trained_on, name = str(about.get("data", "")), public(source.name)
    if not f"{trained_on} (".startswith(f"{name} (") or trained_on.startswith(name + REST):
        return ""
    if about.get("head"):
        return (
            f"The model was trained with labels on {trained_on}: if these are the same images, it has seen the "
            "answers, and the accuracies are no measure of it"
        )
    return f"The model was pretrained, without labels, on {trained_on}: the held-out images may be among these"
