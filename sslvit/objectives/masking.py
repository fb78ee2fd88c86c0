"""Selecting and replacing some of the patches of each image, the same number in every image of a batch."""

import torch
from torch import Tensor

from sslvit import rng


def random_order(key: Tensor, patches: int) -> Tensor:
    """A random order of the patches of each image: b -> b n. Its head or tail is a uniformly random subset."""
    return rng.permutation(key, patches)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens at these places of each image: b n d, b m -> b m d. Row by row, at a third of the cost of a gather.

    Places must be from 0 to n - 1: others would silently be tokens of another image.
    """
    b, n, _ = tokens.shape
    rows = index + torch.arange(0, b * n, n, device=index.device).unsqueeze(1)
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)


def put(tokens: Tensor, index: Tensor, replacement: Tensor) -> Tensor:
    """The tokens with others at these places of each image: b n d, b m, b m d -> b n d"""
    return tokens.scatter(1, index.unsqueeze(-1).expand_as(replacement), replacement)
