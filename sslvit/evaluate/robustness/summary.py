"""The numbers of a robustness report: accuracies with intervals over the test images, differences from the first model
on the same images, mean corruption error, calibration under shift, outline against colour."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslvit.evaluate.metrics import calibration_gap
from sslvit.evaluate.robustness.corruptions import NAMES, STRENGTHS
from sslvit.evaluate.robustness.measure import CLEAN, CONFLICT, Measured
from sslvit.evaluate.statistics import LEVEL, bootstrap_means, difference

MEAN = "mean of corruptions"  # a condition: the mean over corruptions and strengths
DRAWS = 1000  # of the bootstrap of the mean corruption error
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def interval(values: Tensor) -> list[float]:
    """Mean, and the bootstrap's interval for it over images, n."""
    low, high = bootstrap_means(values).quantile(torch.tensor(ENDS, dtype=torch.float64)).tolist()
    return [values.double().mean().item(), low, high]


def right(measured: Measured) -> dict[str, dict[str, Tensor]]:
    """By condition and model, which images are right: n. Of means over conditions, the share in which one is."""
    found = {
        condition: {name: (one.predicted == measured.labels).double() for name, one in by_model.items()}
        for condition, by_model in measured.answers.items()
        if condition != CONFLICT
    }

    def mean(conditions: list[str]) -> dict[str, Tensor]:
        return {name: torch.stack([found[one][name] for one in conditions]).mean(0) for name in found[CLEAN]}

    means = {f"{name} mean": mean([f"{name} {strength}" for strength in STRENGTHS]) for name in NAMES}
    means |= {f"strength {strength}": mean([f"{name} {strength}" for name in NAMES]) for strength in STRENGTHS}
    return found | means | {MEAN: mean([f"{name} {strength}" for name in NAMES for strength in STRENGTHS])}


def corruption_error(errors: Tensor, reference: Tensor) -> list[float] | None:
    """mCE: the mean over corruptions of the error as a share of the reference's, with its interval; None where the
    reference makes no error. Errors of each image and corruption, n k."""
    shares = errors.mean(0) / reference.mean(0)
    if not shares.isfinite().all():
        return None
    n = len(errors)
    drawn = torch.from_numpy(np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS)).double()
    ratios = ((drawn @ errors) / (drawn @ reference)).mean(1)
    ratios = ratios[ratios.isfinite()]  # where the reference makes no error there is no ratio
    if len(ratios) < DRAWS / 10:
        return None
    return [shares.mean().item(), *ratios.quantile(torch.tensor(ENDS, dtype=torch.float64)).tolist()]


def calibration(measured: Measured) -> dict[str, dict[str, float]]:
    """The expected calibration error by strength, 0 being clean images, and model: the mean over corruptions."""
    found: dict[str, dict[str, float]] = {}
    for strength in (0, *STRENGTHS):
        conditions = [f"{name} {strength}" for name in NAMES] if strength else [CLEAN]
        for name in measured.answers[CLEAN]:
            each = [measured.answers[one][name] for one in conditions]
            gaps = [calibration_gap(one.confidence, one.predicted == measured.labels) for one in each]
            found.setdefault(str(strength), {})[name] = sum(gaps) / len(gaps)
    return found


def conflict(measured: Measured) -> dict[str, dict[str, Any]]:
    """Of each model how often it names the shape of the outline, that of the colour, and the outline's share of both
    (None where it names neither)."""
    found = {}
    for name, one in measured.answers.get(CONFLICT, {}).items():
        outline, color = one.predicted == measured.labels, one.predicted == measured.colors
        decided = outline[outline | color].double()
        found[name] = {
            "outline": interval(outline.double()),
            "colour": interval(color.double()),
            "share": interval(decided) if len(decided) else None,
        }
    return found


def summary(measured: Measured) -> dict[str, Any]:
    """All of these as JSON. The first model is the one that the others are compared with."""
    hits = right(measured)
    first, *others = hits[CLEAN]
    errors = {name: 1 - torch.stack([hits[f"{one} mean"][name] for one in NAMES], 1) for name in hits[CLEAN]}
    return {
        "images": len(measured.labels),
        "accuracy": {
            condition: {name: interval(values) for name, values in by_model.items()}
            for condition, by_model in hits.items()
        },
        "ahead of the first": {
            condition: {
                name: list(difference([by_model[name]], [by_model[first]])[:3]) for name in others if name in by_model
            }
            for condition, by_model in hits.items()
            if first in by_model
        },
        "mean corruption error": {name: corruption_error(each, errors[first]) for name, each in errors.items()},
        "calibration error": calibration(measured),
        "outline against colour": conflict(measured),
    }
