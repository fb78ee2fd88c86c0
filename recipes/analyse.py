"""Looks into a pretrained ViT: what its patches and images have in common, and the pictures of the ViT paper.

    python recipes/analyse.py --model runs/mpp/model --data shapes --out runs/analysis

Principal components of patch features, the nearest patches of a chosen one, a map of images, attention by head; and the
principal components of its filters, the similarity of its positions, how far each head of each layer looks, attention
rollout. Each also of the same architecture with random weights. What a model does not have (a hybrid no filters of
pixels, relative positions no table) is left out, with a sentence. report.html and report.md show all of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sslvit.cli import run_cli
from sslvit.config import ImagesConfig, check_bounds, option
from sslvit.errors import CannotWrite, DataError
from sslvit.evaluate import analysis
from sslvit.evaluate.labelled import open_split
from sslvit.evaluate.monitor import draw_ids
from sslvit.models.vit import ViT
from sslvit.processes.collectives import start
from sslvit.reports import analysis as report
from sslvit.reports.pictures import distance_chart
from sslvit.runs.public import public
from sslvit.views.batching import Size, to_pair
from sslvit.weights.foreign.options import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig, ImagesConfig):
    """Look at a pretrained ViT's features, attention, filters and positions. No labels are needed."""

    out: Path = Path("runs/analysis")
    """A folder for report.html, analysis.json and the pictures; files of these names are replaced."""
    image_size: Size = 0
    """Side in pixels; 0 takes the model's own. Distances are in pixels of images of this size."""
    split: Literal["train", "test"] = "train"
    """The images to look at."""
    images: int = option(128, least=0)
    """Random images whose attention distance is averaged; 0 takes all. The paper has 128."""
    shown: int = option(8, above=0, most=32)
    """Images whose patches and attention are drawn, at most 32."""
    patch: tuple[int, int, int] | None = option(None, least=1)
    """Image, row and column of a patch whose nearest ones in other images are shown, each counted from 1. The image is
    one of those drawn. By default the patch of the first image with the largest first principal component."""
    threads: int = option(0, least=0)
    """CPU threads; 0 takes one per core."""


def main(config: Config) -> dict[str, Any]:
    check_bounds(config)
    accelerator = start(threads=config.threads)
    pretrained, written = config.open()
    if not isinstance(pretrained, ViT):
        raise ValueError(f"{config.model} is a {type(pretrained).__name__}, which has no attention to look at")
    size = to_pair(config.image_size or pretrained.image_size)
    source, note = open_split(config, config.split, size, pretrained.channels)
    ids, view = draw_ids(source, config.images), config.eval_view(size)
    few = draw_ids(source, min(len(ids), report.at_once(pretrained, size, config.shown)))
    together = report.Together(source, few, view, accelerator)
    found = list(report.first_of(together.images(few), config.shown))
    if not found:
        raise DataError(f"none of {len(ids):,} images of {source.name} can be read")
    shown = torch.cat(found)
    if config.patch:
        report.check_patch(config.patch, len(shown), pretrained.grid_of(shown))
    even = analysis.pixel_distances(pretrained.grid_of(shown), pretrained.patch_size).mean().item()
    numbers = {"model": str(config.model), "data": source.name, "image size": list(size), "spread evenly": even}
    pictures, distances, patch, missing = {}, {}, config.patch, []
    for name, vit in {"pretrained": pretrained, "random start": ViT(pretrained.config)}.items():
        vit.to(accelerator.device)
        inside = report.look_inside(vit, together.images(ids), shown)
        seen, patch = report.what_it_sees(vit, written["readout"], together, shown, patch)
        numbers[name], pictures[name] = inside.numbers | seen.numbers, seen.pictures | inside.pictures
        distances[name], missing = torch.tensor(inside.numbers["attention distance"]["renormalised"]), inside.missing
    distances = dict(reversed(distances.items()))
    table = [["mean attention distance, pixels", *distances]]
    for layer in range(pretrained.depth):
        heads = [each[layer] for each in distances.values()]
        cells = [f"{d.mean():.1f} (heads {d.min():.1f} to {d.max():.1f})" for d in heads]
        table.append([f"layer {layer + 1}", *cells])
    used = numbers["pretrained"]["images"]
    sentences = [
        f"Attention spread evenly over the image would give {even:.1f}. {used:,} images of {source.name}",
        f"{len(ids) - used:,} of {len(ids):,} images cannot be read and are left out" if used < len(ids) else "",
        *(note, *missing),
        f"The chosen patch: --patch {' '.join(map(str, patch or ()))} (image, row, column)",
        f"The map of images: {numbers['pretrained']['map']}",
    ]
    sentences = [sentence for sentence in sentences if sentence]
    for row in table:
        accelerator.print(f"{row[0]:<36}" + "".join(f"{cell:<26}" for cell in row[1:]))
    for sentence in sentences:
        accelerator.print(sentence)
    if accelerator.is_main_process:
        chart = distance_chart({name: each.tolist() for name, each in distances.items()}, even)
        try:
            title = f"Inside {pretrained.name}, on {public(source.name)}"
            report.write(config.out, title, list(map(public, sentences)), table, numbers, chart, pictures)
        except OSError as error:
            raise CannotWrite(f"--out {config.out} cannot be written: {error.strerror or error}") from error
    accelerator.print(f"All numbers and the pictures are in {config.out}; report.html shows them")
    return numbers


if __name__ == "__main__":
    run_cli(main, Config)
