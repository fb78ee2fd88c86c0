"""The view of training on masks: one random scale, crop and flip for an image and its mask.

That of DINOv2's and DINOv3's linear protocol, and of mmsegmentation before them: the shorter side becomes the view's
size times a random factor, a square of the size is cut out, and half of them are flipped. Colours change with
probability 1/2 each: brightness by 1/8, contrast and saturation by 1/2, hue by 1/20 of a turn. Pixels are interpolated;
a mask has the class of the nearest pixel.

Deviations: where an image is smaller than the view its border is repeated, and not scored (there it is padded, and not
scored); brightness is a factor, and comes first and contrast second (there an amount, and contrast may come last); no
limit on how much of a crop one class may fill (there 3/4, of ten tries).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sslvit import rng
from sslvit.processes.device import send, send_together
from sslvit.views.batching import Size, checked, to_pair
from sslvit.views.color import OPERATIONS
from sslvit.views.pretraining import fit
from sslvit.views.resample import Axis

IGNORED = 255  # in a mask


class SegmentationDraw(NamedTuple):
    axes: tuple[Axis, Axis]
    factors: Tensor  # b 4: of OPERATIONS, neutral where they are not chosen


@dataclass(frozen=True)
class SegmentationView:
    """b (c + 1) H W with the mask as the last channel -> images b c h w, and masks b 1 h w: class / 255."""

    size: Size
    ratio: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    strengths: tuple[float, float, float, float] = (1 / 8, 0.5, 0.5, 0.05)  # brightness, contrast, saturation, hue
    color: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio} must be two factors above 0, the smaller first")

    def draw(self, key: Tensor, extents: Tensor) -> SegmentationDraw:
        u = rng.uniform(rng.fold(key, "segmentation"), 12).double()
        size = torch.tensor(to_pair(self.size))
        factor = self.ratio[0] + (self.ratio[1] - self.ratio[0]) * u[:, :1]
        # So that the image just covers the view at factor 1.
        cover = (size / extents).amax(-1, keepdim=True)
        resized = (extents * cover * factor).round().long().clamp(min=1)
        offset = (u[:, 1:3] * ((resized - size).clamp(min=0) + 1)).floor().long()
        flip = torch.stack([torch.zeros(len(u), dtype=torch.bool), u[:, 3] < self.flip], -1)
        parts = (torch.zeros_like(extents), extents, resized, offset, flip)
        vertical, horizontal = (Axis(*x) for x in zip(*(part.unbind(-1) for part in parts), strict=True))
        neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
        factors = neutral + torch.tensor(self.strengths) * (2 * u[:, 4:8].float() - 1)
        return SegmentationDraw((vertical, horizontal), torch.where(u[:, 8:] < self.color, factors, neutral))

    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        key, extents = checked(pixels, key, extents)
        drawn, size = self.draw(rng.fold(key, "view", 0), extents), to_pair(self.size)
        factors = send(drawn.factors, pixels.device)[:, :, None, None, None].unbind(1)

        def recolour_(images: Tensor, piece: slice) -> None:
            for change_, factor in zip(OPERATIONS, factors, strict=True):
                change_(images, factor[piece])

        images = fit(pixels[:, :-1], drawn.axes, size, "bilinear", recolour_)
        return images, nearest(pixels[:, -1], drawn.axes, size)[:, None] / 255


def nearest(masks: Tensor, axes: tuple[Axis, Axis], size: tuple[int, int]) -> Tensor:
    """The class of the nearest pixel, IGNORED outside the image: b H W -> b h w"""
    rows, columns = (_sources(axis, length) for axis, length in zip(axes, size, strict=True))
    places = rows.clamp(min=0)[:, :, None] * masks.shape[2] + columns.clamp(min=0)[:, None, :]
    outside = (rows < 0)[:, :, None] | (columns < 0)[:, None, :]
    places, outside = send_together((places.flatten(1), outside), masks.device)
    return masks.flatten(1).gather(1, places).view(-1, *size).masked_fill(outside, IGNORED)


def _sources(axis: Axis, size: int) -> Tensor:
    """The pixel under the middle of each pixel of the output, -1 outside the image: b size"""
    start, length, resized, offset, flip = (values[:, None] for values in axis)
    place = torch.arange(size)
    place = torch.where(flip, size - 1 - place, place) + offset
    source = start + ((2 * place + 1) * length).div(2 * resized, rounding_mode="floor")
    return torch.where(place < resized, source, -1)
