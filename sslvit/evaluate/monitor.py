"""What a run looks at before, during and after training: kNN and few-shot accuracy of each readout, and their table."""

from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from sslvit import rng
from sslvit.data.source import Source
from sslvit.data.views import Plain
from sslvit.evaluate.features import extract
from sslvit.evaluate.fewshot import fewshot
from sslvit.evaluate.knn import knn


def draw_ids(source: Source, limit: int) -> np.ndarray:
    """At most so many images of a source (0: all), by a seeded draw that is the same for every run and every probe."""
    return np.asarray(rng.permutation(rng.key(0, "monitor"), len(source))[: limit or None].sort().values)


class Monitor:
    """Callable by the loop. Images beyond the limits are left out by a seeded draw that is the same for every run."""

    def __init__(
        self,
        train: Source,
        test: Source,
        image_size: int | tuple[int, int],
        accelerator: Accelerator,
        *,
        limit_train: int = 10_000,
        limit_test: int = 5_000,
        k: int = 20,
        temperature: float = 0.07,
        shots: int = 10,
    ):
        for source in (train, test):
            if source.labels is None:
                raise ValueError(f"{source.name} has no labels to evaluate with")
        self.sources, self.limits = (train, test), (limit_train, limit_test)
        self.view, self.accelerator = Plain(image_size), accelerator
        self.k, self.temperature, self.shots = k, temperature, shots

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        parts = []
        for source, limit in zip(self.sources, self.limits, strict=True):
            parts.append(extract(backbone, source, self.view, self.accelerator, ids=draw_ids(source, limit)))
        train, test = parts
        numbers = {}
        for readout in backbone.readouts:
            x, y = train.by_readout[readout], test.by_readout[readout]
            nearest = knn(x, train.labels, y, test.labels, k=self.k, temperature=self.temperature)
            few = fewshot(x, train.labels, y, test.labels, shots=self.shots)
            numbers[f"eval/{readout}/{self.shots}-shot"] = few.mean
            numbers[f"eval/{readout}/{self.k}-nn"] = nearest
        return numbers


def table(evaluations: list[dict[str, Any]], readout: str) -> str:
    """Random start against pretrained, for each readout; the objective's own is marked."""
    if not evaluations:
        return "No labels, so nothing was evaluated."
    first, last = evaluations[0], evaluations[-1]
    lines = [f"accuracy, %                  random start   after {last['step']:,} steps"]
    for name in (name for name in last if name.startswith("eval/")):
        _, read, protocol = name.split("/")
        mark = " *" if read == readout else ""
        label = f"{protocol} of {read}{mark}"
        lines.append(f"{label:<28}{100 * first[name]:>13.1f}{100 * last[name]:>15.1f}")
    return "\n".join([*lines, f"* the readout that this objective declares ({readout})"])
