"""Mixup (https://arxiv.org/abs/1710.09412) and cutmix (https://arxiv.org/abs/1905.04899): a batch with itself."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from sslvit import rng

Box = tuple[int, int, int, int]  # top, bottom, left, right
Partner = Literal["reversed", "next"]


def targets(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Class numbers, b -> probabilities, b k; `smoothing` of the mass is spread over all classes."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def partners(batch: Tensor, partner: Partner) -> Tensor:
    """DeiT mixes sample i with the i-th from the end, plain ViTs with the one before it."""
    return batch.flip(0) if partner == "reversed" else batch.roll(1, 0)


def mixup(images: Tensor, labels: Tensor, share: float, partner: Partner = "reversed") -> tuple[Tensor, Tensor]:
    """b c h w and b k, each `share` of itself and the rest of its partner."""
    return tuple(x * share + partners(x, partner) * (1 - share) for x in (images, labels))


def cutmix(images: Tensor, labels: Tensor, box: Box, partner: Partner = "reversed") -> tuple[Tensor, Tensor]:
    """b c h w and b k, with a box of the partner's pixels, and as much of its label as the box covers."""
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = partners(images, partner)[..., top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    return mixed, labels * share + partners(labels, partner) * (1 - share)


def draw_beta(key: Tensor, alpha: float) -> float:
    """One draw of Beta(alpha, alpha) by Jöhnk's rejection: x^(1/alpha) and y^(1/alpha), if their sum is at most 1."""
    if not 0 < alpha <= 2:
        raise ValueError(f"alpha {alpha} is not in (0, 2], where the method finds a draw for certain")
    for x, y in rng.uniform(key, 256, 2).double().tolist():  # all refused: (5/6)^256 at alpha 2
        x, y = x ** (1 / alpha), y ** (1 / alpha)
        if 0 < x + y <= 1:
            return x / (x + y)
    raise AssertionError(f"256 tries gave no draw of Beta({alpha}, {alpha})")


def draw_box(key: Tensor, size: tuple[int, int], share: float) -> Box:
    """A box of 1 - share of the area around a random pixel, cut where it leaves the image."""
    edges = []
    for length, u in zip(size, rng.uniform(key, 2).tolist(), strict=True):
        side, centre = int(length * math.sqrt(1 - share)), int(u * length)
        edges += [max(centre - side // 2, 0), min(centre + (side + 1) // 2, length)]
    return tuple(edges)


@dataclass(frozen=True)
class Mix:
    """Mixup or cutmix of whole batches, one share a batch, drawn from Beta(alpha, alpha); alpha 0 is never."""

    classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    switch: float = 0.5  # how often cutmix, where both may be
    smoothing: float = 0.0
    partner: Partner = "reversed"
    larger: bool = False  # the larger share is always the sample's own

    @classmethod
    def deit(cls, classes: int) -> "Mix":
        return cls(classes, mixup=0.8, cutmix=1.0, smoothing=0.1)

    @classmethod
    def plain_vit(cls, classes: int) -> "Mix":
        return cls(classes, mixup=0.2, partner="next", larger=True)

    def __call__(self, images: Tensor, labels: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """b c h w, class numbers b, one key for the batch -> images and probabilities b k."""
        if key.ndim:
            raise ValueError(f"a batch is mixed by one key, not by keys of shape {tuple(key.shape)}")
        soft = targets(labels, self.classes, self.smoothing)
        cut = self.cutmix > 0 and (self.mixup == 0 or float(rng.uniform(rng.fold(key, "switch"), 1)) < self.switch)
        if not (cut or self.mixup):
            return images, soft
        share = draw_beta(rng.fold(key, "share"), self.cutmix if cut else self.mixup)
        if cut:
            return cutmix(images, soft, draw_box(rng.fold(key, "box"), images.shape[-2:], share), self.partner)
        return mixup(images, soft, max(share, 1 - share) if self.larger else share, self.partner)
