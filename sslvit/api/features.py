"""Frozen features and their protocols."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslvit.api.calls import check_names, public
from sslvit.api.images import READING, opened
from sslvit.api.models import Model, backbone_of, load_model
from sslvit.data.source import Source
from sslvit.errors import DataError
from sslvit.evaluate import fewshot, knn as nearest
from sslvit.evaluate.features import Features, extract, left_out
from sslvit.evaluate.heads import run_probe
from sslvit.evaluate.logistic import logistic
from sslvit.evaluate.metrics import top
from sslvit.evaluate.predictions import Predictions
from sslvit.evaluate.protocols import PROTOCOLS
from sslvit.evaluate.split import choose_fraction
from sslvit.objectives.objective import Objective
from sslvit.processes.collectives import start
from sslvit.processes.traces import without_trace
from sslvit.views.batching import Size
from sslvit.views.pretraining import eval_view


@public
def extract_features(
    model: Model | Objective | str | Path,
    images: Any,
    split: str = "train",
    *,
    readout: str | tuple[str, ...] | None = None,
    image_size: Size | None = None,
    eval_crop: float | None = None,
    ids: Any = None,
    batch_size: int = 256,
    workers: int = 0,
    **reading: Any,
) -> Features:
    """The features of images by a frozen model, in float32, in the order of the images, with their labels.

    model: as of `load_model`, or its path. images, split, reading: as of `open_images`.
    readout: cls, mean, both, patches, or of the last blocks as cls:4; by default what the model declares. Of several,
    `by_readout` of the result has each.
    image_size, eval_crop: what the model sees, by default its own size, and the centre crop of every evaluation here.
    ids: numbers of the images to take, by default all. workers: processes that read images.

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=16)
    >>> features = sslvit.extract_features(vit, "shapes:n=64", ids=range(10))
    >>> features.x.shape, features.ids.tolist()
    (torch.Size([10, 32]), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    check_names(reading, READING, "extract_features")
    backbone, declared = backbone_of(load_model(model) if isinstance(model, str | Path) else model)
    size = image_size or backbone.image_size
    readouts = (readout,) if isinstance(readout, str) else tuple(readout or (declared,))
    before = next(backbone.parameters()).device
    with without_trace():
        accelerator = start()
        source = opened(images, split, image_size=size, **({"channels": backbone.channels} | reading))
        if not isinstance(source, Source):
            raise DataError(f"{source.name} has no end: features are of images that can be read by number")
        rows = None if ids is None else numbers_of(ids, source)
        try:
            features = extract(
                backbone.to(accelerator.device), source, eval_view(size, eval_crop), accelerator,
                ids=rows, readouts=readouts, batch_size=batch_size, workers=workers,
            )  # fmt: skip
        finally:
            backbone.to(before)
        if problem := left_out(features, source):
            accelerator.print(f"warning: {problem}")
    return features._replace(declared=declared if declared in readouts else readouts[0], classes=source.classes)


def numbers_of(ids: Any, source: Source) -> np.ndarray:
    """Numbers of images of a source; anything else, such as a mask, is refused."""
    values = ids.numpy(force=True) if isinstance(ids, Tensor) else np.asarray(ids)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        mask = "; np.flatnonzero(mask) are those of a mask" if values.dtype == bool else ""
        raise ValueError(f"ids have shape {values.shape} and type {values.dtype}: give a list of whole numbers{mask}")
    if wrong := [id for id in values.tolist() if not 0 <= id < len(source)]:
        raise ValueError(f"ids contain {wrong[0]}: the images of {source.name} are numbered 0 to {len(source) - 1}")
    return values.astype(np.int64)


class FewShot(NamedTuple):
    """An accuracy in [0, 1] over several draws of the shots."""

    mean: float
    spread: float  # the standard deviation


class Probe(NamedTuple):
    """A linear classifier of frozen features."""

    accuracy: float  # in [0, 1]
    predictions: Predictions  # of the test images: ids, labels, probabilities
    settings: dict[str, float]  # what was chosen on held-out training labels
    weights: dict[str, Tensor]  # of torch's Linear, for features as they are; empty of logistic_regression


@public
def knn(train: Features, test: Features, *, k: int = 20, temperature: float = 0.07) -> float:
    """The accuracy of k nearest neighbours by cosine similarity, whose votes are weighted by exp(similarity /
    temperature), as in DINO; in [0, 1].

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=16)
    >>> train, test = (sslvit.extract_features(vit, "shapes", split, ids=range(200)) for split in ("train", "test"))
    >>> 0 < sslvit.knn(train, test, k=5) < 1
    True
    """
    x, labels, y, truth, _ = compared(train, test)
    return nearest.knn(x, labels, y, truth, k=k, temperature=temperature)


@public
def few_shot(train: Features, test: Features, *, shots: int = 10, draws: int = 3) -> FewShot:
    """The mean accuracy, and its spread, of least squares from a few labelled images per class, as in the ViT paper.

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=16)
    >>> train, test = (sslvit.extract_features(vit, "shapes", split, ids=range(200)) for split in ("train", "test"))
    >>> mean, spread = sslvit.few_shot(train, test, shots=5)
    >>> 0 < mean < 1
    True
    """
    x, labels, y, truth, _ = compared(train, test)
    result = fewshot.fewshot(x, labels, y, truth, shots=shots, draws=draws)
    return FewShot(result.mean, result.spread)


@public
def logistic_regression(train: Features, test: Features, *, fraction: float = 1.0) -> Probe:
    """Logistic regression to its optimum, on standardised features and this share of each class's labels. The penalty
    is chosen on a held-out tenth of them.

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=16)
    >>> train, test = (sslvit.extract_features(vit, "shapes", split, ids=range(200)) for split in ("train", "test"))
    >>> probe = sslvit.logistic_regression(train, test)
    >>> 0 < probe.accuracy < 1, probe.predictions.probabilities.shape
    (True, torch.Size([200, 12]))
    """
    x, labels, y, truth, classes = compared(train, test)
    rows = choose_fraction(labels, fraction, seed=0)
    probabilities = logistic(x[rows], labels[rows], y, classes=classes).float()
    predictions = Predictions(test.ids, truth, probabilities, {"protocol": "logistic regression", "labels": fraction})
    return Probe(top(probabilities, truth), predictions, {}, {})


@public
def linear_probe(train: Features, test: Features, protocol: str = "grid") -> Probe:
    """A linear classifier trained by a protocol: grid (ours, for small sets), moco_v3, dino_s, dino_b, mae, dinov2, or
    attentive, which gathers patches (extract_features with readout="patches").

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=16)
    >>> train, test = (sslvit.extract_features(vit, "shapes", split, ids=range(200)) for split in ("train", "test"))
    >>> probe = sslvit.linear_probe(train, test, "mae")
    >>> probe.weights["weight"].shape, probe.settings
    (torch.Size([12, 32]), {'rate': 0.1, 'decay': 0.0})
    """
    if protocol not in (*PROTOCOLS, "attentive"):
        raise ValueError(f"protocol must be one of {', '.join((*PROTOCOLS, 'attentive'))}, got {protocol!r}")
    x, labels, y, truth, _ = compared(train, test, axes=3 if protocol == "attentive" else 2)
    result = run_probe(protocol, x, labels, y)
    predictions = Predictions(test.ids, truth, result.probabilities.float(), {"protocol": protocol})
    return Probe(top(result.probabilities, truth), predictions, result.settings, result.weights)


def compared(train: Features, test: Features, axes: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Both features and both labels, and the number of classes. Labels of test images whose classes have names are
    numbered as those of the training images."""
    x, y = train.x, test.x
    if x.ndim != axes or y.ndim != axes:
        wanted = "all patches: extract_features(..., readout='patches')" if axes == 3 else "one vector per image"
        raise ValueError(f"features of shapes {tuple(x.shape)} and {tuple(y.shape)}: this protocol reads {wanted}")
    if x.shape[1:] != y.shape[1:] or (train.declared and test.declared and train.declared != test.declared):
        raise ValueError(
            f"the training features are {train.declared or 'features'} of {x.shape[-1]} numbers, the test features "
            f"{test.declared or 'features'} of {y.shape[-1]}: extract both by one model and one readout"
        )
    labels, truth = labels_of(train, "training"), labels_of(test, "test")
    classes = int(labels.max()) + 1
    if train.classes and test.classes and train.classes != test.classes:
        numbers = {name: number for number, name in enumerate(train.classes)}
        if unknown := [test.classes[i] for i in truth.unique().tolist() if test.classes[i] not in numbers]:
            raise DataError(f"the test images have classes that the training images lack: {', '.join(unknown[:5])}")
        truth = torch.tensor([numbers.get(name, -1) for name in test.classes])[truth]
    if int(truth.max()) >= classes:
        raise DataError(f"the test images have label {int(truth.max())}, the training images only 0 to {classes - 1}")
    return x, labels, y, truth, classes


def labels_of(features: Features, which: str) -> Tensor:
    if features.labels is None:
        raise DataError(f"the {which} features are of images without labels, which this protocol needs")
    return features.labels
