"""The evaluation of a run before, during and after training: kNN and few-shot accuracy of each readout, as a table."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from torch import nn

from sslvit import rng
from sslvit.config import DataConfig
from sslvit.data.source import Images, Source
from sslvit.errors import DataError, NoInput
from sslvit.evaluate import labelled
from sslvit.evaluate.features import extract, left_out
from sslvit.evaluate.fewshot import fewshot
from sslvit.evaluate.knn import knn
from sslvit.views.pretraining import eval_view


def draw_ids(source: Source, limit: int) -> np.ndarray:
    """Up to `limit` images of a source (0: all), the same random ones for every run and every probe."""
    return np.asarray(rng.permutation(rng.key(0, "monitor"), len(source))[: limit or None].sort().values)


class Monitor:
    """Called by the loop with the backbone. Of larger sources it reads the same random images every time."""

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
        shots: int = 10,
    ):
        for source in (train, test):
            if source.labels is None:
                raise ValueError(f"{source.name} has no labels to evaluate with")
        self.sources, self.ids = (train, test), (draw_ids(train, limit_train), draw_ids(test, limit_test))
        self.view, self.accelerator = eval_view(image_size, eval_crop), accelerator
        self.k, self.shots = k, shots
        self.reported: set[str] = set()

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        train, test = (
            extract(backbone, source, self.view, self.accelerator, ids=ids)
            for source, ids in zip(self.sources, self.ids, strict=True)
        )
        for problem in map(left_out, (train, test), self.sources):
            if problem and problem not in self.reported:
                self.accelerator.print(f"warning: {problem}")
                self.reported.add(problem)
        numbers: dict[str, float] = {}
        if unreadable := len(train.unreadable) + len(test.unreadable):
            numbers["evaluated without"] = unreadable
        for readout in backbone.readouts:
            four = train.by_readout[readout], train.labels, test.by_readout[readout], test.labels
            numbers[f"eval/{readout}/{self.shots}-shot"] = fewshot(*four, shots=self.shots).mean
            numbers[f"eval/{readout}/{self.k}-nn"] = knn(*four, k=self.k)
        return numbers


def monitor_of(config: DataConfig, train: Images, accelerator: Accelerator, *, hold_out: bool = True) -> Monitor | None:
    """The monitor of a run on these images, or None and a printed reason.

    Without a test split a tenth of the labelled images is evaluated on. hold_out: whether that is fair, as it is while
    labels are not trained on.
    """
    say = accelerator.print
    if config.eval_data:  # another table has other columns
        config = replace(config, data=config.eval_data, image_column=None, label_column=None, root=None)
        train = config.source(channels=train.channels)
    if train.labels is None:
        if config.eval_data:
            raise DataError(f"--eval_data {config.data} has no labels to evaluate with: {train.unlabelled}")
        why = f"{train.name} has no labels ({train.unlabelled}). --eval_data may name some that do"
        say(f"Accuracy is not measured: {why}")
        return None
    assert isinstance(train, Source), "streams have no labels"
    try:
        test = config.source("test", channels=train.channels, classes=train.classes)
        if test.labels is None:
            raise DataError(f"{test.name} has no labels: {test.unlabelled}")
    except DataError as error:  # also of a test split that cannot be used: pretraining goes on without it
        if config.eval_data and not isinstance(error, NoInput):
            raise
        if not hold_out and not config.eval_data:
            say(f"Accuracy is not measured: {error}")
            return None
        try:
            rest, test = labelled.hold_out(train, str(error))
        except DataError as why:
            say(f"Accuracy is not measured: {why}")
            return None
        say(f"Evaluated on {len(test):,} images held out of {len(train):,} labelled ones: {error}")
        train = rest
    return Monitor(train, test, config.image_size, accelerator, eval_crop=config.eval_crop)


class Row(NamedTuple):
    """Accuracies in [0, 1] of one protocol and readout, at the start and at the end."""

    protocol: str
    readout: str
    start: float
    end: float

    def cells(self, declared: str) -> tuple[str, str, str]:
        """Title and percentages; the readout that the objective declares is marked."""
        mark = " *" if self.readout == declared else ""
        return f"{self.protocol} of {self.readout}{mark}", f"{100 * self.start:.1f}", f"{100 * self.end:.1f}"


def rows_of(evaluations: list[dict[str, Any]]) -> list[Row]:
    """The rows that both the first and the last evaluation have."""
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    rows = []
    for name in (name for name in last if name.startswith("eval/") and name in first):
        _, readout, protocol = name.split("/")
        rows.append(Row(protocol, readout, first[name], last[name]))
    return rows


def table(evaluations: list[dict[str, Any]], readout: str, start: str = "random start") -> str:
    """Accuracies at the start and at the end, for a terminal."""
    if not evaluations:
        return "Nothing was evaluated."
    last = evaluations[-1]
    lines = [f"{'accuracy, %':<28}{start:>13}   after {last['step']:,} steps"]
    for title, before, after in (row.cells(readout) for row in rows_of(evaluations)):
        lines.append(f"{title:<28}{before:>13}{after:>15}")
    if unreadable := last.get("evaluated without"):
        lines.append(f"{unreadable:,.0f} of the evaluation images cannot be read and are left out")
    return "\n".join([*lines, f"* the readout that this objective declares ({readout})"])
