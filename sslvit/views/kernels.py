"""The views of a batch in few kernels, for a GPU, which computes a small one faster than it is told of it.

The same views as on a CPU, up to rounding. All of one size are one batch, and nothing is worked on by rows, but the
blur: each sample goes through every step, and where one is not drawn for it, its numbers leave it as it is. These
numbers are worked out on the CPU and come in one copy, so that nothing waits for the device.

Images lie in memory as b w c h while they are worked on, so that the taps of a row or column serve all channels.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sslvit.processes.device import send, send_together
from sslvit.views import color
from sslvit.views.color import LUMA, SOLARIZE_FROM, Jitter
from sslvit.views.crop import Crop, resized
from sslvit.views.resample import Axis, Interpolation, Placed, Taps, gaussian, mirrored, place, weigh

AFFINE = 3  # of the four colour operations; the last turns the hue
STEPS = 2 * AFFINE + 1
RED_GREEN, BLUE = LUMA[1] / (LUMA[0] + LUMA[1]), LUMA[2] / sum(LUMA)  # shares of the later one in a mean of two
NEVER = 2.0  # a threshold that no value reaches


class Distortion(NamedTuple):
    """What happens to the samples of a batch in one view, a row per sample."""

    crop: Crop
    jitter: Jitter
    grey: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor


class Part(NamedTuple):
    """Views of one size, (v b): of all images the first of their views, then the second, and so on."""

    drawn: Distortion
    size: tuple[int, int]


class Rows(NamedTuple):
    """Output rows and columns of all samples, r, and what they need; see `Placed`."""

    first: Tensor  # r
    distance: Tensor  # r
    samples: Tensor  # s 3: start, last, and the bits of stretch
    most: int  # taps
    shapes: list[tuple[int, ...]]  # of each axis of each part: samples, outputs


class Colors(NamedTuple):
    """What happens to the colours of n samples, in three steps before the hue is turned, three after it, and one that
    makes them grey: each mixes a pixel with another."""

    factor: Tensor  # 7 n: how much of it stays
    grey: Tensor  # 7 n: how much of its own grey the other has
    mean: Tensor  # 7 n: and how much of the grey of all pixels, added up
    shift: Tensor  # n 3: of the hue, from each channel's own
    threshold: Tensor  # n: of solarizing


class Blurs(NamedTuple):
    """Blurs of some samples."""

    rows: Tensor  # m
    weight: Tensor  # m t
    lines: list[tuple[Tensor, Tensor]]  # of height and width, or once if they are alike: the taps of an output, o t,
    # and how many outputs are before each sample's, m 1 1


def fitted(pixels: Tensor, axes: tuple[Axis, Axis], size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """uint8 b c H W -> b c h w in [0, 1]"""
    rows = send_together(placed(pixels, [(axes, size)], interpolation), pixels.device)
    (images,) = resampled(pixels, rows, owners(tuple(rows.shapes), pixels.device), interpolation)
    return images.transpose(2, 3).contiguous()


def distorted(pixels: Tensor, parts: Sequence[Part], interpolation: Interpolation) -> list[Tensor]:
    """uint8 b c H W -> (v b) c h w in [0, 1] of each part"""
    rows = placed(pixels, [(resized(part.drawn.crop, part.size), part.size) for part in parts], interpolation)
    colors = [plan(part.drawn, part.size, pixels.shape[1]) for part in parts]
    blurs = [plan_blurs(part.drawn, part.size) for part in parts]
    rows, colors, blurs = send_together((rows, colors, blurs), pixels.device)
    owner, out = owners(tuple(rows.shapes), pixels.device), []
    for part, images, color_plan, blur in zip(
        parts, resampled(pixels, rows, owner, interpolation), colors, blurs, strict=True
    ):
        made = blurred(colored(images, color_plan), blur)
        out.append(solarized(made, color_plan.threshold) if part.drawn.solarize.any() else made)
    return out


def placed(
    pixels: Tensor, parts: Sequence[tuple[tuple[Axis, Axis], tuple[int, int]]], interpolation: Interpolation
) -> Rows:
    each = []
    for axes, sizes in parts:
        # Rows are counted through the images, columns through the views.
        for axis, size, length, images in zip(
            axes, sizes, pixels.shape[2:], (len(pixels), len(axes[0].start)), strict=True
        ):
            at = place(axis, size, interpolation)
            before = length * (torch.arange(len(axis.start), dtype=torch.int32) % images).unsqueeze(1)
            each.append(at._replace(first=at.first + before, start=at.start + before, last=at.last + before))
    samples = [torch.cat([at.start, at.last, at.stretch.view(torch.int32)], 1) for at in each]
    first, distance = (torch.cat([x.flatten() for x in whole]) for whole in list(zip(*each, strict=True))[:2])
    return Rows(
        first, distance, torch.cat(samples), max(at.most for at in each), [tuple(at.first.shape) for at in each]
    )


@lru_cache(maxsize=8)
def owners(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The number of the sample of each row."""
    counts = torch.cat([torch.full(shape[:1], shape[1]) for shape in shapes])
    return send(torch.repeat_interleave(counts).int(), device)


def resampled(pixels: Tensor, rows: Rows, owner: Tensor, interpolation: Interpolation) -> list[Tensor]:
    """uint8 b c H W -> (v b) c w h in [0, 1] of each part, transposed. owner: the sample of each row."""
    start, last, stretch = rows.samples.index_select(0, owner).unbind(1)
    at = Placed(rows.first, rows.distance, start, last, stretch.view(torch.float32), rows.most)
    index, weight = weigh(at, interpolation)
    ends = torch.arange(0, index.numel(), rows.most, dtype=torch.int32, device=pixels.device)
    # The sums of the weights, by ones in place of pixels. A bag adds one after another, as is done on a CPU, so that
    # further taps of weight zero change nothing.
    ones = weight.new_ones(max(shape[0] * max(pixels.shape[2:]) for shape in rows.shapes), 1)
    total = F.embedding_bag(index.flatten(), ones, ends, per_sample_weights=weight.flatten(), mode="sum")
    weight, sizes = weight / total, [prod(shape) for shape in rows.shapes]
    taps = [
        Taps(i.view(*shape, rows.most), w.view(*shape, rows.most))
        for i, w, shape in zip(index.split(sizes), weight.split(sizes), rows.shapes, strict=True)
    ]
    images, out = pixels.transpose(1, 2).contiguous() / 255, []  # b H c W
    for down, across in zip(taps[::2], taps[1::2], strict=True):
        turned = combine(images, down, ends).permute(0, 3, 2, 1).contiguous()  # b W c h
        out.append(combine(turned, across, ends).clamp_(0, 1).transpose(1, 2))
    return out


def combine(images: Tensor, taps: Taps, ends: Tensor) -> Tensor:
    """By taps b o t that count through all rows of the batch: b n ... -> b o ..."""
    index, weight = (x.flatten() for x in taps)
    shape = taps.index.shape[:2]
    table = images.flatten(0, 1).flatten(1)
    rows = F.embedding_bag(index, table, ends[: shape.numel()], per_sample_weights=weight, mode="sum")
    return rows.view(*shape, *images.shape[2:])


def plan(drawn: Distortion, size: tuple[int, int], channels: int) -> Colors:
    """Brightness, contrast and saturation mix a pixel with black, the mean grey or its own: f x + (1 - f) y."""
    (factors, order, chosen), rgb = drawn.jitter, channels == 3
    turns_hue = order == AFFINE
    position, hue = torch.arange(AFFINE + 1).expand_as(order), turns_hue.int().argmax(-1, keepdim=True)
    step = torch.where(position < hue, position, position + AFFINE - 1).masked_fill(turns_hue, STEPS - 1)

    def per_step(values: Tensor, otherwise: float) -> Tensor:
        values = torch.where(chosen.unsqueeze(1), values.float(), otherwise)
        return torch.full((len(order), STEPS), otherwise).scatter(1, step, values)

    own, whole = (order == color.OPERATIONS.index(each) for each in (color.saturation_, color.contrast_))
    factor = factors.gather(1, order)
    factor, grey, mean = (
        per_step(torch.where(own & (not rgb), 1.0, factor), 1.0),
        per_step(own, 0.0),
        per_step(whole, 0.0),
    )
    factor[:, -1], grey[:, -1], mean[:, -1] = 1 - (drawn.grey & rgb).float(), drawn.grey & rgb, 0.0
    total = sum(LUMA) if rgb else 1.0
    return Colors(
        factor=factor.T,
        grey=grey.T * total,
        mean=mean.T * (total / (size[0] * size[1])),
        shift=color.shifts(torch.where(chosen, factors[:, -1], 0.0)[:, None, None, None]).flatten(1),
        threshold=torch.where(drawn.solarize, SOLARIZE_FROM, NEVER),
    )


def colored(images: Tensor, colors: Colors) -> Tensor:
    """b c h w"""
    factor, grey, mean = (x[:, :, None, None, None] for x in colors[:3])
    for step in range(STEPS - 1):
        if step == AFFINE and images.shape[1] == 3:
            images = color.turned(images, colors.shift[:, :, None, None])
        own = luma(images)
        # Rows first: a sum to a single number may be split, and its last bit would tell how large the batch is.
        mixed = torch.addcmul(own * grey[step], own.sum(-1, keepdim=True).sum(-2, keepdim=True), mean[step])
        images = torch.lerp(mixed, images, factor[step]).clamp_(0, 1)
    return torch.lerp(luma(images) * grey[-1], images, factor[-1])


def luma(images: Tensor) -> Tensor:
    """color.luma, divided by the sum of its weights, which is not quite 1: b c h w -> b 1 h w"""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return torch.lerp(torch.lerp(red, green, RED_GREEN), blue, BLUE)


def solarized(images: Tensor, threshold: Tensor) -> Tensor:
    """As color.solarize_, in place, with a threshold for each sample."""
    upper = torch.ge(images, threshold.view(-1, 1, 1, 1), out=torch.empty_like(images))
    return torch.sub(upper, images, out=images).abs_()


def plan_blurs(drawn: Distortion, size: tuple[int, int]) -> Blurs:
    rows = drawn.blur.nonzero().squeeze(1)
    _, weight = gaussian(drawn.sigma[rows])
    lengths = size[:1] if size[0] == size[1] else size
    before = torch.arange(len(rows), dtype=torch.int32).view(-1, 1, 1)
    lines = [(mirrored(length, weight.shape[1] // 2, 1).squeeze(0), length * before) for length in lengths]
    return Blurs(rows, weight, lines)


def blurred(images: Tensor, blurs: Blurs) -> Tensor:
    """b c w h, transposed -> b c h w"""
    rows, some = blurs.rows, len(blurs.rows) < len(images)
    if not len(rows):
        return images.transpose(2, 3).contiguous()
    part = images.transpose(1, 2)  # b w c h
    part = part.index_select(0, rows) if some else part.contiguous()
    taps = []
    for line, before in blurs.lines:
        index = line + before
        ends = torch.arange(0, index.numel(), line.shape[1], dtype=torch.int32, device=line.device)
        taps.append((Taps(index, blurs.weight.unsqueeze(1).expand_as(index).contiguous()), ends))
    turned = combine(part, *taps[-1]).permute(0, 3, 2, 1).contiguous()  # b h c w
    part = combine(turned, *taps[0]).transpose(1, 2)
    return images.transpose(2, 3).contiguous().index_copy_(0, rows, part) if some else part.contiguous()
