"""Looks into a pretrained ViT: the pictures of the ViT paper, and their numbers.

    python recipes/analyse.py --model runs/mpp/model --data shapes --out runs/analysis

The principal components of its filters, the similarity of its positions, how far each head of each layer looks, and
attention rollout beside the attention of the last layer; each also of the same architecture with random weights. What a
model does not have (a hybrid no filters of pixels, relative positions no table) is left out, with a sentence.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sslvit import rng
from sslvit.cli import run_cli
from sslvit.config import ImagesConfig, check_bounds, option
from sslvit.data.spec import Source
from sslvit.errors import CannotWrite, DataError
from sslvit.evaluate import analysis
from sslvit.evaluate.labelled import open_split
from sslvit.evaluate.monitor import draw_ids
from sslvit.models.vit import ViT
from sslvit.processes.collectives import start
from sslvit.reports import figures, page
from sslvit.reports.pictures import distance_chart
from sslvit.storage import durable
from sslvit.views.batching import Size, to_pair
from sslvit.views.pretraining import EvalView
from sslvit.weights.foreign.options import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig, ImagesConfig):
    """Look at a pretrained ViT's filters, positions and attention. No labels are needed."""

    out: Path = Path("runs/analysis")
    """A folder for analysis.json and the pictures; files of these names are replaced."""
    image_size: Size = 0
    """Side in pixels; 0 takes the model's own. Distances are in pixels of images of this size."""
    split: Literal["train", "test"] = "train"
    """The images to look at."""
    images: int = option(128, least=0)
    """Random images whose attention distance is averaged; 0 takes all. The paper has 128."""
    shown: int = option(8, above=0, most=32)
    """Images whose attention is drawn, at most 32."""
    threads: int = option(0, least=0)
    """CPU threads; 0 takes one per core."""


def readable(source: Source, ids: np.ndarray, view: EvalView, device: torch.device) -> Iterator[Tensor]:
    """These images, a few at a time: b c H W. Those that cannot be read are left out, not replaced by others."""
    for some in np.array_split(ids, -(-len(ids) // 32)):
        samples = source.read(some)
        (images,) = view(samples.pixels, rng.key(0, samples.ids), samples.extents)
        good = ~torch.isin(samples.ids, torch.tensor([line.id for line in samples.bad], dtype=torch.int64))
        if good.any():
            yield images[good].to(device)


def analysed(vit: ViT, batches: Iterator[Tensor], shown: Tensor) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Numbers, pictures by name, and sentences about what the model does not have."""
    distances, maps, missing = analysis.mean_attention_distance(vit, batches), analysis.attention_maps(vit, shown), []
    numbers = {name: value.tolist() for name, value in distances._asdict().items() if name != "images"}
    numbers = {"attention distance": numbers, "images": distances.images}
    heads = {f"head {head + 1}": maps.last[:, head] for head in range(vit.heads)}
    both = {"rollout": maps.rollout, "last layer": maps.last.mean(1)}
    pictures = {"attention": figures.attention_sheet(shown, both)}
    pictures["heads"] = figures.attention_sheet(shown, heads, over=False)
    try:
        filters = analysis.filters(vit)
        numbers["filter variance"] = filters.variance.tolist()
        pictures["filters"] = figures.filter_sheet(filters.components)
    except ValueError as error:
        missing.append(f"No filters: {error}")
    try:
        similarity = analysis.position_similarity(vit)
        numbers["position similarity"] = analysis.position_structure(similarity)
        pictures["positions"] = figures.similarity_tiles(similarity)
    except ValueError as error:
        missing.append(f"No positions: {error}")
    return numbers, pictures, missing


def main(config: Config) -> dict[str, Any]:
    check_bounds(config)
    accelerator = start(threads=config.threads)
    pretrained, _ = config.open()
    if not isinstance(pretrained, ViT):
        raise ValueError(f"{config.model} is a {type(pretrained).__name__}, which has no attention to look at")
    size = to_pair(config.image_size or pretrained.image_size)
    source, note = open_split(config, config.split, size, pretrained.channels)
    ids, view = draw_ids(source, config.images), config.eval_view(size)
    shown = next(readable(source, ids, view, accelerator.device), None)
    if shown is None:
        raise DataError(f"none of {len(ids):,} images of {source.name} can be read")
    shown = shown[: config.shown]
    even = analysis.pixel_distances(pretrained.grid_of(shown), pretrained.patch_size).mean().item()
    numbers = {"model": str(config.model), "data": source.name, "image size": list(size), "spread evenly": even}
    files: dict[str, Any] = {}
    distances: dict[str, torch.Tensor] = {}
    for name, vit in {"random start": ViT(pretrained.config), "pretrained": pretrained}.items():
        vit.to(accelerator.device)
        numbers[name], pictures, missing = analysed(vit, readable(source, ids, view, accelerator.device), shown)
        files |= {f"{name.split()[0]}-{what}.png": picture for what, picture in pictures.items()}
        distances[name] = torch.tensor(numbers[name]["attention distance"]["renormalised"])
    accelerator.print(f"{'mean attention distance, pixels':<36}" + "".join(f"{name:<26}" for name in distances))
    for layer in range(pretrained.depth):
        heads = [each[layer] for each in distances.values()]
        cells = [f"{d.mean():.1f} (heads {d.min():.1f} to {d.max():.1f})" for d in heads]
        accelerator.print(f"{f'layer {layer + 1}':<36}" + "".join(f"{cell:<26}" for cell in cells))
    used = numbers["pretrained"]["images"]
    accelerator.print(f"Attention spread evenly over the image would give {even:.1f}. {used:,} images of {source.name}")
    if used < len(ids):
        accelerator.print(f"{len(ids) - used:,} of {len(ids):,} images cannot be read and are left out")
    for sentence in filter(None, (note, *missing)):
        accelerator.print(sentence)
    if accelerator.is_main_process:
        try:
            durable.replace_text(config.out / "analysis.json", json.dumps(numbers, indent=1) + "\n")
            plotted = {name: each.tolist() for name, each in distances.items()}
            durable.replace_text(config.out / "distances.svg", page.alone(distance_chart(plotted, even)))
            for file, picture in files.items():
                picture.save(config.out / file, "PNG")
        except OSError as error:
            raise CannotWrite(f"--out {config.out} cannot be written: {error.strerror or error}") from error
    accelerator.print(f"All numbers and the pictures are in {config.out}")
    return numbers


if __name__ == "__main__":
    run_cli(main, Config)
