"""Statistics of results: means and intervals over seeds, and differences between two methods on the same test images.

A difference has two sources of chance: the test images, and the seed. The first is measured by a paired bootstrap over
the images, the second by the variance over seeds, which share their starting weights between methods. The variances
add, and Student's t has Satterthwaite's degrees of freedom: many if the images decide, seeds - 1 if the seeds do. With
one seed the second is not measured, and every sentence says so.

Student's interval of few seeds can reach beyond the range of an accuracy (0 to 1) or a difference (-1 to 1). It is
clipped there, which leaves its coverage as it is.
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 10_000


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def t_quantile(level: float, degrees: float) -> float:
    """The half-width of the two-sided interval of this level, in standard errors."""
    if degrees > 1e4:
        return NormalDist().inv_cdf((1 + level) / 2)
    # With t = sqrt(degrees) tan(angle) the density is cos(angle)^(degrees - 1): smooth, on a bounded range.
    angle = np.linspace(0, np.pi / 2, 200_001)
    mass = np.cumsum(np.cos((angle[1:] + angle[:-1]) / 2) ** (degrees - 1))
    return float(np.sqrt(degrees) * np.tan(np.interp(level * mass[-1], mass, angle[1:])))


def over_seeds(values: list[float]) -> Interval | None:
    """The mean accuracy and Student's interval for it; None for one seed."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    reach = t_quantile(LEVEL, len(values) - 1) * error
    return Interval(mean, max(mean - reach, 0.0), min(mean + reach, 1.0))


def bootstrap_means(values: Tensor) -> Tensor:
    """Means of samples drawn from the values with replacement: n -> RESAMPLES, float64. Few values are distinct, and
    the counts of each are multinomial."""
    distinct, counts = values.double().unique(return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values), counts.double().numpy() / len(values), RESAMPLES)
    return torch.from_numpy(drawn).double() @ distinct / len(values)


class Difference(NamedTuple):
    """First minus second, in accuracy."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def significant(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def points(self) -> str:
        return f"{100 * self.mean:+.1f} points, 95% CI [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    @property
    def measured(self) -> str:
        """The remark at the end of a sentence about it."""
        return "" if self.seeds > 1 else "; seeds were not measured"


def difference(first: list[Tensor], second: list[Tensor]) -> Difference:
    """first, second: which test images were right, a tensor of booleans per seed; seeds and images pair up."""
    if not first or len(first) != len(second) or len({len(right) for right in [*first, *second]}) != 1:
        sizes = [[len(right) for right in side] for side in (first, second)]
        raise ValueError(f"predictions do not pair up: images by seed are {sizes[0]} and {sizes[1]}")
    gaps = torch.stack([a.double() - b.double() for a, b in zip(first, second, strict=True)])
    seeds, mean = len(gaps), gaps.mean().item()
    if seeds == 1:
        ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
        low, high = bootstrap_means(gaps[0]).quantile(ends).tolist()
        return Difference(mean, low, high, seeds)
    # The variance of bootstrapped means is that of the values over their number.
    of_images, of_seeds = gaps.mean(0).var(correction=0).item() / gaps.shape[1], gaps.mean(1).var().item() / seeds
    degrees = (of_images + of_seeds) ** 2 / (of_seeds**2 / (seeds - 1)) if of_seeds else float("inf")
    reach = t_quantile(LEVEL, degrees) * (of_images + of_seeds) ** 0.5
    return Difference(mean, max(mean - reach, -1.0), min(mean + reach, 1.0), seeds)


def sentence(first: str, second: str, gap: Difference, where: str) -> str:
    """What the data supports, e.g. "A is ahead of B, by 20-nn: +8.1 points, 95% CI [6.9, 9.3]"."""
    if not gap.significant:
        return f"No significant difference between {first} and {second}, {where}: {gap.points}{gap.measured}"
    if gap.mean < 0:
        first, second = second, first
        gap = Difference(-gap.mean, -gap.high, -gap.low, gap.seeds)
    return f"{first} is ahead of {second}, {where}: {gap.points}{gap.measured}"


def no_difference(pairs: list[tuple[str, str, Difference]], where: str) -> str:
    """All pairs without a significant difference in one sentence: first and second of each, and their difference."""
    if len(pairs) == 1:
        return sentence(*pairs[0], where)
    named = ", ".join(f"{first} and {second} ({gap.points})" for first, second, gap in pairs)
    return f"No significant difference, {where}, between {named}{pairs[0][2].measured}"
