"""Pictures of predicted classes of pixels."""

import colorsys
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sslvit.data.masks import MaskedSource
from sslvit.evaluate.dense.probes import Answers, predictions, scored
from sslvit.evaluate.dense.scores import PixelCounts
from sslvit.evaluate.dense.windows import Window, Windows, patch_features
from sslvit.evaluate.features import gather
from sslvit.objectives.segmentation import Segmentation
from sslvit.processes import collectives
from sslvit.storage import durable
from sslvit.views.segmentation import IGNORED

SHOWN = 8  # images
SIDE = 128  # pixels of each
GOLDEN = 0.618033988749895  # of the circle of hues, so that neighbouring classes differ


def segmented(
    objective: Segmentation, test: MaskedSource, size: int, device: torch.device, picture: Path, workers: int
) -> PixelCounts:
    """A trained model on all test images, read by windows, some of them drawn. Every process takes its share."""
    objective.to(device).eval()
    backbone, layers, classes = objective.backbone, objective.layers, len(test.classes)
    share = -(-len(test) // collectives.processes())
    rows = np.arange(len(test))[collectives.rank() * share :][:share]
    rows = rows if len(rows) else np.arange(1)  # more processes than images: it is cut off again
    seen = patch_features(backbone, test, rows, Window(size), device, layers=layers, workers=workers)

    @torch.no_grad()
    def head(maps: Tensor) -> Tensor:
        return objective.head(rearrange(maps, "k h w d -> k d h w").to(device)).float().cpu()

    answers = predictions(seen, {"head": head})
    if collectives.rank() == 0:
        answers = draw_predictions(answers, "head", classes, picture)
    mine = scored(answers, classes, ("head",))["head"]
    return PixelCounts(*(gather(part, share, len(test), device) for part in mine))


def draw_predictions(answers: Answers, head: str, classes: int, file: Path) -> Answers:
    """The same, and when all have passed the first few are drawn: image, mask, prediction, one below the other."""
    columns: list[Tensor] = []
    colors = palette(classes)
    for one, answer in answers:
        if len(columns) < SHOWN:
            image, place = middle(one.windows)
            maps = (colored(part[place], colors) for part in (one.windows.mask, answer[head]))
            columns.append(torch.cat([_square(image, "bilinear"), *map(_square, maps)], 1))
        yield one, answer
    pixels = rearrange(torch.cat(columns, 2), "c h w -> h w c")
    durable.replace_picture(file, Image.fromarray(pixels.numpy()))


def palette(classes: int) -> Tensor:
    """A colour for each class, and black for IGNORED: 256 3"""
    colors = torch.zeros(IGNORED + 1, 3, dtype=torch.uint8)
    for index in range(classes):
        value, saturation = (1.0, 0.55) if index % 2 else (0.75, 0.9)
        rgb = colorsys.hsv_to_rgb(index * GOLDEN % 1, saturation, value)
        colors[index] = torch.tensor([round(255 * part) for part in rgb], dtype=torch.uint8)
    return colors


def colored(mask: Tensor, colors: Tensor) -> Tensor:
    return rearrange(colors[mask.long()], "h w c -> c h w")


def middle(windows: Windows) -> tuple[Tensor, tuple[slice, slice]]:
    """The window nearest to the middle, and its place in the mask."""
    side, size = windows.image.shape[-1], torch.tensor(windows.size)
    nearest = (2 * windows.corners + side - size).square().sum(1).argmin()
    scale = torch.tensor(windows.mask.shape) / size
    edges = torch.stack([windows.corners[nearest], windows.corners[nearest] + side]) * scale
    (top, left), (bottom, right) = edges.round().long().tolist()
    return windows.image[nearest], (slice(top, bottom), slice(left, right))


def _square(image: Tensor, mode: str = "nearest-exact") -> Tensor:
    """c h w in SIDE pixels."""
    if mode == "nearest-exact":
        return F.interpolate(image[None], (SIDE, SIDE), mode=mode)[0]
    return F.interpolate(image[None].float(), (SIDE, SIDE), mode=mode, antialias=True)[0].clamp(0, 255).byte()
