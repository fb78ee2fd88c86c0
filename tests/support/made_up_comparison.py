"""The files of a comparison whose accuracies are chosen, so that its report has a truth to tell."""

import json
from pathlib import Path

import torch

from sslvit.evaluate.predictions import Predictions, save_predictions
from sslvit.experiments.results import collect
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.weights.folder import save_backbone

IMAGES = 1000
LABELS = torch.arange(IMAGES) % 2
NAMES = {"scratch": "scratch (mean)", "scratch-cls": "scratch (cls)", "supervised": "supervised", "mae": "MAE"}
NAMES |= {"mpp-target-pixels": "MPP (pixels)"}
READOUTS = {"scratch-cls": "cls", "supervised": "cls"}  # the others' is mean
COST = {"images": 500, "seconds": 2.0, "flops": 3e9, "peak_memory_bytes": 2**20, "device": "CPU"}


def comparison(
    out: Path,
    accuracies: dict[str, list[float]],
    seed: int = 0,
    fractions: tuple[float, ...] = (0.01, 1),
    places: tuple[str, ...] = ("own", "transfer 1"),
    tuned: bool = True,
    labels: torch.Tensor = LABELS,
    one_class: tuple[str, ...] = (),
    pixels: float = 0.0,
) -> dict:
    """Made up: each method's probability of being right at an image, by seed, drawn for each image by itself. Scratch
    that is read by its class token is never right. one_class: models that answer class 0 for every image. pixels: the
    accuracy of raw pixels; 0 for a comparison that has none."""
    draw, classes = torch.Generator().manual_seed(seed), int(labels.max()) + 1

    def predictions(right: torch.Tensor, *, zero: bool) -> Predictions:
        told = torch.zeros(IMAGES, dtype=torch.int64) if zero else torch.where(right, labels, (labels + 1) % classes)
        order = torch.randperm(IMAGES, generator=draw)  # as another worker may have written them
        probabilities = torch.nn.functional.one_hot(told, classes).float()
        return Predictions(torch.arange(IMAGES)[order], labels[order], probabilities[order], {})

    for place in places if pixels else ():
        commonest = (labels == 0).double().mean().item()
        numbers = {"side": 8, "commonest class": commonest, "commonest class of all": commonest - 0.05}
        linear = {f"linear {100 * fraction:g} %": pixels for fraction in fractions}
        file = out / "baselines" / place / "numbers.json"
        file.parent.mkdir(parents=True)
        nearest = {"20-nn": pixels, "balanced accuracy": {"20-nn": pixels / 2, "linear 1 %": 0.0}}
        file.write_text(json.dumps(numbers | {"raw pixels": nearest | linear}))
        for fraction in fractions:
            found = predictions(torch.rand(IMAGES, generator=draw) < pixels, zero=False)
            save_predictions(file.with_name(f"pixels-{fraction:g}.parquet"), found)
    seeds, models = list(range(len(next(iter(accuracies.values()))))), {}
    for method, by_seed in ({"scratch-cls": [0.0 for _ in seeds]} | accuracies).items():
        for number, accuracy in enumerate(by_seed):
            name, readout = f"{method}-{number}", READOUTS.get(method, "mean")
            models[name] = out / "models" / name
            vit = ViT(ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=1))
            save_backbone(vit, models[name], {"readout": readout})
            (models[name] / "cost.json").write_text(json.dumps(COST | {"flops": None if method == "mae" else 3e9}))
            found = predictions(torch.rand(IMAGES, generator=draw) < accuracy, zero=name in one_class)
            top1 = (found.probabilities.argmax(-1) == found.labels).double().mean().item()
            for place in places:
                file = out / "probes" / name / place / "numbers.json"
                file.parent.mkdir(parents=True)
                linear = {f"linear {100 * fraction:g} %": top1 for fraction in fractions}
                others = {"pretrained/mean": {"20-nn": 0.0}, "pretrained/cls": {"20-nn": 0.0}}
                nearest = {"20-nn": accuracy, "balanced accuracy": {"20-nn": accuracy / 2, "linear 1 %": 0.0}}
                numbers = others | {f"pretrained/{readout}": nearest | linear}
                file.write_text(json.dumps(numbers))
                for fraction in fractions:
                    save_predictions(file.with_name(f"pretrained-{readout}-{fraction:g}.parquet"), found)
                    test = out / "finetuned" / name / place / f"{fraction:g}" / "test.json"
                    if tuned:
                        save_predictions(test.with_name("predictions.parquet"), found)
                        test.write_text(json.dumps({"top1": top1}))
    methods = {name: NAMES[name] for name in accuracies if name != "scratch"}
    return {"data": "made up", "settings": {}} | collect(out, methods, seeds, list(places), models)
