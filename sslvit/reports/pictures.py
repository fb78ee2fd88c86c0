"""The pictures of a run: what was seen, what was made of it, and what the model looks at. They lie in its pictures/."""

import logging
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from sslvit import rng
from sslvit.config import TrainConfig
from sslvit.data.loader import Views
from sslvit.data.source import Images, Source
from sslvit.evaluate import analysis
from sslvit.evaluate.knn import neighbours
from sslvit.models.readout import read
from sslvit.models.vit import ViT
from sslvit.objectives.objective import Batch, Objective
from sslvit.reports import figures, page
from sslvit.reports.charts import column_chart
from sslvit.reports.show_views import draw
from sslvit.storage import durable
from sslvit.training.batches import sampler_for
from sslvit.views.pretraining import EvalView, eval_view

log = logging.getLogger(__name__)
SHOWN = 8  # images of a picture
SEARCHED = 1000  # images among which nearest neighbours are shown


@torch.no_grad()
def draw_pictures(
    config: TrainConfig, objective: Objective, source: Images, views: Views, accelerator: Accelerator
) -> None:
    folder, device = config.out / "pictures", accelerator.device
    folder.mkdir(exist_ok=True)
    samples = sampler_for(source, config, accelerator).first(SHOWN)
    samples = samples._replace(pixels=samples.pixels[:SHOWN].to(device), ids=samples.ids[:SHOWN])
    extents = None if samples.extents is None else samples.extents[:SHOWN].to(device)
    key = rng.key(config.seed, samples.ids.to(device))
    seen = views(samples.pixels, key, extents)
    (whole,) = EvalView(tuple(seen[0].shape[-2:]))(samples.pixels, key, extents)
    draw(tuple(x.cpu() for x in (whole, *seen)), folder / "views.png", across=True)
    objective.eval()
    if made := objective.reconstructed(Batch(seen, key)):
        draw(tuple(x.cpu() for x in (seen[0], *made)), folder / "reconstructions.png", across=True)
    if isinstance(source, Source):
        draw(nearest(objective, source, device), folder / "neighbours.png")
    if isinstance(objective.backbone, ViT):
        look_inside(objective.backbone, whole, folder)


def nearest(objective: Objective, source: Source, device: torch.device) -> tuple[torch.Tensor, ...]:
    """A few images, each with those that are nearest by the declared readout: the image, then the nearest first."""
    backbone = objective.backbone
    ids = np.random.default_rng(0).permutation(len(source))[:SEARCHED]
    view, parts, images = eval_view(backbone.image_size), [], []
    for some in np.array_split(np.sort(ids), -(-len(ids) // 100)):
        samples = source.read(some)
        extents = None if samples.extents is None else samples.extents.to(device)
        (batch,) = view(samples.pixels.to(device), rng.key(0, samples.ids.to(device)), extents)
        parts.append(read(backbone(batch), objective.readout).float().cpu())
        images.append(batch.cpu())
    features, images = torch.cat(parts), torch.cat(images)
    asked = torch.linspace(0, len(features) - 1, min(SHOWN, len(features))).long()
    (found,) = neighbours(features, features[asked], k=min(7, len(features)))
    return tuple(images[found.rows[:, place]] for place in range(found.rows.shape[1]))


def look_inside(vit: ViT, images: torch.Tensor, folder: Path) -> None:
    """The ViT paper's figures of this model, those that it has."""
    start = ViT(vit.config).to(images.device)
    distances = {
        name: analysis.mean_attention_distance(model, [images]).renormalised.tolist()
        for name, model in {"random start": start, "trained": vit}.items()
    }
    even = analysis.pixel_distances(vit.grid_of(images), vit.patch_size).mean().item()
    durable.replace_text(folder / "distances.svg", page.alone(distance_chart(distances, even)))
    maps = analysis.attention_maps(vit, images)
    both = {"rollout": maps.rollout, "last layer": maps.last.mean(1)}
    sheet = figures.attention_sheet(images.cpu(), {name: x.cpu() for name, x in both.items()})
    durable.replace_picture(folder / "attention.png", sheet)
    try:
        durable.replace_picture(folder / "filters.png", figures.filter_sheet(analysis.filters(vit).components))
        tiles = figures.similarity_tiles(analysis.position_similarity(vit))
        durable.replace_picture(folder / "positions.png", tiles)
    except ValueError as error:  # a hybrid has no filters of pixels, some models no table of positions
        log.info("%s", error)


def distance_chart(distances: dict[str, list[list[float]]], even: float) -> str:
    """Mean attention distances in pixels by model: a list per layer, a number per head."""
    level = ("attention spread evenly", even)
    return column_chart(distances, x="layer", y="mean attention distance, pixels", level=level)
