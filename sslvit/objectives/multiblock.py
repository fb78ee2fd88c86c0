"""I-JEPA's blocks of patches: several targets, and a context without them (https://arxiv.org/abs/2301.08243, A.1).

As the official sampler draws them:
- A step has one size of target blocks and one of context blocks, for all images. One random number decides both the
  area, of the shares in `scale`, and the aspect ratio; a side is at most one patch shorter than the grid's.
- A block never starts in the last row or column that it could, so the grid's last row and column are never seen and
  never predicted: 27 of 14 x 14 patches, 15 of 8 x 8.
- The context is a block without the patches of all targets. Where 10 or fewer are left, it is drawn again, and after
  every 20 attempts one target less is left out, until none is.
- The contexts of a batch, here of all processes, are cut in raster order to the length of its shortest.

Here, other than there, this ends: where even that is too little, the context is the patches outside the first target.
Of grids below 14 x 14 the same share is too few. The sizes come from the progress, whatever the seed.
"""

from math import prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from sslvit import rng
from sslvit.objectives.objective import step_key
from sslvit.processes.collectives import CPU, gathered_by

Grid = tuple[int, int]
ATTEMPTS = 20


class Blocks(NamedTuple):
    context: Tensor  # b c: the places that are seen
    targets: Tensor  # b t m: those that are predicted, by block


def side_lengths(u: float, grid: Grid, scale: tuple[float, float], aspect: tuple[float, float]) -> Grid:
    """Height and width of a block, of one number in [0, 1)."""
    area = int(prod(grid) * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    height, width = round(sqrt(area * ratio)), round(sqrt(area / ratio))
    return max(min(height, grid[0] - 1), 1), max(min(width, grid[1] - 1), 1)


def draw_blocks(
    key: Tensor,
    progress: float,
    grid: Grid,
    *,
    targets: int = 4,
    scale: tuple[float, float] = (0.15, 0.2),
    aspect: tuple[float, float] = (0.75, 1.5),
    context: tuple[float, float] = (0.85, 1.0),
    device: torch.device = CPU,
) -> Blocks:
    """key: b, from which places come. The sizes come from the progress, which is the same for all images of a step.
    device: where processes can exchange numbers."""
    small, large = rng.uniform(step_key("block sizes", progress), 2).tolist()
    size, around = side_lengths(small, grid, scale, aspect), side_lengths(large, grid, context, (1.0, 1.0))
    hidden = torch.stack([blocks(rng.fold(key, "target", t), size, grid) for t in range(targets)], 1)  # b t n
    seen = contexts(key, around, grid, hidden)
    counts = seen.sum(1)
    shortest = int(gathered_by(device, counts.min().view(1)).min())
    places = hidden.flatten(0, 1).nonzero()[:, 1].view(*hidden.shape[:2], prod(size))
    return Blocks(seen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :shortest], places)


def blocks(key: Tensor, size: Grid, grid: Grid) -> Tensor:
    """Whether a patch is in the block: b -> b n"""
    rows, columns = (
        rng.integers(rng.fold(key, name), all_ - side)
        for name, side, all_ in zip(("top", "left"), size, grid, strict=True)
    )

    def inside(first: Tensor, side: int, all_: int) -> Tensor:
        places = torch.arange(all_, device=key.device)
        return (places >= first.unsqueeze(1)) & (places < first.unsqueeze(1) + side)

    return (inside(rows, size[0], grid[0]).unsqueeze(2) & inside(columns, size[1], grid[1]).unsqueeze(1)).flatten(1)


def contexts(key: Tensor, size: Grid, grid: Grid, hidden: Tensor) -> Tensor:
    """Whether a patch is seen: b, b t n -> b n"""
    enough = min(max(int(10 / 196 * prod(grid)), 1), 10)
    seen, missing = ~hidden[:, 0], torch.ones_like(key, dtype=torch.bool)
    for fewer in range(hidden.shape[1] + 1):
        left_out = hidden[:, : hidden.shape[1] - fewer].any(1)
        for attempt in range(ATTEMPTS):
            if not missing.any():
                return seen
            drawn = blocks(rng.fold(key, "context", fewer, attempt), size, grid) & ~left_out
            found = missing & (drawn.sum(1) > enough)
            seen = torch.where(found.unsqueeze(1), drawn, seen)
            missing = missing & ~found
    return seen
