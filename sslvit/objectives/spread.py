"""The spread of features and its number of directions, which show a collapse: see training/watch.py."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def deviation(features: Tensor) -> Tensor:
    """The standard deviation over the batch of l2-normalised features, times sqrt(d): b d -> ()"""
    return deviation_of(F.normalize(features.float(), dim=-1))


def deviation_of(unit: Tensor) -> Tensor:
    return unit.std(0, correction=0).mean() * unit.shape[-1] ** 0.5


@torch.no_grad()
def scale(embeddings: Tensor) -> Tensor:
    """The standard deviation over the batch of each dimension, averaged: b d -> ()"""
    return embeddings.float().std(0, correction=0).mean()


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """b d -> ()"""
    return rank_of(F.normalize(features.float(), dim=-1))


def rank_of(unit: Tensor) -> Tensor:
    centered = unit - unit.mean(0)
    b, d = centered.shape
    gram = centered @ centered.mT if b < d else centered.mT @ centered  # their eigenvalues are the same
    return gram.trace().square() / gram.square().sum().clamp(min=1e-30)


@torch.no_grad()
def spread(features: Tensor) -> dict[str, Tensor]:
    """Metrics that every objective reports of its backbone's readout: b d"""
    unit = F.normalize(features.float(), dim=-1)
    return {"feature_std": deviation_of(unit), "effective_rank": rank_of(unit)}
