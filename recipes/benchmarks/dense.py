"""Dense features of the models of a comparison: mean IoU by method, with intervals over seeds and test images.

    sslvit compare --methods supervised mpp mae moco_v3 dino dinov2 --seeds 3 --model XS/8 --epochs 2 \
        --finetune_steps 0 --out runs/dense/compare
    python recipes/benchmarks/dense.py --comparison runs/dense/compare --data shapes:scenes --image-size 64

Every pretrained model, the random start of each seed (scratch's weights) and raw pixels are probed on the same images
with masks. Writes OUT/results.json and the tables, OUT/dense.md. What is done stays done: the same command goes on.
"""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import tyro
from loss_as_rank import ranks
from safetensors.torch import load_file

from sslvit.cli import run_cli
from sslvit.evaluate.dense.options import DenseOptions, MaskedConfig
from sslvit.evaluate.dense.probe import probed
from sslvit.evaluate.dense.scores import PixelCounts, difference
from sslvit.evaluate.dense.windows import RawPixels
from sslvit.evaluate.statistics import holm
from sslvit.objectives import OBJECTIVES
from sslvit.processes.collectives import start
from sslvit.reports.run import markdown_table
from sslvit.storage import durable, sealed
from sslvit.weights.foreign.open import open_backbone

HEADS = ("knn", "logistic")
START, RAW = "random start", "raw pixels"


def models(comparison: Path, methods: tuple[str, ...], seeds: int) -> dict[str, list[Path]]:
    """The folder of each method's model, by seed."""
    found = {START: [comparison / "starts" / f"scratch-{seed}" for seed in range(seeds)]}
    return found | {method: [comparison / "runs" / f"{method}-{seed}" for seed in range(seeds)] for method in methods}


def counted(
    name: str, folder: Path | None, patch: tuple[int, int], data: MaskedConfig, options: DenseOptions, out: Path
) -> dict[str, PixelCounts]:
    """The counts of one model by head, from its file if it is there."""
    files = {head: out / f"{name}-{head}.safetensors" for head in HEADS}
    if not all(file.exists() for file in files.values()):
        model = open_backbone(folder)[0] if folder else RawPixels(patch)
        train, test, _ = data.open_images(options.image_size)
        for row, counts in probed({name: model}, train, test, options, start().device, out):
            head = row.rpartition(", ")[2]
            if head in files:
                durable.replace(files[head], durable.tensor_pieces(counts._asdict()))
    return {head: PixelCounts(**load_file(file)) for head, file in files.items()}


def summary(counts: dict[str, list[dict[str, PixelCounts]]], accuracies: dict[str, list[float]]) -> dict[str, Any]:
    """Mean IoU by method, head and seed; what each is ahead of the random start; and the accuracies beside them."""
    results: dict[str, Any] = {"mean iou": {}, "pixel accuracy": {}, "ahead": {}, "20-nn": accuracies}
    for method, seeds in counts.items():
        results["mean iou"][method] = {head: [one[head].mean_iou for one in seeds] for head in HEADS}
        results["pixel accuracy"][method] = {head: [one[head].pixel_accuracy for one in seeds] for head in HEADS}
    for head in HEADS:
        others = [method for method in counts if method not in (START, RAW)]
        gaps = [difference([s[head] for s in counts[m]], [s[head] for s in counts[START]]) for m in others]
        corrected = holm([gap.p for gap in gaps if gap.p is not None])
        results["ahead"][head] = {
            method: {"mean": gap.mean, "low": gap.low, "high": gap.high, "holm": p}
            for method, gap, p in zip(others, gaps, corrected, strict=True)
        }
    return results


def told(results: dict[str, Any]) -> list[str]:
    rows = []
    for method, by_head in results["mean iou"].items():
        accuracy = results["20-nn"].get(method)
        rows.append([titled(method), *(spread(by_head[head]) for head in HEADS), spread(accuracy) if accuracy else ""])
    header = ["%", "mean IoU, k-NN", "mean IoU, logistic", "20-nn of whole images"]
    lines = [*markdown_table(header, rows), ""]
    for head in HEADS:
        for method, gap in results["ahead"][head].items():
            interval = f"{100 * gap['mean']:+.1f} [{100 * gap['low']:.1f}, {100 * gap['high']:.1f}]"
            sure = "" if gap["holm"] < 0.05 else ", not significant"
            lines.append(f"- {titled(method)} minus random start, {head}: {interval} points of mean IoU{sure}.")
    whole = results["20-nn"]
    if len(whole) > 2:
        dense = [mean(results["mean iou"][method]["logistic"]) for method in whole]
        found = ranks(torch.tensor(dense), torch.tensor([mean(one) for one in whole.values()])).item()
        lines.append(f"- Rank correlation of logistic mean IoU and 20-nn over these {len(whole)} rows: {found:.2f}.")
    return lines


def spread(values: list[float]) -> str:
    shown = f"{100 * mean(values):.1f}"
    return f"{shown} ± {100 * stdev(values):.1f}" if len(values) > 1 else shown


def main(
    comparison: Path,
    data: str = "shapes:scenes",
    image_size: int = 64,
    methods: tuple[str, ...] = ("supervised", "mpp", "mae", "moco_v3", "dino", "dinov2"),
    seeds: int = 3,
    limit_train: int = 2_000,
    limit_test: int = 1_000,
    patches: int = 50_000,
    threads: int = 0,
    out: Path = Path("runs/dense"),
) -> None:
    """Probe the dense features of every model of a comparison."""
    start(threads=threads)
    options = DenseOptions(image_size=image_size, limit_train=limit_train, limit_test=limit_test, patches=patches)
    masked = MaskedConfig(data=data)
    about, file = asdict(options) | {"data": data, "comparison": str(comparison)}, out / "options.json"
    about = json.loads(json.dumps(about))
    if file.exists() and {name: value for name, value in sealed.read(file).items() if name != "seal"} != about:
        raise ValueError(f"{out} has numbers of other options, see {file}: choose another --out")
    sealed.write(file, about)
    folders = models(comparison, methods, seeds)
    patch = open_backbone(folders[START][0])[0].patch_size
    counts = {
        method: [counted(f"{method}-{seed}", one, patch, masked, options, out) for seed, one in enumerate(paths)]
        for method, paths in folders.items()
    }
    counts[RAW] = [counted(RAW, None, patch, masked, options, out)]
    results = summary(counts, accuracies(comparison, methods))
    results |= {"data": data, "image size": image_size, "training images": limit_train, "test images": limit_test}
    sealed.write(out / "results.json", results)
    lines = told(results)
    durable.replace_text(out / "dense.md", "\n".join([*lines, ""]))
    print("\n".join(lines))


def accuracies(comparison: Path, methods: tuple[str, ...]) -> dict[str, list[float]]:
    """Of whole images by 20 nearest neighbours, from the comparison's own results, if it has them."""
    file = comparison / "results.json"
    values = sealed.read(file, longest=1 << 28)["values"].get("20-nn", {}) if file.exists() else {}
    titles = {method: titled(method) for method in methods} | {START: "scratch (mean)", RAW: RAW}
    return {method: values[title] for method, title in titles.items() if title in values}


def titled(method: str) -> str:
    return OBJECTIVES[method].title if method in OBJECTIVES else method


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
