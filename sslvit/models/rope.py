"""Axial rotary positions, as in DINOv3 (https://arxiv.org/abs/2508.10104): attention turns pairs of channels of each
query and key by angles that grow with the place of their patch, so that logits depend on offsets.

There is no table: angles follow from the grid, whatever its size and shape. The class token and the registers have no
place and are not turned.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslvit import rng
from sslvit.models.positions import Grid
from sslvit.processes.device import send


def periods_of(base: float, head_width: int, given: Sequence[float] = (), like: Tensor | None = None) -> Tensor:
    """The length of a full turn for each frequency, from 1 to nearly `base`: a quarter of a head's width. given: use
    these. like: a tensor of the precision and the device to compute in."""
    kind: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
    if given:
        return torch.tensor(given, **kind)
    count = head_width // 4
    return base ** (torch.arange(count, **({"dtype": torch.float32} | kind)) / count)


def coordinates(grid: Grid, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Row and column of the centre of each patch, both from -1 to 1 across the image also if it is oblong: n 2"""
    h, w = grid
    rows, columns = ((torch.arange(n, dtype=dtype, device=device) + 0.5) / n * 2 - 1 for n in (h, w))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)


def moved(places: Tensor, key: Tensor, shift: float, jitter: float, rescale: float) -> Tensor:
    """Coordinates for training, drawn anew for each image: n 2, a key for each image `b` -> b n 2

    Each axis is shifted by up to `shift`, then stretched by up to `jitter`, then both axes by up to `rescale`, either
    way and log-uniformly. DINOv3 draws one such map for a whole batch of a process; drawn for each image by its key it
    does not depend on the batch, nor on the number of processes.
    """
    draws = rng.uniform(rng.fold(key, "rope"), 5) * 2 - 1
    draws = send(draws.to(places.dtype).unsqueeze(1), places.device)
    offset, stretch, scale = draws.split([2, 2, 1], -1)
    return (places + shift * offset) * (math.log(jitter) * stretch).exp() * (math.log(rescale) * scale).exp()


def turns(places: Tensor, periods: Tensor) -> Tensor:
    """Cosines and sines of all angles, first those of the row, then of the column: [b] n 2 -> 2 [b 1] n (d / 2)"""
    angles = (2 * math.pi * places.unsqueeze(-1) / periods).flatten(-2)
    angles = angles.unsqueeze(1) if angles.ndim == 3 else angles
    return torch.stack([angles.cos(), angles.sin()])


def turned(x: Tensor, rope: Tensor, prefix: int) -> Tensor:
    """Queries or keys `b k n d` with all but the first `prefix` turned, in the precision of `rope`. Channel i is paired
    with channel i + d / 2."""
    cos, sin = rope
    before, patches = x[:, :, :prefix], x[:, :, prefix:]
    first, second = patches.to(rope.dtype).chunk(2, -1)
    patches = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([before, patches.to(x.dtype)], 2)
