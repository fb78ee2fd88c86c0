"""The dense probe of several models on the same images, and what is told of it."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sslvit import rng
from sslvit.data.masks import MaskedSource
from sslvit.errors import DataError
from sslvit.evaluate.dense.bank import fill
from sslvit.evaluate.dense.options import DenseOptions
from sslvit.evaluate.dense.probes import Answers, heads_of, predictions, scored
from sslvit.evaluate.dense.scores import PixelCounts, difference
from sslvit.evaluate.dense.windows import RawPixels, Window, patch_features
from sslvit.models.vit import ViT

FREQUENT = "most frequent class"


def probed(
    models: dict[str, nn.Module],
    train: MaskedSource,
    test: MaskedSource,
    options: DenseOptions,
    device: torch.device,
    folder: Path,
    *,
    watch: Callable[[str, Answers], Answers] | None = None,
) -> Iterator[tuple[str, PixelCounts]]:
    """The counts of "model, head", as they come. folder: of the file that holds features above the limit of memory.
    watch: looks at the predictions of a model as they come."""
    if options.stride > options.image_size:
        raise ValueError(f"--stride {options.stride} leaves gaps between windows of {options.image_size} px")
    rows, held = (drawn(source, n) for source, n in ((train, options.limit_train), (test, options.limit_test)))
    classes = len(train.classes)
    for name, model in models.items():
        window = Window(options.image_size, options.stride)
        reading: dict[str, Any] = {"batch_size": options.batch_size, "workers": options.workers}
        reading["layers"] = options.blocks if isinstance(model, ViT) else 1
        model.to(device)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="patches-") as place:
            bank = fill(
                patch_features(model, train, rows, window, device, **reading), len(rows), classes,
                folder=Path(place), patches=options.patches, memory=options.memory * 1e9, half=options.half,
            )  # fmt: skip
            frequent = ("majority",) if isinstance(model, RawPixels) else ()
            heads = heads_of(bank, classes, (*options.heads, *frequent), options.k, options.temperature)
            answers = predictions(patch_features(model, test, held, window, device, **reading), heads)
            found = scored(watch(name, answers) if watch else answers, classes, tuple(heads))
            del bank, heads, answers  # before the next model's
        model.cpu()
        for head, counts in found.items():
            yield FREQUENT if head == "majority" else f"{name}, {head}", counts


def drawn(source: MaskedSource, limit: int) -> np.ndarray:
    """Up to `limit` images (0: all) in a random order, the same ones for every model."""
    return rng.permutation(rng.key(0, "dense probe"), len(source))[: limit or None].numpy()


def check_models(models: dict[str, nn.Module], size: int, blocks: int = 1) -> None:
    """That all of them have patches of colour images of this size, and so many blocks."""
    for name, model in models.items():
        if not isinstance(model, ViT):
            raise DataError(f"{name}: a {type(model).__name__} has no patches to probe")
        if model.channels != MaskedSource.channels:
            raise ValueError(
                f"{name} takes images of {model.channels} channels, and those with masks are read in colour: train one "
                "with --channels 3, or --inflate it"
            )
        if blocks > model.depth:
            raise ValueError(f"--blocks {blocks}: {name} has {model.depth}")
        try:
            model.config.grid_of(size, size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def line_of(row: str, counts: PixelCounts) -> str:
    low, high = (f"{100 * end:.1f}" for end in counts.interval()[1:])
    return f"{row:<32}{100 * counts.mean_iou:>11.1f}  {f'[{low}, {high}]':<14}{100 * counts.pixel_accuracy:>16.1f}"


HEADER = f"{'':<32}{'mean IoU, %':>11}  {'95% interval':<14}{'pixel accuracy, %':>16}"


def gaps(counts: dict[str, PixelCounts], model: str) -> dict[str, Any]:
    """The model minus each other row of the same head."""
    pairs = {}
    for row in counts:
        name, _, head = row.rpartition(", ")
        if name and name != model:
            pairs[row] = difference([counts[f"{model}, {head}"]], [counts[row]])
    return pairs


def numbers_of(counts: dict[str, PixelCounts], classes: tuple[str, ...], model: str) -> dict[str, dict[str, Any]]:
    numbers = {
        row: {
            "mean iou": one.mean_iou,
            "interval": list(one.interval()[1:]),
            "pixel accuracy": one.pixel_accuracy,
            "iou": {name: None if iou != iou else iou for name, iou in zip(classes, one.iou.tolist(), strict=True)},
            "images": len(one.true),
        }
        for row, one in counts.items()
    }
    for row, gap in gaps(counts, model).items():
        numbers[row][f"{model} minus this"] = {"mean iou": gap.mean, "interval": [gap.low, gap.high]}
    return numbers
