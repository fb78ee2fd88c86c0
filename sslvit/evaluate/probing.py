"""The probes of every table of frozen features: kNN, few-shot, logistic regression."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from sslvit.config import option
from sslvit.evaluate.features import Features
from sslvit.evaluate.fewshot import fewshot
from sslvit.evaluate.knn import knn_votes
from sslvit.evaluate.logistic import logistic
from sslvit.evaluate.metrics import top
from sslvit.evaluate.predictions import Predictions
from sslvit.evaluate.split import choose_fraction


@dataclass(frozen=True)
class ProbeOptions:
    k: int = option(20, above=0)
    """Nearest neighbours that vote."""
    temperature: float = option(0.07, above=0)
    """A vote is weighted by exp(cosine / temperature)."""
    shots: tuple[int, ...] = option((1, 5, 10), above=0)
    """Labelled images per class."""
    draws: int = option(3, above=0)
    """Random draws of the shots."""
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the labels for logistic regression. Of each class; the smaller ones are subsets of the larger."""


class Probed(NamedTuple):
    numbers: dict[str, float]  # accuracies in [0, 1], in the order of a table's columns
    spread: dict[str, float]  # deviation over draws, of the few-shot columns
    predictions: dict[float, Predictions]  # of logistic regression, by the share of the labels, the largest last
    answers: dict[str, Tensor]  # predicted classes of kNN and logistic regression, by column


def linear_name(fraction: float) -> str:
    return f"linear {100 * fraction:g} %"


def probed(train: Features, test: Features, readout: str, options: ProbeOptions, about: dict[str, Any]) -> Probed:
    """about: the predictions' metadata."""
    x, y, labels = train.by_readout[readout], test.by_readout[readout], train.labels
    assert labels is not None, "features of images without labels"
    about = about | {"readout": readout}
    nearest, classes = f"{options.k}-nn", int(labels.max()) + 1
    votes = knn_votes(x, labels, y, k=options.k, temperature=options.temperature)
    result = Probed({nearest: top(votes, test.labels)}, {}, {}, {nearest: votes.argmax(-1)})
    for shots in options.shots:
        few = fewshot(x, labels, y, test.labels, shots=shots, draws=options.draws)
        result.numbers[f"{shots}-shot"], result.spread[f"{shots}-shot"] = few.mean, few.spread
    for fraction in sorted(options.fractions):
        rows, name = choose_fraction(labels, fraction, seed=0), linear_name(fraction)
        if labels[rows].bincount().max() < 2:  # then nothing can be held out to choose C by
            continue
        probabilities = logistic(x[rows], labels[rows], y, classes=classes).float()
        result.numbers[name] = top(probabilities, test.labels)
        result.answers[name] = probabilities.argmax(-1)
        labelled = about | {"labels": fraction}
        result.predictions[fraction] = Predictions(test.ids, test.labels, probabilities, labelled)
    return result
