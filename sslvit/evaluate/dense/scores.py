"""Mean intersection over union, pixel accuracy, and their intervals over test images.

The numbers of a set are those of its pixels all together, as in mmsegmentation and torchmetrics: of each class the
pixels that are right, over those that are predicted or true. Classes that are neither are left out of the mean. Ignored
pixels count nowhere. Intervals are by a bootstrap over images, paired between two models.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslvit.evaluate.statistics import LEVEL, RESAMPLES, Difference, Interval, p_value, t_quantile
from sslvit.views.segmentation import IGNORED

CHUNK = 500  # resamples at a time


class PixelCounts(NamedTuple):
    """Pixels of each test image and class, n c each, int64."""

    right: Tensor  # predicted and true
    predicted: Tensor
    true: Tensor

    @property
    def iou(self) -> Tensor:
        """Of each class, NaN of one that is neither predicted nor true: c"""
        right, union = self.right.sum(0).double(), (self.predicted + self.true - self.right).sum(0).double()
        return right / union

    @property
    def mean_iou(self) -> float:
        return float(self.iou.nanmean())

    @property
    def pixel_accuracy(self) -> float:
        return float(self.right.sum() / self.true.sum())

    def interval(self) -> Interval:
        """Of the mean IoU, over test images."""
        low, high = resampled(self).quantile(torch.tensor(ENDS, dtype=torch.float64)).tolist()
        return Interval(self.mean_iou, low, high)


ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def count(predicted: Tensor, mask: Tensor, classes: int) -> Tensor:
    """The counts of one image: h w, h w -> 3 c"""
    if predicted.shape != mask.shape:
        raise ValueError(f"a prediction of shape {tuple(predicted.shape)} for a mask of {tuple(mask.shape)}")
    seen = mask != IGNORED
    predicted, mask = predicted[seen].long(), mask[seen].long()
    right = predicted[predicted == mask]
    return torch.stack([values.bincount(minlength=classes) for values in (right, predicted, mask)])


def gathered(counts: list[Tensor]) -> PixelCounts:
    """Of images in order: 3 c each"""
    return PixelCounts(*torch.stack(counts, 1))


def resampled(counts: PixelCounts) -> Tensor:
    """Mean IoU of sets of test images drawn with replacement, the same for equally many images: RESAMPLES, float64"""
    means, parts = [], [part.double() for part in counts]
    for drawn in draws(len(counts.true)).split(CHUNK):
        right, predicted, true = (drawn.double() @ part for part in parts)
        means.append((right / (predicted + true - right)).nanmean(-1))
    return torch.cat(means)


@lru_cache(maxsize=1)  # the test images of all models are the same
def draws(number: int) -> Tensor:
    """How often each of so many images is drawn: RESAMPLES number. Drawing takes the longest of it all."""
    drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), RESAMPLES)
    return torch.from_numpy(drawn.astype(np.int16))


def difference(first: list[PixelCounts], second: list[PixelCounts]) -> Difference:
    """First minus second in mean IoU, of models of as many seeds on the same test images. As that of accuracies
    (statistics.py), but that the variance over images is the bootstrap's."""
    if not first or len(first) != len(second) or len({len(counts.true) for counts in [*first, *second]}) != 1:
        sizes = [[len(counts.true) for counts in side] for side in (first, second)]
        raise ValueError(f"counts do not pair up: images by seed are {sizes[0]} and {sizes[1]}")
    gaps = torch.tensor([a.mean_iou - b.mean_iou for a, b in zip(first, second, strict=True)], dtype=torch.float64)
    draws = torch.stack([resampled(a) - resampled(b) for a, b in zip(first, second, strict=True)]).mean(0)
    mean, seeds, of_images = gaps.mean().item(), len(gaps), draws.var().item()
    if seeds == 1:
        low, high = draws.quantile(torch.tensor(ENDS, dtype=torch.float64)).tolist()
        return Difference(mean, low, high, 1, p_value(mean, math.sqrt(of_images), math.inf))
    of_seeds = gaps.var().item() / seeds
    degrees = (of_images + of_seeds) ** 2 / (of_seeds**2 / (seeds - 1)) if of_seeds else math.inf
    error = math.sqrt(of_images + of_seeds)
    reach = t_quantile(LEVEL, degrees) * error
    return Difference(mean, max(mean - reach, -1.0), min(mean + reach, 1.0), seeds, p_value(mean, error, degrees))
