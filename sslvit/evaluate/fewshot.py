"""The ViT paper's few-shot accuracy: regularised least squares from frozen features to targets of -1 and 1.

As in its code (https://github.com/google-research/big_vision, evaluators/fewshot_lsr.py): features standardised by the
shots' own mean and deviation + 1e-5, a constant feature of 100 so that the bias is hardly regularised, and
lambda = 2^10, not divided by the number of images. In float64. (Its images are squeezed to 256 x 256 pixels before the
center crop of 224; here they keep their shape.)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit.evaluate.metrics import check, top
from sslvit.evaluate.split import choose_shots

BIAS = 100.0
L2 = 2.0**10


class FewShot(NamedTuple):
    mean: float  # accuracy over the draws of the shots
    spread: float  # their standard deviation; 0 for one draw
    draws: list[float]


def ridge(features: Tensor, targets: Tensor) -> Tensor:
    """(X'X + L2 I)^-1 X'Y, n d and n k -> d k; by the smaller of two equivalent systems."""
    n, d = features.shape
    if n < d:
        return features.T @ _solve(features @ features.T, targets)
    return _solve(features.T @ features, features.T @ targets)


def _solve(gram: Tensor, targets: Tensor) -> Tensor:
    gram.diagonal().add_(L2)  # and so it is positive definite
    return torch.cholesky_solve(targets, torch.linalg.cholesky(gram))


def ridge_scores(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """train n d, labels n, test m d -> m classes, float64"""
    check(train, labels)
    check(test)
    train, test = train.double(), test.double()
    mean, deviation = train.mean(0), train.std(0, correction=0) + 1e-5
    train, test = (F.pad((x - mean) / deviation, (0, 1), value=BIAS) for x in (train, test))
    return test @ ridge(train, 2.0 * F.one_hot(labels).double() - 1)


def fewshot(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, *, shots: int = 10, draws: int = 3
) -> FewShot:
    """Accuracy in [0, 1] with `shots` labelled images per class, over several seeded draws of them."""
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    rows = [choose_shots(labels, shots, seed) for seed in range(draws)]
    values = [top(ridge_scores(train[r], labels[r], test), test_labels) for r in rows]
    return FewShot(sum(values) / draws, float(torch.tensor(values, dtype=torch.float64).std(correction=0)), values)
