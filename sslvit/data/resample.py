"""Crop, resize, flip and blur as separable linear maps: each output row is a weighted sum of a few input rows.

Resampling works one axis at a time, so a sample needs two small tables: which rows to add with which weights (`Taps`),
and the same for its columns. A crop is an offset in the table, a flip is its order. One kernel applies the tables of
many samples: embedding_bag, a sparse product that reads only the rows it needs (at 224 px several times as fast as
dense products). It adds the taps of a row one after another, so a sample's result is the same to the last bit whatever
is beside it in the batch, and a tap of weight zero changes nothing.

On a CPU the callers work on pieces that fit the cache, where a call costs as much as its arithmetic: hence unsqueeze,
expand and flatten here in place of einops patterns.
"""

import math
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

Interpolation = Literal["bilinear", "bicubic"]
BLUR_REACH = 4  # standard deviations; 6e-5 of a Gaussian lies beyond


class Axis(NamedTuple):
    """What an output axis shows of an input axis, a row per sample: pixels [start, start + length) are resized to
    `resized` pixels, of which those from `offset` on are kept, in reversed order if `flip`."""

    start: Tensor
    length: Tensor
    resized: Tensor
    offset: Tensor
    flip: Tensor


class Taps(NamedTuple):
    """Output row o is the sum over t of weight[b, o, t] times input row index[b, o, t]."""

    index: Tensor  # b o t, int32
    weight: Tensor  # b o t, float32


def combine_rows(images: Tensor, taps: Taps) -> Tensor:
    """float b c H W, taps b h t -> b c h W"""
    b, c, height, _ = images.shape
    planes = torch.arange(0, b * c * height, height, dtype=torch.int32, device=images.device).view(b, c, 1, 1)
    index = taps.index.unsqueeze(1) + planes
    rows = F.embedding_bag(
        index.flatten(0, 2),
        images.flatten(0, 2),
        per_sample_weights=taps.weight.unsqueeze(1).expand_as(index).flatten(0, 2),
        mode="sum",
    )
    return rows.unflatten(0, index.shape[:3])


def separable(images: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """float b c H W, taps b h t and b w t -> b c w h, transposed: the next separable map transposes it back."""
    return combine_rows(combine_rows(images, rows).transpose(2, 3).contiguous(), columns)


def kernel(x: Tensor, interpolation: Interpolation) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp_(min=0)
    # Keys' cubic with a = -1/2, as Pillow and torchvision take it when antialiasing (they take -3/4 when not).
    inner = (1.5 * x - 2.5).mul_(x).mul_(x).add_(1)
    x.clamp_(max=2)
    outer = (-0.5 * x + 2.5).mul_(x).sub_(4).mul_(x).add_(2)
    return torch.where(x < 1, inner, outer)


def normalised(weight: Tensor) -> Tensor:
    # Added one after another, so that further taps of weight zero do not change the last bit: a batch has as many
    # taps as its widest sample needs.
    return weight / sum(weight.split(1, dim=-1))


def resize_taps(axis: Axis, size: int, interpolation: Interpolation, device: torch.device) -> Taps:
    """The kernel is stretched by the factor of reduction, sampled at the source pixels, cut at the border of the crop
    and normalised, as in Pillow and in torchvision's antialiased resize."""
    start, length, resized, offset, flip = (rearrange(x, "b -> b 1") for x in axis)
    # On the CPU in float64 until the pixel is known: float32 would be off by 1e-4 of a pixel in a large image, and
    # some devices have nothing better.
    scale = length.double() / resized
    stretch = scale.clamp(min=1)
    radius = 1 if interpolation == "bilinear" else 2
    count = 2 * math.ceil(radius * stretch.max()) + 1
    position = torch.arange(size)
    center = start + scale * (torch.where(flip, size - 1 - position, position) + offset + 0.5)
    first = (center - radius * stretch + 0.5).floor()
    distance = (first + 0.5 - center).float().to(device).unsqueeze(-1)
    first, low, high = (x.int().to(device).unsqueeze(-1) for x in (first, start, start + length - 1))
    tap = torch.arange(count, dtype=torch.int32, device=device)
    weight = kernel((distance + tap) / stretch.float().to(device).unsqueeze(-1), interpolation)
    index = (first + tap).clamp_(low, high)
    return Taps(index, normalised(weight * (index == first + tap)))


class Resize:
    """Crop, resize and flip: prepared for a batch, carried out for any run of its samples."""

    def __init__(
        self, pixels: Tensor, vertical: Axis, horizontal: Axis, size: tuple[int, int], interpolation: Interpolation
    ) -> None:
        self.pixels = pixels
        self.rows = resize_taps(vertical, size[0], interpolation, pixels.device)
        self.columns = resize_taps(horizontal, size[1], interpolation, pixels.device)
        top, left = vertical.start, horizontal.start
        # embedding_bag compiles a kernel for each width, so widths are cut to multiples of 16.
        right = (left + (horizontal.length + 15) // 16 * 16).clamp(max=pixels.shape[-1])
        self.boxes = torch.stack([top, top + vertical.length, left, right], dim=-1).tolist()

    def __call__(self, run: slice) -> Tensor:
        """uint8 samples of the run -> b c w h in [0, 1], transposed."""
        rows, columns = (Taps(*(x[run] for x in taps)) for taps in (self.rows, self.columns))
        images = self.pixels[run]
        if len(images) == 1:  # a large image, of which nothing but the crop need be read
            top, bottom, left, right = self.boxes[run.start]
            images = images[:, :, top:bottom, left:right]
            rows, columns = Taps(rows.index - top, rows.weight), Taps(columns.index - left, columns.weight)
        # Cubic weights overshoot at edges; uint8 pipelines clamp there too.
        return separable(images.float(), rows, columns).div_(255).clamp_(0, 1)


class Blur:
    """The Gaussian, sampled at whole pixels up to 4 sigma, with borders that reflect the image without repeating its
    last pixel (again and again where the blur reaches farther than the image). Prepared for a batch, carried out for
    any of its samples.

    This is torchvision's gaussian_blur with kernel_size = 2 ceil(4 sigma) + 1. Pillow's GaussianBlur, which MoCo v3
    and DINO call, runs three box blurs of the same variance instead and repeats the border pixel.
    """

    def __init__(self, sigma: Tensor, size: tuple[int, int], device: torch.device) -> None:
        self.size = size
        self.reach = torch.ceil(BLUR_REACH * sigma).int().tolist()
        self.most = max(self.reach, default=0)
        # exp(-d^2 / 2 sigma^2) from that of d - 1. math.exp and products give a value the same bits wherever it
        # stands in the batch; a vectorised exp need not.
        ratio = torch.tensor([math.exp(-0.5 / s**2) for s in sigma.tolist()], dtype=torch.float64)
        weight, step = torch.ones_like(ratio), ratio
        half = [weight]
        for distance in range(1, self.most + 1):
            weight, step = weight * step, step * ratio.square()
            half.append(weight * (distance <= torch.ceil(BLUR_REACH * sigma)))
        self.weight = normalised(torch.stack(half[:0:-1] + half, dim=-1)).float().to(device)
        self.mirrors = [mirrored(length, self.most).to(device) for length in size]

    def __call__(self, images: Tensor, samples: list[int]) -> Tensor:
        """b c w h -> b c h w: takes a transposed batch of these samples."""
        most = max(self.reach[sample] for sample in samples)
        window = slice(self.most - most, self.most + most + 1)
        weight = self.weight[samples, window].unsqueeze(1)
        rows, columns = (
            Taps(mirror[:, window].expand(len(samples), -1, -1), weight.expand(-1, length, -1))
            for mirror, length in zip(self.mirrors, self.size, strict=True)
        )
        return separable(images, columns, rows)


def mirrored(length: int, reach: int) -> Tensor:
    """The pixels within reach of each pixel, by reflection -> o t"""
    index = torch.arange(length, dtype=torch.int32).unsqueeze(-1) + torch.arange(-reach, reach + 1, dtype=torch.int32)
    period = max(2 * (length - 1), 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index).clamp(max=length - 1)
