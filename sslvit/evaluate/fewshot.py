"""The ViT paper's few-shot accuracy: regularised least squares from frozen features to targets of -1 and 1.

As its code has it (https://github.com/google-research/big_vision, evaluators/fewshot_lsr.py): features standardised by
the shots' own mean and deviation + 1e-5, a constant feature of 100 so that the bias is hardly regularised, and
lambda = 2^10, not divided by the number of images. In float64.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit import rng

BIAS = 100.0


class FewShot(NamedTuple):
    mean: float  # accuracy over the draws of the shots
    spread: float  # their standard deviation; 0 for one draw
    draws: list[float]


def ridge(features: Tensor, targets: Tensor, l2: float = 2.0**10) -> Tensor:
    """(X'X + l2 I)^-1 X'Y, n d and n k -> d k; by the smaller of the two systems that give it."""
    n, d = features.shape
    if n < d:
        gram = features @ features.T + l2 * torch.eye(n, dtype=features.dtype)
        return features.T @ torch.linalg.solve(gram, targets)
    gram = features.T @ features + l2 * torch.eye(d, dtype=features.dtype)
    return torch.linalg.solve(gram, features.T @ targets)


def choose_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Rows of `shots` random images of each class; all of a class that has fewer."""
    order = rng.permutation(rng.key(seed, "shots"), len(labels))
    return torch.cat([order[labels[order] == label][:shots] for label in labels.unique()])


def accuracy_of_ridge(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, l2: float = 2.0**10) -> float:
    train, test = train.double(), test.double()
    mean, deviation = train.mean(0), train.std(0, correction=0) + 1e-5
    train, test = (F.pad((x - mean) / deviation, (0, 1), value=BIAS) for x in (train, test))
    targets = 2.0 * F.one_hot(labels).double() - 1
    return ((test @ ridge(train, targets, l2)).argmax(-1) == test_labels).double().mean().item()


def fewshot(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    shots: int = 10,
    draws: int = 3,
    l2: float = 2.0**10,
) -> FewShot:
    """Accuracy in [0, 1] with so many labelled images a class, over several seeded draws of them."""
    rows = [choose_shots(labels, shots, seed) for seed in range(draws)]
    values = [accuracy_of_ridge(train[r], labels[r], test, test_labels, l2) for r in rows]
    return FewShot(sum(values) / draws, float(torch.tensor(values).std(correction=0)), values)
