"""Statistics of results: means and intervals over seeds, and differences between two methods on the same test images.

A difference has two sources of chance: the test images, and the seed. The first is measured by a paired bootstrap over
the images, the second by the variance over seeds, which share their starting weights between methods. The variances
add, and Student's t has Satterthwaite's degrees of freedom: many if the images decide, seeds - 1 if the seeds do. With
one seed the second is not measured, and every sentence says so.

Where a sentence is chosen from many, the chance that one of them is wrong is bounded by Holm's method (1979,
https://www.jstor.org/stable/4615733): p-values are multiplied, the smallest by the number of all of them.

Student's interval of few seeds can reach beyond the range of an accuracy (0 to 1) or a difference (-1 to 1). It is
clipped there, which leaves its coverage as it is.
"""

import math
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
    angle, mass = t_mass(degrees)
    return float(np.sqrt(degrees) * np.tan(np.interp(level, mass, angle)))


def p_value(mean: float, error: float, degrees: float) -> float:
    """Two-sided, of a mean with this standard error if it were 0."""
    if error == 0:
        return float(mean == 0)
    if degrees > 1e4:
        return 2 * NormalDist().cdf(-abs(mean) / error)
    angle, mass = t_mass(degrees)
    return 1 - float(np.interp(np.arctan(abs(mean) / error / np.sqrt(degrees)), angle, mass))


def t_mass(degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Student's t by an angle, and how much of its mass lies within that. With t = sqrt(degrees) tan(angle) the density
    is cos(angle)^(degrees - 1): smooth, on a bounded range."""
    angle = np.linspace(0, np.pi / 2, 200_001)
    mass = np.cumsum(np.cos((angle[1:] + angle[:-1]) / 2) ** (degrees - 1))
    return angle, np.concatenate([[0.0], mass / mass[-1]])


def holm(p: list[float]) -> list[float]:
    """Corrected for their number: below 0.05 are those that are significant together."""
    corrected, highest = [0.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, (len(p) - place) * p[i])
        corrected[i] = min(highest, 1.0)
    return corrected


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
    p: float | None = None  # that it is as large by chance; None in results of an earlier version

    @property
    def significant(self) -> bool:
        return self.p < 1 - LEVEL if self.p is not None else self.low > 0 or self.high < 0

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
        error = gaps.var(correction=0).item() ** 0.5 / gaps.shape[1] ** 0.5
        return Difference(mean, low, high, seeds, p_value(mean, error, math.inf))
    # The variance of bootstrapped means is that of the values over their number.
    of_images, of_seeds = gaps.mean(0).var(correction=0).item() / gaps.shape[1], gaps.mean(1).var().item() / seeds
    degrees = (of_images + of_seeds) ** 2 / (of_seeds**2 / (seeds - 1)) if of_seeds else math.inf
    error = (of_images + of_seeds) ** 0.5
    reach = t_quantile(LEVEL, degrees) * error
    return Difference(mean, max(mean - reach, -1.0), min(mean + reach, 1.0), seeds, p_value(mean, error, degrees))


def sentence(first: str, second: str, gap: Difference, where: str) -> str:
    """What the data supports, e.g. "A is ahead of B, by 20-nn: +8.1 points, 95% CI [6.9, 9.3]"."""
    if not gap.significant:
        return f"No significant difference between {first} and {second}, {where}: {gap.points}{gap.measured}"
    if gap.mean < 0:
        first, second = second, first
        gap = gap._replace(mean=-gap.mean, low=-gap.high, high=-gap.low)
    return f"{first} is ahead of {second}, {where}: {gap.points}{gap.measured}"


def no_difference(pairs: list[tuple[str, str, Difference]], where: str) -> str:
    """All pairs without a significant difference in one sentence: first and second of each, and their difference."""
    if len(pairs) == 1:
        return sentence(*pairs[0], where)
    named = ", ".join(f"{first} and {second} ({gap.points})" for first, second, gap in pairs)
    return f"No significant difference, {where}, between {named}{pairs[0][2].measured}"
