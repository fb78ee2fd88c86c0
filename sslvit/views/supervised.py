"""The view of supervised training: a random resized crop, a flip, RandAugment, random erasing."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from sslvit import rng
from sslvit.processes.device import send
from sslvit.views.batching import Size, to_pair, true_indices
from sslvit.views.crop import TRIES, Crop, draw_boxes, resized
from sslvit.views.pretraining import CropFlip, fit
from sslvit.views.randaugment import Augmentation, RandAugment
from sslvit.views.resample import Interpolation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class Erasing(NamedTuple):
    """A box of each sample that is replaced by noise, if chosen."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    chosen: Tensor
    noise: Tensor  # the key of the noise


class SupervisedDraw(NamedTuple):
    crop: Crop
    augmentation: Augmentation | None
    erasing: Erasing


def draw_erasing(key: Tensor, size: tuple[int, int], probability: float) -> Erasing:
    """Random erasing (https://arxiv.org/abs/1708.04896): ten tries to fit a random share of the area, else nothing."""
    (height, width), scale, ratio = size, (0.02, 1 / 3), (0.3, 1 / 0.3)
    u = rng.uniform(key, 2 * TRIES + 3).double()
    area, aspect = draw_boxes(u, height * width, scale, ratio)
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    first = torch.where((h < height) & (w < width), torch.arange(TRIES), TRIES).amin(-1, keepdim=True)
    taken = first.clamp(max=TRIES - 1)
    h, w = h.gather(-1, taken).squeeze(-1), w.gather(-1, taken).squeeze(-1)
    top, left = (u[:, -3] * (height - h + 1)).floor(), (u[:, -2] * (width - w + 1)).floor()
    chosen = (u[:, -1] < probability) & (first < TRIES).squeeze(-1)
    return Erasing(top.long(), left.long(), h.long(), w.long(), chosen, rng.fold(key, "noise"))


def erase_(images: Tensor, erasing: Erasing) -> None:
    """b c h w: fills the chosen boxes with normal noise of ImageNet's mean and deviation, cut to [0, 1].

    DeiT's erased pixels are standard normal after standardisation; 4% of them lie outside [0, 1], and are clipped.
    """
    rows, channels = true_indices(erasing.chosen.tolist()), images.shape[1]
    if not rows:
        return
    boxes = [[int(x[row]) for x in erasing[:4]] for row in rows]
    most = max(height * width for _, _, height, width in boxes)
    noise = normal(send(erasing.noise[rows], images.device), channels * most)
    mean, std = (x if channels == 3 else [sum(x) / len(x)] * channels for x in (MEAN, STD))
    mean, std = send(torch.tensor([mean, std]).view(2, -1, 1, 1), images.device)
    for row, (top, left, height, width), values in zip(rows, boxes, noise, strict=True):
        box = images[row, :, top : top + height, left : left + width]
        box.copy_(rearrange(values[: channels * height * width], "(c h w) -> c h w", h=height, w=width))
        box.mul_(std).add_(mean).clamp_(0, 1)


def normal(key: Tensor, count: int) -> Tensor:
    """rng.normal for the many values of an erased box, by the inverse of the distribution function: several times as
    fast, and of 24 bits, so no value is beyond 5.3 (but for -inf once in 2^24)."""
    return rng.uniform(key, count).mul_(2).sub_(1).erfinv_().mul_(2**0.5)


@dataclass(frozen=True)
class SupervisedView(CropFlip):
    scale: tuple[float, float] = (0.05, 1.0)
    interpolation: Interpolation = "bilinear"
    augment: RandAugment | None = None
    erase: float = 0.0

    @classmethod
    def deit(cls, size: Size) -> "SupervisedView":
        """https://arxiv.org/abs/2012.12877, whose crops are not smaller than 8 %."""
        return cls(size, (0.08, 1.0), interpolation="bicubic", augment=RandAugment.deit(), erase=0.25)

    @classmethod
    def plain_vit(cls, size: Size, magnitude: float = 10.0) -> "SupervisedView":
        """https://arxiv.org/abs/2205.01580: the inception crop of 5 % and more. (TensorFlow draws its aspect ratio
        uniformly and resizes without antialiasing; we draw and resize as everywhere here.)"""
        return cls(size, augment=RandAugment.plain_vit(magnitude))

    def draw(self, key: Tensor, extents: Tensor) -> SupervisedDraw:
        return SupervisedDraw(
            self.crop(key, extents),
            self.augment.draw(rng.fold(key, "augment")) if self.augment else None,
            draw_erasing(rng.fold(key, "erase"), to_pair(self.size), self.erase),
        )

    def apply(self, pixels: Tensor, drawn: SupervisedDraw) -> Tensor:
        def change_(images: Tensor, piece: slice) -> None:
            if self.augment and drawn.augmentation:
                self.augment.apply_(images, Augmentation(*(x[piece] for x in drawn.augmentation)))
            erase_(images, Erasing(*(x[piece] for x in drawn.erasing)))

        size = to_pair(self.size)
        return fit(pixels, resized(drawn.crop, size), size, self.interpolation, change_)
