"""A table of probes for a terminal, and the numbers in it with all digits."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from sslvit.evaluate.balance import balanced_accuracy, collapsed, unbalanced
from sslvit.evaluate.metrics import metrics
from sslvit.evaluate.probing import Probed


def row_of(title: str, cells: Iterable[str]) -> str:
    return f"{title:<26}" + "".join(f"{cell:>13}" for cell in cells)


def numbers_of(one: Probed, labels: Tensor) -> dict[str, Any]:
    numbers: dict[str, Any] = one.numbers | {f"{column} spread": value for column, value in one.spread.items()}
    numbers["balanced accuracy"] = {
        column: balanced_accuracy(predicted, labels) for column, predicted in one.answers.items()
    }
    if one.predictions:
        *_, most = one.predictions.values()
        numbers |= metrics(most.probabilities, most.labels)._asdict()
    return numbers


def lines_of(name: str, one: Probed, labels: Tensor, mark: str) -> Iterator[str]:
    """Rows of the table, and warnings."""
    spread = {column: f" ± {100 * value:3.1f}" for column, value in one.spread.items()}
    yield row_of(f"{name}{mark}", [f"{100 * x:.1f}{spread.get(column, '')}" for column, x in one.numbers.items()])
    if unbalanced(labels):
        balanced = {column: balanced_accuracy(predicted, labels) for column, predicted in one.answers.items()}
        yield row_of("  balanced accuracy", [f"{100 * balanced[c]:.1f}" if c in balanced else "" for c in one.numbers])
    for column, predicted in one.answers.items():
        if sentence := collapsed(predicted, labels):
            yield f"warning: {name}, {column}: {sentence}"
