"""The boxes of views: random as in torchvision's RandomResizedCrop, and the centres of evaluation."""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from sslvit import rng
from sslvit.views.batching import to_pair
from sslvit.views.resample import Axis

TRIES = 10


class Crop(NamedTuple):
    """Boxes, a row per sample."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor


class Scaled:
    """A view that crops. Its scales are shares of the image's area."""

    def __post_init__(self) -> None:
        for name in ("scale", "small_scale"):
            low, high = getattr(self, name, (1.0, 1.0))
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"{name} ({low:g}, {high:g}) must be shares of an image, above 0 and at most 1, the smaller first"
                )

    @property
    def canvas(self) -> int:
        """The side, a multiple of 32, of a canvas on which the smallest crop of a 4:3 photograph has as many pixels as
        the view."""
        sides = []
        for name in ("", "small_"):
            if hasattr(self, f"{name}scale"):
                size, (least, _) = getattr(self, f"{name}size"), getattr(self, f"{name}scale")
                sides.append(max(to_pair(size)) / math.sqrt(3 / 4 * least))
        return -(-math.ceil(max(sides)) // 32) * 32


def draw_boxes(
    u: Tensor, area: Tensor | int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Uniform shares of the area and log-uniform aspect ratios: b tries, b tries"""
    low, high = torch.tensor(ratio, dtype=torch.float64).log().tolist()
    aspect = (low + (high - low) * u[:, TRIES : 2 * TRIES]).exp()
    return area * (scale[0] + (scale[1] - scale[0]) * u[:, :TRIES]), aspect


def draw_crop(
    key: Tensor, extents: Tensor, scale: tuple[float, float], ratio: tuple[float, float], flip: float
) -> Crop:
    """Ten tries to fit a random share of the area and a log-uniform aspect ratio, else the largest central box.

    All ten are drawn at once and the first that fits is taken: the same distribution. In float64, because devices round
    exp differently, and a half rounded the other way is another box.
    """
    u = rng.uniform(key, 2 * TRIES + 3).double()
    height, width = extents.double().split(1, dim=-1)
    area, aspect = draw_boxes(u, height * width, scale, ratio)
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = torch.where(fits, torch.arange(TRIES), TRIES).amin(-1, keepdim=True)
    fitted, taken = first < TRIES, first.clamp(max=TRIES - 1)
    # Else all of the image if its own ratio is allowed, or the largest part with the nearest allowed one.
    h = torch.where(fitted, h.gather(-1, taken), torch.minimum(height, (width / ratio[0]).round()))
    w = torch.where(fitted, w.gather(-1, taken), torch.minimum(width, (height * ratio[1]).round()))
    top = torch.where(fitted, u[:, -3:-2] * (height - h + 1), (height - h) / 2).floor()
    left = torch.where(fitted, u[:, -2:-1] * (width - w + 1), (width - w) / 2).floor()
    top, left, h, w = rearrange([top, left, h.clamp(min=1), w.clamp(min=1)], "box b 1 -> box b").long()
    return Crop(top, left, h, w, flip=u[:, -1] < flip)


def resized(crop: Crop, size: tuple[int, int]) -> tuple[Axis, Axis]:
    """The box, flipped or not, fills the output."""
    nothing = torch.zeros_like(crop.top)
    vertical = Axis(crop.top, crop.height, nothing + size[0], nothing, nothing.bool())
    return vertical, Axis(crop.left, crop.width, nothing + size[1], nothing, crop.flip)


def centered(extents: Tensor, cover: tuple[int, int] | None, size: tuple[int, int]) -> tuple[Axis, Axis]:
    """All of the image fills the output; or it is resized, its shape kept, to just cover `cover`, and the centre is
    kept. Of a square that means its shorter side."""
    target = torch.tensor(size)
    whole = target.expand_as(extents)
    if cover is not None:
        # torchvision's rule: the side that leaves room is truncated to whole pixels.
        height, width = extents.unbind(-1)
        by_height = torch.stack([torch.full_like(height, cover[0]), cover[0] * width // height], -1)
        by_width = torch.stack([cover[1] * height // width, torch.full_like(width, cover[1])], -1)
        whole = torch.where((height * cover[1] <= width * cover[0]).unsqueeze(-1), by_height, by_width)
    # Half offsets go to the even pixel, as Python's round has it in torchvision's center_crop.
    offset = ((whole - target) / 2).round().long()
    nothing = torch.zeros_like(extents)
    vertical, horizontal = (
        Axis(*x) for x in zip(*(t.unbind(-1) for t in (nothing, extents, whole, offset, nothing.bool())), strict=True)
    )
    return vertical, horizontal
