"""What a run looks at before, during and after training: kNN and few-shot accuracy of each readout, and their table."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from sslvit import rng
from sslvit.config import DataConfig
from sslvit.data.source import Images, Source
from sslvit.data.subset import Subset
from sslvit.errors import DataError, NoInput
from sslvit.evaluate import split
from sslvit.evaluate.features import extract, left_out
from sslvit.evaluate.fewshot import fewshot
from sslvit.evaluate.knn import knn
from sslvit.views.pretraining import eval_view


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
        eval_crop: float | None = None,
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
        self.view, self.accelerator = eval_view(image_size, eval_crop), accelerator
        self.k, self.temperature, self.shots = k, temperature, shots
        self.told: set[str] = set()

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        parts = []
        for source, limit in zip(self.sources, self.limits, strict=True):
            parts.append(extract(backbone, source, self.view, self.accelerator, ids=draw_ids(source, limit)))
            if (problem := left_out(parts[-1], source)) and problem not in self.told:
                self.accelerator.print(f"warning: {problem}")
                self.told.add(problem)
        train, test = parts
        numbers: dict[str, float] = {}
        if unreadable := len(train.unreadable) + len(test.unreadable):
            numbers["evaluated without"] = unreadable
        for readout in backbone.readouts:
            x, y = train.by_readout[readout], test.by_readout[readout]
            nearest = knn(x, train.labels, y, test.labels, k=self.k, temperature=self.temperature)
            few = fewshot(x, train.labels, y, test.labels, shots=self.shots)
            numbers[f"eval/{readout}/{self.shots}-shot"] = few.mean
            numbers[f"eval/{readout}/{self.k}-nn"] = nearest
        return numbers


def monitor_of(config: DataConfig, train: Images, accelerator: Accelerator, *, hold_out: bool = True) -> Monitor | None:
    """The monitor of a run on these images, or None with a sentence that says why.

    Where there is no test split a tenth of the labelled images is asked about. hold_out: whether that is fair, as it is
    while labels are not trained on.
    """
    say = accelerator.print
    if config.eval_data:  # another table has other columns
        config = replace(config, data=config.eval_data, image_column=None, label_column=None, root=None)
        train = config.source(channels=train.channels)
    if train.labels is None:
        if config.eval_data:
            raise DataError(f"--eval_data {config.data} has no labels to evaluate with: {train.unlabelled}")
        say(f"Nothing is evaluated: {train.name} has no labels ({train.unlabelled}). --eval_data may name some that do")
        return None
    assert isinstance(train, Source), "streams have no labels"
    try:
        test = config.source("test", channels=train.channels, classes=train.classes)
    except NoInput as error:
        if not hold_out:
            say(f"Nothing is evaluated: {error}")
            return None
        try:
            kept, held = split.hold_out(torch.tensor(train.labels))
        except ValueError as why:
            say(f"Nothing is evaluated: {error}; and {why}")
            return None
        say(f"Evaluated on {len(held):,} images held out of {len(train):,} labelled ones: {error}")
        train, test = Subset(train, kept.numpy()), Subset(train, held.numpy())
    return Monitor(train, test, config.image_size, accelerator, eval_crop=config.eval_crop)


def table(evaluations: list[dict[str, Any]], readout: str, start: str = "random start") -> str:
    """The start against the end, for each readout; the objective's own is marked."""
    if not evaluations:
        return "Nothing was evaluated."
    first, last = evaluations[0], evaluations[-1]
    lines = [f"{'accuracy, %':<28}{start:>13}   after {last['step']:,} steps"]
    for name in (name for name in last if name.startswith("eval/")):
        _, read, protocol = name.split("/")
        mark = " *" if read == readout else ""
        label = f"{protocol} of {read}{mark}"
        lines.append(f"{label:<28}{100 * first[name]:>13.1f}{100 * last[name]:>15.1f}")
    if last.get("evaluated without"):
        lines.append(
            f"{last['evaluated without']:,.0f} of the images that are evaluated with cannot be read and are left out"
        )
    return "\n".join([*lines, f"* the readout that this objective declares ({readout})"])
