"""What every table shows of frozen features, by one set of numbers: kNN, few-shot, logistic regression."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from sslvit.config import option
from sslvit.evaluate.features import Features
from sslvit.evaluate.fewshot import fewshot
from sslvit.evaluate.knn import knn_votes
from sslvit.evaluate.logistic import logistic
from sslvit.evaluate.metrics import metrics, top
from sslvit.evaluate.predictions import Predictions
from sslvit.evaluate.split import choose_fraction


@dataclass(frozen=True)
class Protocols:
    k: int = option(20, above=0)
    """Nearest neighbours that vote."""
    temperature: float = 0.07
    """A vote is weighted by exp(cosine / temperature)."""
    shots: tuple[int, ...] = (1, 5, 10)
    """Labelled images a class."""
    draws: int = option(3, above=0)
    """Of the shots."""
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the training labels, of every class alike, that logistic regression has; the smaller are parts of the
    larger."""


class Probed(NamedTuple):
    numbers: dict[str, float]  # accuracies in [0, 1], in the order of a table's columns
    spread: dict[str, float]  # deviation over draws, of those that are drawn
    predictions: dict[float, Predictions]  # of logistic regression, by the share of the labels, the largest last
    answers: dict[str, Tensor]  # the class of each test image by kNN and logistic regression, by column


def linear_name(fraction: float) -> str:
    return f"linear {100 * fraction:g} %"


def probed(train: Features, test: Features, readout: str, protocols: Protocols, about: dict[str, Any]) -> Probed:
    """about: what the predictions say of where they come from."""
    x, y, labels = train.by_readout[readout], test.by_readout[readout], train.labels
    assert labels is not None, "features of images without labels"
    k, temperature = protocols.k, protocols.temperature
    votes = knn_votes(x, labels, y, k=k, temperature=temperature)
    numbers, answers = {f"{k}-nn": top(votes, test.labels)}, {f"{k}-nn": votes.argmax(-1)}
    spread, classes, found, about = {}, int(labels.max()) + 1, {}, about | {"readout": readout}
    for shots in protocols.shots:
        name = f"{shots}-shot"
        few = fewshot(x, labels, y, test.labels, shots=shots, draws=protocols.draws)
        numbers[name], spread[name] = few.mean, few.spread
    for fraction in sorted(protocols.fractions):
        part = choose_fraction(labels, fraction, seed=0)
        if labels[part].bincount().max() < 2:  # then nothing can be held out to choose C by
            continue
        probabilities = logistic(x[part], labels[part], y, classes=classes).float()
        numbers[linear_name(fraction)] = metrics(probabilities, test.labels).top1
        answers[linear_name(fraction)] = probabilities.argmax(-1)
        found[fraction] = Predictions(test.ids, test.labels, probabilities, about | {"labels": fraction})
    return Probed(numbers, spread, found, answers)
