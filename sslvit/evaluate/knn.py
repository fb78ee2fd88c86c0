"""k nearest neighbours, exactly: cosine similarity, each neighbour's vote weighted by exp(similarity / temperature).

DINO's protocol (https://github.com/facebookresearch/dino, eval_knn.py): k 20 and temperature 0.07 there; InstDisc and
lightly take 200 and 0.1. Numbers with another k or temperature do not compare, so both belong beside a number.

The result is the same for any chunk size, bit for bit: directions are rounded to multiples of 2^-25, as fine as
float32's own error in a similarity. Their products are multiples of 2^-50 and no partial sum exceeds 1 by much, so
float64 adds them exactly, in any order.

float32 searches first, at twice the speed, for more candidates than needed, of which float64 takes the nearest. Where
float32's error could have left out a nearer one, float64 searches all.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit.evaluate.metrics import check, top

SPARE = 44  # candidates beyond k: with few, float32 is often unsure about features that lie close together


class Neighbors(NamedTuple):
    """Neighbours of the test rows first, first + 1, ...; the nearest first."""

    first: int
    similarity: Tensor  # m k, float64
    rows: Tensor  # m k, of the training set


def directions(features: Tensor) -> Tensor:
    """Unit vectors whose similarities are exact in float64: n d -> n d"""
    return F.normalize(features.double(), dim=-1).mul_(2.0**25).round_().mul_(2.0**-25)


def neighbors(train: Tensor, test: Tensor, *, k: int, chunk: int = 256) -> Iterator[Neighbors]:
    """The k nearest rows of train, or all if there are fewer, for `chunk` rows of test at a time."""
    if k < 1 or chunk < 1:
        raise ValueError(f"k and chunk must be at least 1, got k {k} and chunk {chunk}")
    train, test = directions(train.detach()), directions(test.detach())
    k = min(k, len(train))
    candidates = min(k + SPARE, len(train))
    exact = torch.get_float32_matmul_precision() != "highest"  # TF32's products have three digits
    rough = train if exact else train.float()
    # A float32 product of unit vectors of d numbers is off by less than (d + 2) 2^-24, whatever the order of its sums.
    error = (train.shape[1] + 2) * 2.0**-24
    buffer = rough.new_empty(min(chunk, len(test)), len(train))  # allocating it anew costs as much as the product
    for first in range(0, len(test), chunk):
        batch = test[first : first + chunk]
        best, rows = torch.mm(batch.to(rough.dtype), rough.T, out=buffer[: len(batch)]).topk(candidates)
        rows = rows.sort(dim=-1).values
        similarity, rows = nearest_first((train[rows] @ batch[:, :, None]).squeeze(-1), rows, k)
        if candidates < len(train):
            unsure = similarity[:, -1] <= best[:, -1].double() + error
            for some in unsure.nonzero().squeeze(1).split(64):
                every = torch.arange(len(train), device=train.device).expand(len(some), -1)
                similarity[some], rows[some] = nearest_first(batch[some] @ train.T, every, k)
        yield Neighbors(first, similarity, rows)


def nearest_first(similarity: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar of each line, ties by the lower row: m n, m n (rows of a line ascend) -> m k, m k"""
    order = similarity.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return similarity.gather(1, order), rows.gather(1, order)


def knn_votes(
    train: Tensor, labels: Tensor, test: Tensor, *, k: int = 20, temperature: float = 0.07, chunk: int = 256
) -> Tensor:
    """The share of the votes for each class: train n d, labels n, test m d -> m classes, float64"""
    check(train, labels)
    check(test)
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    votes = torch.zeros(len(test), int(labels.max()) + 1, device=test.device, dtype=torch.float64)
    for first, similarity, rows in neighbors(train, test, k=k, chunk=chunk):
        # A softmax over the neighbours: divided by their sum, exp cannot overflow, and the winner is the same.
        weights = (similarity / temperature).softmax(-1)
        votes[first : first + len(rows)].scatter_add_(1, labels[rows], weights)
    return votes


def knn(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy in [0, 1]."""
    return top(knn_votes(train, labels, test, k=k, temperature=temperature), test_labels)
