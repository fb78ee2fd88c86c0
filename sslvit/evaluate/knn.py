"""k nearest neighbours, exactly: cosine similarity, each neighbour's vote weighted by exp(similarity / temperature).

DINO's protocol (https://github.com/facebookresearch/dino, eval_knn.py): k 20 and temperature 0.07 there; InstDisc and
lightly take 200 and 0.1. Numbers with another k or temperature do not compare, so both belong beside a number.

The same result for any chunk size, bit for bit: directions are rounded to multiples of 2^-25. Their products are then
multiples of 2^-50 and no partial sum exceeds 1 by much, so float64 holds each exactly, in whatever order a matrix
product adds them up. The rounding is as fine as float32's own error in a similarity.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit.evaluate.metrics import check, top


class Neighbours(NamedTuple):
    """Of the rows first, first + 1, ... of the test set, the nearest first."""

    first: int
    similarity: Tensor  # m k, float64
    rows: Tensor  # m k, of the training set


def directions(features: Tensor) -> Tensor:
    """Unit vectors whose similarities are exact in float64: n d -> n d"""
    return F.normalize(features.double(), dim=-1).mul_(2.0**25).round_().mul_(2.0**-25)


def neighbours(train: Tensor, test: Tensor, *, k: int, chunk: int = 1024) -> Iterator[Neighbours]:
    """The k nearest rows of train, or all if there are fewer, for `chunk` rows of test at a time."""
    if k < 1 or chunk < 1:
        raise ValueError(f"k {k} and chunk {chunk} must be at least 1")
    train, test = directions(train), directions(test)
    for first in range(0, len(test), chunk):
        yield Neighbours(first, *(test[first : first + chunk] @ train.T).topk(min(k, len(train)), dim=-1))


def knn_votes(
    train: Tensor, labels: Tensor, test: Tensor, *, k: int = 20, temperature: float = 0.07, chunk: int = 1024
) -> Tensor:
    """The share of the votes for each class: train n d, labels n, test m d -> m classes, float64."""
    check(train, labels)
    check(test)
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    votes = torch.zeros(len(test), int(labels.max()) + 1, device=test.device, dtype=torch.float64)
    for first, similarity, rows in neighbours(train, test, k=k, chunk=chunk):
        # A softmax over the neighbours: divided by their sum, exp cannot overflow, and the winner is the same.
        weights = (similarity / temperature).softmax(-1)
        votes[first : first + len(rows)].scatter_add_(1, labels[rows], weights)
    return votes


def knn(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy in [0, 1]."""
    return top(knn_votes(train, labels, test, k=k, temperature=temperature), test_labels)
