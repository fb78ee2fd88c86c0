"""The pictures/ of a run: its views, reconstructions, nearest neighbours, and the inside of its model."""

import logging
from math import ceil
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from sslvit import rng
from sslvit.config import TrainConfig
from sslvit.data.loader import Views
from sslvit.data.source import Images, Source
from sslvit.evaluate import analysis
from sslvit.evaluate.features import evaluation_mode
from sslvit.evaluate.knn import neighbors
from sslvit.evaluate.seen import pca_of_patches
from sslvit.models.readout import read
from sslvit.models.vit import ViT
from sslvit.objectives.objective import Batch, Objective
from sslvit.reports import figures, page, sheets
from sslvit.reports.charts import Line, line_chart
from sslvit.reports.show_views import draw
from sslvit.storage import durable
from sslvit.training.batches import sampler_for
from sslvit.views.pretraining import EvalView, eval_view

log = logging.getLogger(__name__)
SHOWN = 8  # images per picture
HEADS = 2  # images whose attention is shown by head
SEARCHED = 1000  # images among which nearest neighbours are searched


@torch.no_grad()
def draw_pictures(
    config: TrainConfig, objective: Objective, source: Images, views: Views, accelerator: Accelerator
) -> None:
    folder = config.out / "pictures"
    folder.mkdir(exist_ok=True)
    key, whole, seen = first_views(config, source, views, accelerator)
    draw(tuple(x.cpu() for x in (whole, *seen)), folder / "views.png", across=True)
    objective.eval()
    if reconstructions := objective.reconstructed(Batch(seen, key)):
        draw(tuple(x.cpu() for x in (seen[0], *reconstructions)), folder / "reconstructions.png", across=True)
    if isinstance(source, Source):
        draw(nearest(objective, source, accelerator.device), folder / "neighbours.png")
    if isinstance(objective.backbone, ViT):
        look_inside(objective.backbone, whole, folder)


def first_views(
    config: TrainConfig, source: Images, views: Views, accelerator: Accelerator, shown: int = SHOWN
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Keys of the first images, the whole images, and their views."""
    samples, device = sampler_for(source, config, accelerator).first(shown), accelerator.device
    pixels, extents = samples.pixels[:shown].to(device), samples.extents[:shown].to(device)
    key = rng.key(config.seed, samples.ids[:shown].to(device))
    seen = views(pixels, key, extents)
    (whole,) = EvalView(tuple(seen[0].shape[-2:]))(pixels, key, extents)
    return key, whole, seen


def nearest(objective: Objective, source: Source, device: torch.device) -> tuple[Tensor, ...]:
    """A few images, and their nearest ones by the declared readout, the nearest first: each b c h w."""
    backbone = objective.backbone
    view, ids = eval_view(backbone.image_size), np.random.default_rng(0).permutation(len(source))[:SEARCHED]
    rows, batches = [], []
    for batch_ids in np.array_split(np.sort(ids), -(-len(ids) // 100)):
        samples = source.read(batch_ids)
        pixels, extents = samples.pixels.to(device), samples.extents.to(device)
        (images,) = view(pixels, rng.key(0, samples.ids.to(device)), extents)
        rows.append(read(backbone(images), objective.readout).float().cpu())
        batches.append(images.cpu())
    features, images = torch.cat(rows), torch.cat(batches)
    queries = torch.linspace(0, len(features) - 1, min(SHOWN, len(features))).long()
    (neighbor,) = neighbors(features, features[queries], k=min(7, len(features)))
    return tuple(images[column] for column in neighbor.rows.unbind(1))


def look_inside(vit: ViT, images: Tensor, folder: Path) -> None:
    """The ViT paper's figures, as far as this model has them."""
    start = ViT(vit.config).to(images.device)
    distances = {
        name: analysis.mean_attention_distance(model, [images]).renormalised.tolist()
        for name, model in {"random start": start, "trained": vit}.items()
    }
    even = analysis.pixel_distances(vit.grid_of(images), vit.patch_size).mean().item()
    durable.replace_text(folder / "distances.svg", page.alone(distance_chart(distances, even)))
    maps = analysis.attention_maps(vit, images)
    sheet = figures.attention_sheet(images, {"rollout": maps.rollout, "last layer": maps.last.mean(1)})
    durable.replace_picture(folder / "attention.png", sheet)
    durable.replace_picture(folder / "heads.png", sheets.head_sheet(images[:HEADS], maps.last, attending(vit)))
    with evaluation_mode(vit, images.device.type):
        patches = vit(images).patches
    grid = vit.grid_of(images)
    durable.replace_picture(folder / "patches.png", sheets.patch_sheet(images, pca_of_patches(patches, grid), grid))
    try:
        durable.replace_picture(folder / "filters.png", figures.filter_sheet(analysis.filters(vit).components))
        tiles = figures.similarity_tiles(analysis.position_similarity(vit))
        durable.replace_picture(folder / "positions.png", tiles)
    except ValueError as error:  # a hybrid has no filters of pixels, some models no table of positions
        log.info("%s", error)


def attending(vit: ViT) -> str:
    return "the patches attend on average" if vit.cls_token is None else "the class token attends"


def distance_chart(distances: dict[str, list[list[float]]], even: float) -> str:
    """Mean attention distances in pixels by model: a list per layer, a number per head, dots side by side.
    even: that of attention spread evenly, as a line."""
    layers = max(len(by_layer) for by_layer in distances.values())
    lines = []
    for i, (name, by_layer) in enumerate(distances.items()):
        aside = 0.5 * (i - (len(distances) - 1) / 2) / len(distances)
        x = [layer + aside for layer, heads in enumerate(by_layer, start=1) for _ in heads]
        lines.append(Line(name, x, [distance for heads in by_layer for distance in heads], connected=False))
    lines.append(Line("attention spread evenly", [0.5, layers + 0.5], [even, even]))
    ticks = [float(layer) for layer in range(1, layers + 1, ceil(layers / 12))]
    return line_chart(lines, x="layer", y="mean attention distance, pixels", ticks=ticks)
