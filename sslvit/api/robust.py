"""Robustness of models, and the corruptions by themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, arange

from sslvit import rng
from sslvit.api.calls import check_names, public
from sslvit.api.images import READING, labelled_pair, opened
from sslvit.api.models import Model, backbone_of, load_model
from sslvit.data.source import Source
from sslvit.errors import DataError
from sslvit.evaluate.features import Features, extract
from sslvit.evaluate.monitor import draw_ids
from sslvit.evaluate.robustness import corruptions
from sslvit.evaluate.robustness.assess import assess, channels_of, image_size_of
from sslvit.models.readout import Classifier
from sslvit.processes.collectives import start
from sslvit.processes.traces import without_trace
from sslvit.views.batching import Size, to_pair
from sslvit.views.pretraining import eval_view


@public
def robustness(
    models: Mapping[str, Model | str | Path],
    images: Any,
    test_images: Any = None,
    *,
    image_size: Size | None = None,
    grid: Size = 0,
    probe: Literal["logistic", "knn"] = "logistic",
    random: bool = True,
    limit_train: int = 10_000,
    limit_test: int = 5_000,
    **reading: Any,
) -> dict[str, Any]:
    """Accuracy on corrupted images and with patches lost or shuffled, and calibration: what `sslvit robustness` writes
    to numbers.json, with intervals over the test images, the first model being the one that others are compared with.

    models: by name, as of `load_model`, or their paths. A Classifier answers by its own head, others by a probe.
    images, reading: labelled, as of `open_images`. test_images: by default the test split of these, or a tenth of them.
    grid: of the patches that are dropped, by default the first ViT's. random: beside them the same with random weights.
    limit_train, limit_test: use at most so many images, drawn at random; 0 takes all.

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=16)
    >>> numbers = sslvit.robustness({"mine": vit}, "shapes:n=100", random=False, limit_test=20)
    >>> sorted(numbers["accuracy"]["fog 3"]), len(numbers["accuracy"]["fog 3"]["mine"])
    (['mine'], 3)
    """
    check_names(reading, READING, "robustness")
    given = {name: load_model(one) if isinstance(one, str | Path) else one for name, one in models.items()}
    if not given:
        raise ValueError("models are none: give at least one, by name")
    found = {
        name: (one if isinstance(one, Classifier) else backbone_of(one)[0], backbone_of(one)[1])
        for name, one in given.items()
    }
    before = {name: next(one.parameters()).device for name, one in given.items()}
    size = to_pair(image_size or image_size_of(found))
    with without_trace():
        accelerator, view = start(), eval_view(size)
        source = opened(images, image_size=size, **({"channels": channels_of(found)} | reading))
        if not isinstance(source, Source):
            raise DataError(f"{source.name} has no end: models are evaluated on images that can be read by number")
        pair = labelled_pair(images, source, test_images, size, hold_out=True, **reading)
        if isinstance(pair, str):
            raise DataError(pair)
        train, test = pair

        def features(backbone: Any, readout: str) -> Features:
            ids = draw_ids(train, limit_train)
            return extract(backbone, train, view, accelerator, ids=ids, readouts=(readout,))

        try:
            return assess(
                found, test, draw_ids(test, limit_test), view, size, accelerator.device, features,
                grid=to_pair(grid), probe=probe, random=random,
            )  # fmt: skip
        finally:
            for name, one in given.items():
                one.to(before[name])


@public
def corrupt(images: Tensor, name: str, strength: int, *, seed: int = 0) -> Tensor:
    """Images in [0, 1], `b c h w`, corrupted as ImageNet-C's, or as CIFAR-10-C's up to 96 px, in strength 1 to 5.

    name: gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, fog,
    brightness, contrast, elastic_transform, pixelate or jpeg_compression. seed: another one draws other noise.

    >>> import sslvit, torch
    >>> sslvit.corrupt(torch.rand(2, 3, 32, 32), "fog", 3).shape
    torch.Size([2, 3, 32, 32])
    """
    return corruptions.corrupt(images, name, strength, rng.key(seed, arange(len(images), device=images.device)))
