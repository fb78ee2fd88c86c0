"""Metrics of predictions: top-1 and top-5, mean per class, calibration, confusion. Tensors in, numbers out."""

from typing import NamedTuple

import torch
from torch import Tensor

from sslvit.evaluate.balance import balanced_accuracy


class Metrics(NamedTuple):
    """All in [0, 1]."""

    top1: float
    top5: float
    mean_per_class: float
    calibration_error: float


def check(features: Tensor, labels: Tensor | None = None) -> None:
    """Raises ValueError if these would give meaningless numbers."""
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"features must be n d with n above 0, got shape {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError(f"{int((~features.isfinite()).sum())} of the features are not finite")
    if labels is None:
        return
    if labels.dtype != torch.int64 or labels.shape != features.shape[:1]:
        raise ValueError(f"labels {labels.dtype} of shape {tuple(labels.shape)} for {len(features)} images")
    if labels.min() < 0:
        raise ValueError(f"label {int(labels.min())} is negative")


def top(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Top-k accuracy: n classes, n -> [0, 1]. Ties go to the lower class, so that constant scores are right about k
    classes only."""
    check(scores, labels)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k] if k > 1 else scores.argmax(-1)[:, None]
    return (best == labels[:, None]).any(-1).double().mean().item()


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599): |accuracy - confidence| in
    bins of equal width, weighted by their images."""
    if probabilities.min() < 0 or (probabilities.sum(-1) - 1).abs().max() > 1e-3:
        raise ValueError("calibration needs probabilities: not negative, and of sum 1")
    confidence, predicted = probabilities.double().max(-1)
    return calibration_gap(confidence, predicted == labels, bins)


def calibration_gap(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """The same of confidences in [0, 1] and of which predictions are right: n, n"""
    bin = (confidence * bins).ceil().long().clamp(1, bins) - 1  # as in the paper, a bin holds its upper end
    gaps = torch.zeros(bins, dtype=torch.float64).scatter_add_(0, bin, right.double() - confidence)
    return gaps.abs().sum().item() / len(right)


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """The number of images of class i (row) predicted as class j (column): classes classes"""
    classes = max(scores.shape[1], int(labels.max()) + 1)
    return (labels * classes + scores.argmax(-1)).bincount(minlength=classes**2).view(classes, classes)


def metrics(probabilities: Tensor, labels: Tensor) -> Metrics:
    check(probabilities, labels)
    return Metrics(
        top(probabilities, labels),
        top(probabilities, labels, 5),
        balanced_accuracy(probabilities.argmax(-1), labels),
        calibration_error(probabilities, labels),
    )
