"""Position embeddings: fixed sin-cos tables, resizing a table to another grid, and biases of attention by offset.

Tables are `l (h w) d`, one for each layer that has its own, in raster order.
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor

Grid = tuple[int, int]
Position = Literal[
    "learned_1d", "learned_2d", "relative", "relative_bias", "sincos_moco_v3", "sincos_mae", "sincos_big_vision",
    "rope", "none",
]  # fmt: skip
PositionAt = Literal["stem", "every_layer", "every_layer_shared"]
PositionResize = Literal[
    "bicubic", "bilinear", "bilinear_corners", "bicubic_plain", "bicubic_offset", "bicubic_corners", "geometric"
]

TABLELESS = {"none": "stem", "rope": "every_layer_shared"}  # and where they are; for rope see sslvit.models.rope
FIXED = ("sincos_moco_v3", "sincos_mae", "sincos_big_vision")
IN_ATTENTION = ("relative", "relative_bias")


def to_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width; a single number is both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def position_tables(
    position: Position, position_at: PositionAt, grid: Grid, width: int, depth: int, prefix: int, heads: int
) -> dict[str, Tensor]:
    """The tables of a model with such positions, by name: a fixed one, or learned ones still to be initialised.

    pos_embed has rows for `prefix` tokens (the class token and the registers), then for the patches, as in timm.
    relative_bias, see offset_bias, begins as zeros, as in the code of all who have it.
    """
    h, w = grid
    layers = depth if position_at == "every_layer" else 1
    if position in FIXED:
        if position_at == "every_layer":
            raise ValueError(f"position {position!r} is fixed, the same for every layer: use 'every_layer_shared'")
        if width % 4 or width < 8:
            raise ValueError(f"width {width} is not a multiple of 4 and at least 8, as {position!r} needs")
        # The class token's row is zeros in MoCo v3 and MAE; big_vision has no such row, which is the same function.
        return {"pos_embed": F.pad(sincos(position, grid, width), (0, 0, prefix, 0))}
    if position in TABLELESS:
        if position_at != TABLELESS[position]:
            raise ValueError(
                f"position {position!r} has nothing to put at {position_at!r}: it goes with {TABLELESS[position]!r}"
            )
        return {}
    if position in IN_ATTENTION and position_at == "stem":
        raise ValueError(f"position {position!r} lives inside attention: use 'every_layer' or 'every_layer_shared'")
    if position == "relative_bias":
        return {"relative_bias": torch.zeros(layers, (2 * h - 1) * (2 * w - 1) + 3 * prefix, heads)}
    if position == "relative":
        if h * w < 2:
            raise ValueError(f"position 'relative' needs two patches at least, the grid is {grid}")
        return {"relative_embed": torch.empty(layers, 2 * h * w - 1, width)}
    if position == "learned_1d":
        return {"pos_embed": torch.empty(layers, prefix + h * w, width)}
    if width % 2:
        raise ValueError(f"position 'learned_2d' gives each coordinate half of the width, and width {width} is odd")
    tables = {"pos_embed_x": torch.empty(layers, w, width // 2), "pos_embed_y": torch.empty(layers, h, width // 2)}
    return tables | ({"pos_embed": torch.empty(layers, prefix, width)} if prefix else {})


def sincos(kind: str, grid: Grid, width: int) -> Tensor:
    """The fixed table of MoCo v3, MAE or big_vision: -> 1 (h w) d.

    Channels are [sin a, cos a, sin b, cos b] with frequencies 10000^(-i/count). They differ in two ways:
    - MoCo v3 (https://github.com/facebookresearch/moco-v3, vits.py): a is the row (its variable is named "w"; on oblong
      grids its flattening no longer agrees with its patches, here a stays the row), i / (d/4).
    - MAE (https://github.com/facebookresearch/mae, util/pos_embed.py): a is the column, i / (d/4).
    - big_vision (https://github.com/google-research/big_vision, models/vit.py): a is the column, i / (d/4 - 1).
    """
    rows, columns = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    first, second = (rows, columns) if kind == "sincos_moco_v3" else (columns, rows)
    count = width // 4
    last = count - 1 if kind == "sincos_big_vision" else count
    frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / last)
    a = einsum(first, frequencies, "h w, i -> h w i")
    b = einsum(second, frequencies, "h w, i -> h w i")
    table = torch.cat([a.sin(), a.cos(), b.sin(), b.cos()], -1)
    return rearrange(table, "h w d -> 1 (h w) d").to(torch.get_default_dtype())


def resize(table: Tensor, old: Grid, new: Grid, how: PositionResize) -> Tensor:
    """2-D interpolation of a table: l (h w) d -> l (h' w') d. Each code base has its rule, which weights are used to.

    - bicubic: timm's default, with antialias=True. Its kernel has a = -0.5; without it has a = -0.75, so that the two
      differ even where the grid grows.
    - bilinear_corners: the ViT paper's, scipy.ndimage.zoom with order=1: the corners stay where they are.
    - bicubic_plain: without antialias, as in DeiT and MAE.
    - bicubic_offset: plain, but each size a tenth of a patch larger, to keep clear of rounding, as in DINO and DINOv2
      (https://github.com/facebookresearch/dino/issues/8).
    - bicubic_corners: plain, but the corners stay where they are, as in torchvision.
    - bilinear: linear, without antialias, as in transformers' BEiT.
    - geometric: for offsets alone, linear between BEiT's _places, as in timm; BEiT itself has cubic splines.

    Fixed tables are interpolated too, as MAE does for fine-tuning.
    """
    # While a program for any image size is exported, the sizes are symbols instead of integers.
    if all(isinstance(size, int) for size in new) and old == new:
        return table
    image = rearrange(table if table.dtype == torch.float64 else table.float(), "l (h w) d -> l d h w", h=old[0])
    if how == "bicubic":
        image = F.interpolate(image, new, mode="bicubic", antialias=True)
    elif how == "bicubic_offset":
        scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        image = F.interpolate(image, scale_factor=scale, mode="bicubic")
    elif how in ("bilinear", "bilinear_corners"):
        image = F.interpolate(image, new, mode="bilinear", align_corners=how == "bilinear_corners")
    elif how == "geometric":
        rows, columns = (torch.tensor(_along(*sizes)).to(image) for sizes in zip(old, new, strict=True))
        image = rows @ image @ columns.mT
    else:
        image = F.interpolate(image, new, mode="bicubic", align_corners=how == "bicubic_corners")
    return rearrange(image, "l d h w -> l (h w) d").to(table.dtype)


def join_2d(columns: Tensor, rows: Tensor) -> Tensor:
    """Learned 2-D: half of the width is the column's, half the row's: l w d, l h d -> l (h w) (2 d)."""
    h, w = rows.shape[1], columns.shape[1]
    columns, rows = repeat(columns, "l w d -> l (h w) d", h=h), repeat(rows, "l h d -> l (h w) d", w=w)
    return torch.cat([columns, rows], -1)


def relative_bias(queries: Tensor, table: Tensor, prefix: int) -> Tensor:
    """Appendix D.4 of the ViT paper: the content query attends to an embedding of each offset, and these logits are
    added to those of the content. `b k n d, offsets (k d) -> b k n n`, unscaled.

    The offset is one-dimensional, p_k - p_q in raster order, from -(n - 1) to n - 1. The class token and the registers
    (the first `prefix` tokens) have no place, so pairs with them get no bias; the paper does not say what it did.
    """
    queries = queries[:, :, prefix:]
    n = queries.shape[2]
    keys = rearrange(table, "offsets (k d) -> k offsets d", k=queries.shape[1])
    logits = einsum(queries, keys, "b k n d, k offsets d -> b k n offsets")
    # Key j of query i is entry j - i + n - 1 of row i. In the flattened logits, whose rows have 2n - 1 entries, that is
    # (n - 1) + i (2n - 2) + j: rows of 2n - 2 entries, so no gather (whose gradient is a slow scatter) is needed.
    flat = rearrange(logits, "b k n offsets -> b k (n offsets)")[..., n - 1 : -1]
    bias = rearrange(flat, "b k (n step) -> b k n step", n=n)[..., :n]
    return F.pad(bias, (prefix, 0, prefix, 0))


def offset_bias(table: Tensor, grid: Grid) -> Tensor:
    """BEiT's bias of attention (https://arxiv.org/abs/2106.08254): for each head a number for each offset of the query
    from the key, in rows and in columns, `((2h - 1)(2w - 1)) k`. Three more rows, if there are any, belong to a class
    token: for what it attends to, for what attends to it, and for itself. `offsets k -> k n n`
    """
    h, w = grid
    offsets, classes = table.tensor_split([(2 * h - 1) * (2 * w - 1)])
    # Row i of windows of h rows begins at i, so its entry s is offset i + s - (h - 1): that of the key h - 1 - s. No
    # gather is needed, whose gradient is slow.
    windows = rearrange(offsets, "(h w) k -> h w k", w=2 * w - 1).unfold(0, h, 1).unfold(1, w, 1).flip(-2, -1)
    bias = rearrange(windows, "h w k i j -> k (h w) (i j)")
    if not len(classes):
        return bias
    queries, keys, itself = (rearrange(row, "k -> k 1 1") for row in classes)
    first = torch.cat([itself, queries.expand(-1, 1, h * w)], 2)
    return torch.cat([first, torch.cat([keys.expand(-1, h * w, 1), bias], 2)], 1)


def resize_offsets(table: Tensor, old: Grid, new: Grid, how: PositionResize) -> Tensor:
    """The table of offset_bias for another grid. The rows of the class token stay as they are."""
    sizes, wanted = ((2 * h - 1, 2 * w - 1) for h, w in (old, new))
    offsets, classes = table.tensor_split([sizes[0] * sizes[1]])
    return torch.cat([resize(offsets.unsqueeze(0), sizes, wanted, how).squeeze(0), classes])


@cache
def _along(old: int, new: int) -> np.ndarray:
    """The linear interpolation of offsets along one axis, as a matrix: new old"""
    reach = new // 2
    wanted, places = np.arange(-reach, reach + 1), _places(old // 2, reach)
    return np.stack([np.interp(wanted, places, one) for one in np.eye(old)], 1)


def _places(count: int, reach: int) -> np.ndarray:
    """Where BEiT puts the offsets of -count to count on a larger grid, whose offsets go as far as `reach`: 0, 1,
    1 + q, 1 + q + q^2, ..., so that neighbours stay neighbours and only large offsets are stretched. q is between 1.01
    and 1.5, by bisection as there, and such that the last is at `reach`."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**count) / (1 - q) > reach else (q, high)
    places = np.cumsum(q ** np.arange(count))
    return np.concatenate([-places[::-1], [0.0], places])
