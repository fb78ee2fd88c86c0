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
    """Output row o is the sum over t of weight[b, o, t] times input row index[b, o, t]. Ready for images of several
    channels, with a channel axis after b: then rows are counted through all channels and samples of a piece."""

    index: Tensor  # b o t, int32
    weight: Tensor  # b o t, float32


def across_channels(taps: Taps, channels: int, rows: Tensor | int, place: Tensor) -> Taps:
    """b o t -> b c o t: taps for samples of `rows` rows (each, or all) at their place in a piece."""
    plane = torch.arange(channels) + (place * channels).unsqueeze(-1)
    offset = (plane * rows).int().unsqueeze(-1).unsqueeze(-1)
    index = taps.index.unsqueeze(1) + offset
    return Taps(index, taps.weight.unsqueeze(1).expand_as(index).contiguous())


def combine_rows(images: Tensor, taps: Taps) -> Tensor:
    """float b c H W, taps b c h t -> b c h W"""
    index, weight = (x.flatten(0, 2) for x in taps)
    rows = F.embedding_bag(index, images.flatten(0, 2), per_sample_weights=weight, mode="sum")
    return rows.unflatten(0, taps.index.shape[:3])


def separable(images: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """float b c H W, taps b c h t and b c w t -> b c w h, transposed: the next separable map transposes it back."""
    return combine_rows(combine_rows(images, rows).transpose(2, 3).contiguous(), columns)


def kernel(x: Tensor, interpolation: Interpolation) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp_(min=0)
    # Keys' cubic with a = -1/2, as Pillow and torchvision take it when antialiasing (they take -3/4 when not): the
    # outer branch -x^3/2 + 5x^2/2 - 4x + 2, and below 1 also what the inner one has more, (x - 1)^2 (2x - 1).
    near, x = x.clamp(max=1), x.clamp_(max=2)
    outer = (-0.5 * x + 2.5).mul_(x).sub_(4).mul_(x).add_(2)
    return (near - 1).square_().mul_(near.mul_(2).sub_(1)).add_(outer)


def normalized(weight: Tensor) -> Tensor:
    # Added one after another, so that further taps of weight zero do not change the last bit: a batch has as many
    # taps as its widest sample needs.
    return weight / sum(weight.split(1, dim=-1))


class Placed(NamedTuple):
    """Where the taps of an axis lie, a row per sample. Worked out on the CPU, in float64 until the pixel is known:
    float32 would be off by 1e-4 of a pixel in a large image, and some devices have nothing better."""

    first: Tensor  # b o, int32: the first tap
    distance: Tensor  # b o, float32: of that pixel's middle from what the output pixel shows the middle of
    start: Tensor  # b 1, int32: the first pixel of the crop
    last: Tensor  # b 1, int32: and the last
    stretch: Tensor  # b 1, float32: of the kernel
    most: int  # taps that a sample needs


def place(axis: Axis, size: int, interpolation: Interpolation) -> Placed:
    start, length, resized, offset, flip = (rearrange(x, "b -> b 1") for x in axis)
    scale = length.double() / resized
    stretch = scale.clamp(min=1)
    radius = 1 if interpolation == "bilinear" else 2
    position = torch.arange(size)
    shown = torch.minimum(torch.where(flip, size - 1 - position, position) + offset, resized - 1)  # the border repeats
    center = scale * (shown + 0.5)
    first = (center - radius * stretch + 0.5).floor()
    distance = (first + 0.5 - center).float()  # counted from the start of the crop: where it lies changes no bit
    most = 2 * math.ceil(radius * stretch.max()) + 1
    return Placed((first + start).int(), distance, start.int(), (start + length - 1).int(), stretch.float(), most)


def weigh(placed: Placed, interpolation: Interpolation) -> Taps:
    """b o t: the kernel is stretched by the factor of reduction, sampled at the source pixels and cut at the border of
    the crop, as in Pillow and in torchvision's antialiased resize. Weights are still to be normalised."""
    first, distance, start, last, stretch = (x.unsqueeze(-1) for x in placed[:5])
    tap = torch.arange(placed.most, dtype=torch.int32, device=first.device)
    weight = kernel((distance + tap) / stretch, interpolation)
    wanted = first + tap
    index = wanted.clamp(start, last)
    return Taps(index, weight * (index == wanted))


def resize_taps(axis: Axis, size: int, interpolation: Interpolation) -> Taps:
    index, weight = weigh(place(axis, size, interpolation), interpolation)
    return Taps(index, normalized(weight))


class Resize:
    """Crop, resize and flip: prepared for a batch, carried out for pieces of `step` samples. Of samples that are a
    piece each, only the crop is read."""

    def __init__(self, pixels: Tensor, axes: tuple[Axis, Axis], size: tuple[int, int], kind: Interpolation, step: int):
        self.pixels, number = pixels, torch.arange(len(pixels)) % step
        self.boxes, taps = [], []
        for axis, length, out in zip(axes, pixels.shape[2:], size, strict=True):
            first, last = torch.zeros_like(axis.start), torch.full_like(axis.start, length)
            if step == 1:
                # embedding_bag compiles a kernel for each width, so boxes are multiples of 16.
                first = axis.start
                last = (axis.start + (axis.length + 15) // 16 * 16).clamp(max=length)
            self.boxes.append([slice(*box) for box in zip(first.tolist(), last.tolist(), strict=True)])
            within = resize_taps(axis._replace(start=axis.start - first), out, kind)
            taps.append(across_channels(within, pixels.shape[1], (last - first).unsqueeze(-1), number))
        self.rows, self.columns = taps
        self.alone = step == 1

    def __call__(self, run: slice) -> Tensor:
        """uint8 samples of a piece -> b c w h in 0..255, transposed. Cubic weights overshoot: not yet clamped."""
        images = self.pixels[run]
        if self.alone:
            rows, columns = self.boxes
            images = images[:, :, rows[run.start], columns[run.start]]
        return separable(images.float(), *(Taps(*(x[run] for x in taps)) for taps in (self.rows, self.columns)))


def gaussian(sigma: Tensor) -> tuple[list[int], Tensor]:
    """How far the blur of each sample reaches, and the weights of its taps, with zeros up to the farthest: b t"""
    reach = torch.ceil(BLUR_REACH * sigma)
    # exp(-d^2 / 2 sigma^2) from that of d - 1. math.exp and products give a value the same bits wherever it stands in
    # the batch; a vectorised exp need not.
    ratio = torch.tensor([math.exp(-0.5 / s**2) if s else 0.0 for s in sigma.tolist()], dtype=torch.float64)
    weight, step = torch.ones_like(ratio), ratio
    half, whole = [weight], reach.int().tolist()
    for distance in range(1, max(whole, default=0) + 1):
        weight, step = weight * step, step * ratio.square()
        half.append(weight * (distance <= reach))
    return whole, normalized(torch.stack(half[:0:-1] + half, dim=-1)).float()


class Blur:
    """The Gaussian, sampled at whole pixels up to 4 sigma, with borders that reflect the image without repeating its
    last pixel (again and again where the blur reaches farther than the image). Prepared for a batch, carried out for
    any of its samples.

    This is torchvision's gaussian_blur with kernel_size = 2 ceil(4 sigma) + 1. Pillow's GaussianBlur, which MoCo v3
    and DINO call, runs three box blurs of the same variance instead and repeats the border pixel.
    """

    def __init__(self, sigma: Tensor, size: tuple[int, int], channels: int) -> None:
        self.reach, self.weight = gaussian(sigma)
        self.most = self.weight.shape[1] // 2
        self.mirrors = [mirrored(length, self.most, channels) for length in size]

    def __call__(self, images: Tensor, samples: list[int]) -> Tensor:
        """b c w h -> b c h w: takes a transposed batch of these samples."""
        most = max(self.reach[sample] for sample in samples)
        window = slice(self.most - most, self.most + most + 1)
        weight = self.weight[samples, window].unsqueeze(1).unsqueeze(1)
        place = torch.arange(len(samples), dtype=torch.int32).view(-1, 1, 1, 1)
        taps = []
        for mirror in self.mirrors:
            index = mirror[..., window] + place * mirror.shape[:2].numel()
            taps.append(Taps(index, weight.expand_as(index)))
        rows, columns = taps
        return separable(images, columns, rows)


def mirrored(length: int, reach: int, channels: int) -> Tensor:
    """The rows within reach of each row of each channel, by reflection, counted through all channels -> c o t"""
    index = torch.arange(length).unsqueeze(-1) + torch.arange(-reach, reach + 1)
    period = max(2 * (length - 1), 1)
    index = index.remainder(period)
    index = torch.minimum(index, period - index).clamp(max=length - 1)
    return (index + torch.arange(0, channels * length, length).unsqueeze(-1).unsqueeze(-1)).int()
