"""Crop, resize and flip as one pair of small matrices a sample: rows @ image @ columns^T.

Antialiased resampling is linear and separable, so a crop, its resize to the output size and a flip are one matrix an
axis. The weights are those of torchvision (and of Pillow, whose filter it adopted): the kernel is stretched by the
factor of reduction, sampled at the source pixels, cut at the border of the crop and normalised.
"""

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]


class Axis(NamedTuple):
    """What an output axis shows of an input axis, a row per sample: pixels [start, start + length) are resized to
    `resized` pixels, of which those from `offset` on are kept, in reversed order if `flip`."""

    start: Tensor
    length: Tensor
    resized: Tensor
    offset: Tensor
    flip: Tensor


def kernel(x: Tensor, interpolation: Interpolation) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp_(min=0)
    # Keys' cubic with a = -1/2, as Pillow and torchvision take it when antialiasing (they take -3/4 when not).
    inner = ((1.5 * x - 2.5) * x).mul_(x).add_(1)
    x = x.clamp(max=2)
    outer = ((-0.5 * x + 2.5) * x - 4).mul_(x).add_(2)
    return torch.where(x < 1, inner, outer)


def resize_weights(axis: Axis, size_in: int, size_out: int, interpolation: Interpolation) -> Tensor:
    """One matrix a sample: b o i."""
    start, length, resized, offset, flip = (rearrange(x, "b -> b 1") for x in axis)
    scale = length / resized
    position = torch.arange(size_out, device=start.device)
    position = torch.where(flip, size_out - 1 - position, position) + offset
    center = rearrange(start + scale * (position + 0.5), "b o -> b o 1")
    source = torch.arange(size_in, device=start.device)
    weights = kernel((source + 0.5 - center) / rearrange(scale.clamp(min=1), "b 1 -> b 1 1"), interpolation)
    inside = (source >= start) & (source < start + length)
    weights *= rearrange(inside, "b i -> b 1 i")
    return weights / weights.sum(-1, keepdim=True)


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """b c H W, b h H, b w W -> b c h w"""
    channels = images.shape[1]
    wide = torch.bmm(rearrange(images, "b c y x -> b (c y) x"), rearrange(columns, "b w x -> b x w"))
    wide = rearrange(wide, "b (c y) w -> b c y w", c=channels)
    out = images.new_empty(*images.shape[:2], rows.shape[1], columns.shape[1])
    for channel in range(channels):
        out[:, channel] = torch.bmm(rows, wide[:, channel])
    return out
