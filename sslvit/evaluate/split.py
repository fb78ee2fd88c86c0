"""Labelled images for a protocol: shots, fractions, a held-out tenth. Stratified, seeded and nested.

Every image has a place in a seeded random order of its class, and a subset takes the first places. So one shot is among
the five, and 1% within 10%: a curve over them shows the number of labels, not the luck of the draw.
"""

import torch
from torch import Tensor

from sslvit import rng


def places(labels: Tensor, seed: int, name: str) -> Tensor:
    """Each image's place in a random order of its class, from 0: n -> n"""
    order = rng.permutation(rng.key(seed, name), len(labels)).to(labels.device)
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    first = counts.cumsum(0) - counts
    result = torch.empty_like(labels)
    result[by_class] = torch.arange(len(labels), device=labels.device) - first[labels[by_class]]
    return result


def choose_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Rows of `shots` random images of each class; all of a class that has fewer."""
    if shots < 1:
        raise ValueError(f"shots must be at least 1, got {shots}")
    return (places(labels, seed, "shots") < shots).nonzero().squeeze(1)


def choose_fraction(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Rows of this fraction of each class, rounded, and at least one image of each."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    size = (labels.bincount() * fraction).round().clamp(min=1)
    return (places(labels, seed, "shots") < size[labels]).nonzero().squeeze(1)


def folds(labels: Tensor, number: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Cross-validation: the labelled images in so many parts, stratified. Of each fold the rows to train on, and those
    of its part, which together are all images but those that are the only one of their class."""
    if number < 2:
        raise ValueError(f"cross-validation needs two folds or more, got {number}")
    counts = labels.bincount()
    part = torch.where(counts[labels] > 1, places(labels, seed, "held out") % number, -1)
    pairs = [((part != fold).nonzero().squeeze(1), (part == fold).nonzero().squeeze(1)) for fold in range(number)]
    return [(rows, held) for rows, held in pairs if len(held)]


def hold_out(labels: Tensor, fraction: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows to train on, and rows held out: this fraction of each class, rounded, but at least one image and never its
    only one."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
    counts = labels.bincount()
    size = (counts * fraction).round().clamp(min=1).minimum(counts - 1)
    held = places(labels, seed, "held out") < size[labels]
    if not held.any():
        raise ValueError(f"nothing can be held out of {len(labels)} images: no class has two")
    return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)
