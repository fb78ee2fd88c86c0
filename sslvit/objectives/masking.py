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
    return take_rows(tokens, rows_of(index, tokens.shape[1]))


def rows_of(index: Tensor, patches: int) -> Tensor:
    """Places in each image of so many patches, counted through all images: b m -> b m"""
    return index + torch.arange(0, len(index) * patches, patches, device=index.device).unsqueeze(1)


def take_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """`take` by places counted through all images."""
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def put(tokens: Tensor, index: Tensor, replacement: Tensor) -> Tensor:
    """The tokens with others at these places of each image: b n d, b m, b m d -> b n d"""
    return tokens.scatter(1, index.unsqueeze(-1).expand_as(replacement), replacement)
