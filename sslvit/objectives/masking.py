"""Which patches an objective hides. Exact counts, never a coin a patch: every image of a batch has the same number."""

import torch
from torch import Tensor

from sslvit import rng


def random_order(key: Tensor, patches: int) -> Tensor:
    """A random order of the patches of each image: b -> b n. Its head or tail is a uniformly random subset."""
    return rng.permutation(key, patches)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens at these places of each image: b n d, b m -> b m d. Row by row, which costs a third of a gather.

    Places are from 0 to n - 1: others would be tokens of another image, and nothing says so.
    """
    b, n, _ = tokens.shape
    rows = index + torch.arange(0, b * n, n, device=index.device).unsqueeze(1)
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)
