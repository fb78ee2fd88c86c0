"""Which patches an objective hides. Exact counts, never a coin a patch: every image of a batch has the same number."""

import torch
from torch import Tensor

from sslvit import rng


def random_order(key: Tensor, patches: int) -> Tensor:
    """A random order of the patches of each image: b -> b n. Its head or tail is a uniformly random subset."""
    return rng.permutation(key, patches)


def random_mask(key: Tensor, patches: int, count: int) -> Tensor:
    """True at exactly `count` uniformly random patches of each image: b -> b n."""
    if not 0 <= count <= patches:
        raise ValueError(f"cannot mask {count} of {patches} patches")
    order = random_order(key, patches)
    chosen = torch.arange(patches, device=key.device) < count
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, chosen.expand_as(order))


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens at these places of each image: b n d, b m -> b m d"""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
