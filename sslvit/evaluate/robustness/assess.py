"""Models side by side: each with what reads it, and beside them the same architectures with random weights."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from sslvit.data.source import Source
from sslvit.errors import DataError
from sslvit.evaluate.features import Features
from sslvit.evaluate.robustness.corruptions import table_of
from sslvit.evaluate.robustness.measure import Subject, measure, with_own_head, with_probe
from sslvit.evaluate.robustness.patches import Cut
from sslvit.evaluate.robustness.summary import summary
from sslvit.models.readout import Classifier
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.views.pretraining import EvalView
from sslvit.weights.backbone import with_random_weights

Model = tuple[ViT | BiT | Classifier, str]  # and the readout that is probed
Extract = Callable[[ViT | BiT, str], Features]  # of the training images


def backbone_of(model: ViT | BiT | Classifier) -> Any:
    return model.backbone if isinstance(model, Classifier) else model


def shared(models: Mapping[str, Model], what: str, remedy: str) -> Any:
    """The image_size or the channels that all models have."""
    each = {name: getattr(backbone_of(model), what) for name, (model, _) in models.items()}
    if len(set(each.values())) > 1:
        raise ValueError(f"the models differ in {what}: {', '.join(f'{k} {v}' for k, v in each.items())}; {remedy}")
    return next(iter(each.values()))


def image_size_of(models: Mapping[str, Model]) -> tuple[int, int]:
    return shared(models, "image_size", "give one --image_size for all")


def channels_of(models: Mapping[str, Model]) -> int:
    return shared(models, "channels", "evaluate them separately")


def grid_of(models: Mapping[str, Model], grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The grid whose patches are dropped: this one or, of 0, that of the first ViT."""
    if 0 in grid:
        vits = [one for one in (backbone_of(model) for model, _ in models.values()) if isinstance(one, ViT)]
        if not vits:
            raise ValueError("none of the models is a ViT, whose patches could be dropped: give --grid")
        grid = vits[0].config.grid_of(*size)
    try:
        Cut.of(torch.empty(1, 1, *size), grid)
    except ValueError as error:
        raise ValueError(f"--grid {' '.join(map(str, grid))}: {error}") from error
    return grid


def random_starts(models: Mapping[str, Model]) -> dict[str, Model]:
    """One of each architecture and readout."""
    kinds: dict[Any, tuple[str, Any]] = {}
    for name, (model, readout) in models.items():
        kinds.setdefault((backbone_of(model).config, readout), (name, backbone_of(model)))
    title = "random start" if len(kinds) == 1 else "random ({})"
    return {
        title.format(name): (with_random_weights(backbone), readout) for (_, readout), (name, backbone) in kinds.items()
    }


def assess(
    models: Mapping[str, Model],
    test: Source,
    ids: np.ndarray,
    view: EvalView,
    size: tuple[int, int],
    device: torch.device,
    extract: Extract,
    *,
    grid: tuple[int, int] = (0, 0),
    probe: str = "logistic",
    random: bool = True,
    tell: Callable[[int], Any] = lambda done: None,
) -> dict[str, Any]:
    """The numbers of a report, see summary.py. A Classifier answers by its own head, others by a probe."""
    grid = grid_of(models, grid, size)
    highest = int(test.required_labels().max())
    for name, (model, _) in models.items():
        if isinstance(model, Classifier) and highest >= (classes := model.head.out_features):
            raise DataError(f"{test.name} has label {highest}, beyond the {classes} classes of the head of {name}")
    subjects: list[Subject] = []
    for name, (model, readout) in {**models, **(random_starts(models) if random else {})}.items():
        model.to(device)
        if isinstance(model, Classifier):
            subjects.append(with_own_head(name, model))
        else:
            subjects.append(with_probe(name, model, readout, extract(model, readout), probe))
    measured = measure(subjects, test, ids, view, size, grid, device, tell)
    about = {"data": test.name, "size": list(size), "grid": list(grid), "parameters": table_of(size)}
    return about | {"read by": {one.name: f"{one.how} of {one.readout}" for one in subjects}} | summary(measured)
