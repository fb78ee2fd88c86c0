"""Patches dropped and shuffled, as in "Intriguing Properties of Vision Transformers" (Naseer et al. 2021,
https://arxiv.org/abs/2105.10497, code https://github.com/Muzammal-Naseer/IPViT).

Dropped pixels are black, 0 before they are standardised, as in its code, and whole numbers of patches are dropped,
rounded down. There one draw is for a whole batch; here each image has its own, and a larger share contains the smaller.
There the salient patches are those that hold a share of the attention in one head of DINO; here they are a share of the
patches, by the attention of the model that is evaluated, its last layer's, averaged over heads: of the class token or,
where the model is read by its mean patch, of the patches, since nothing has trained its class token then.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sslvit import rng
from sslvit.evaluate.analysis import images_at_once
from sslvit.evaluate.features import evaluation_mode
from sslvit.models.positions import Grid
from sslvit.models.vit import ViT


class Cut(NamedTuple):
    """Images in patches of a grid: b p (c y x)."""

    patches: Tensor
    grid: Grid
    height: int  # of a patch

    @classmethod
    def of(cls, images: Tensor, grid: Grid) -> "Cut":
        (height, width), (rows, columns) = images.shape[2:], grid
        if height % rows or width % columns:
            raise ValueError(f"images of {height} x {width} pixels do not divide into a grid of {rows} x {columns}")
        patches = rearrange(images, "b c (r y) (k x) -> b (r k) (c y x)", r=rows, k=columns)
        return cls(patches, grid, height // rows)

    def joined(self, patches: Tensor, channels: int) -> Tensor:
        (rows, _), y = self.grid, self.height
        return rearrange(patches, "b (r k) (c y x) -> b c (r y) (k x)", r=rows, c=channels, y=y)


def random_order(key: Tensor, grid: Grid) -> Tensor:
    """The order in which patches are dropped: b -> b p"""
    return rng.permutation(rng.fold(key, "drop"), grid[0] * grid[1])


def salient_order(vit: ViT, images: Tensor, grid: Grid, readout: str) -> Tensor:
    """The patches that the class token attends to most come first; of a model that is read by its mean patch, those
    that patches attend to most. On another grid than the model's its attention is averaged: b c h w -> b p"""
    found = []
    for some in images.split(images_at_once(vit, images)):
        with evaluation_mode(vit, images.device.type):
            (attention,) = vit.attention(some, 1)
        rows = attention[:, :, vit.prefix :] if readout == "mean" else attention[:, :, :1]
        found.append(rows[..., vit.prefix :].mean((1, 2)))
    maps = F.adaptive_avg_pool2d(torch.cat(found).view(-1, *vit.grid_of(images)), grid)
    return maps.flatten(1).argsort(dim=1, descending=True, stable=True)


def dropped(images: Tensor, order: Tensor, share: float, grid: Grid) -> Tensor:
    """With the first patches of the order in black, this share of them: b c h w, b p"""
    cut = Cut.of(images, grid)
    gone = order[:, : int(share * order.shape[1] + 1e-9)]  # a share such as 0.3 is a little less than it says
    patches = cut.patches.scatter(1, gone[..., None].expand(-1, -1, cut.patches.shape[2]), 0.0)
    return cut.joined(patches, images.shape[1])


def shuffled(images: Tensor, key: Tensor, grid: Grid) -> Tensor:
    """With the patches of a grid in random order: b c h w, b"""
    cut = Cut.of(images, grid)
    order = rng.permutation(rng.fold(key, "shuffle"), grid[0] * grid[1])
    patches = cut.patches.gather(1, order[..., None].expand_as(cut.patches))
    return cut.joined(patches, images.shape[1])


def shuffles(size: tuple[int, int]) -> list[int]:
    """k of the grids k x k that images of this size divide into: 1, 2, 4, ... while a patch has two pixels a side."""
    sides = [1]
    while all(n % (2 * sides[-1]) == 0 and n >= 4 * sides[-1] for n in size):
        sides.append(2 * sides[-1])
    return sides
