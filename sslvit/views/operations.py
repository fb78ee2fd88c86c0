"""RandAugment's operations on float batches in [0, 1], in place, each with one amount per sample (b 1 1 1).

Those that are defined on whole numbers (posterize, solarize, equalize, autocontrast) round to 0..255 first; the others
do not round at all, where a uint8 pipeline truncates after every one.
"""

import math
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

Sampling = Literal["nearest", "bilinear"]


def whole_(images: Tensor) -> Tensor:
    """The nearest numbers that a uint8 image could hold, 0..255."""
    return images.mul_(255).round_()


def invert_(images: Tensor) -> None:
    torch.sub(1, images, out=images)


def posterize_(images: Tensor, bits: Tensor) -> None:
    """Keeps the upper bits."""
    step = 1 << (8 - bits).int()
    whole_(images).div_(step).floor_().mul_(step).div_(255)


def solarize_(images: Tensor, threshold: Tensor) -> None:
    """Inverts what reaches the threshold (0..256)."""
    upper = torch.ge(whole_(images), threshold, out=torch.empty_like(images))
    torch.sub(upper.mul_(255), images, out=images).abs_().div_(255)


def solarize_add_(images: Tensor, addition: Tensor) -> None:
    """Adds to what is below 128."""
    lower = torch.lt(whole_(images), 128, out=torch.empty_like(images))
    images.add_(lower.mul_(addition)).clamp_(max=255).div_(255)


def autocontrast_(images: Tensor) -> None:
    """Stretches each channel to 0..255; a channel of one value stays."""
    low = whole_(images).amin((-2, -1), keepdim=True)
    span = images.amax((-2, -1), keepdim=True) - low
    flat = span == 0
    # Multiplied before it is divided: both are then exact where the result is a whole number.
    images.sub_(low.masked_fill(flat, 0)).mul_(255).div_(span.masked_fill(flat, 255)).floor_().div_(255)


def equalize_(images: Tensor) -> None:
    """Pillow's histogram equalisation of each channel: value v becomes (pixels below v + step / 2) / step, in whole
    numbers, where a step is a 255th of all pixels but those of the brightest value."""
    b, c, height, width = images.shape
    values = rearrange(whole_(images), "b c h w -> (b c) (h w)").long()
    # bincount would wait for a GPU, to learn the largest value.
    counts = values.new_zeros(b * c, 256).scatter_add_(1, values, torch.ones_like(values))
    brightest = counts.gather(-1, values.amax(-1, keepdim=True))
    step = (height * width - brightest) // 255
    below = counts.cumsum(-1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table)
    images.copy_(rearrange(table.gather(-1, values), "(b c) (h w) -> b c h w", b=b, h=height)).div_(255)


def sharpness_(images: Tensor, factor: Tensor) -> None:
    """Away from a 3x3 blur (5 in the middle, 1 around, over 13); the border stays."""
    if min(images.shape[-2:]) <= 2:
        return
    rows = images[..., :-2] + images[..., 1:-1] + images[..., 2:]
    soft = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]
    inner = images[..., 1:-1, 1:-1]
    soft.add_(inner * 4).div_(13)
    inner.mul_(factor).add_(soft.mul_(1 - factor)).clamp_(0, 1)


def cutout_(images: Tensor, half: Tensor, center: Tensor, fill: Tensor) -> None:
    """A square of side 2 * half around a pixel (b 2, shares of height and width), cut where it leaves the image."""
    inside = []
    for axis, length in enumerate(images.shape[-2:]):
        pixel = (center[:, axis] * length).floor().clamp_(max=length - 1)
        position = torch.arange(length, device=images.device)
        offset = position - rearrange(pixel, "b -> b 1")
        reach = rearrange(half * length, "b 1 1 1 -> b 1").floor()
        inside.append((offset >= -reach) & (offset < reach))
    rows, columns = inside
    hole = rearrange(rows, "b h -> b 1 h 1") & rearrange(columns, "b w -> b 1 1 w")
    images.copy_(torch.where(hole, fill, images))


def warp_(images: Tensor, matrix: Tensor, sampling: Sampling, fill: Tensor) -> None:
    """Output pixel (x, y) shows input (x, y, 1) @ matrix^T (b 2 3), in pixels from the top left corner of the image."""
    b, _, height, width = images.shape
    x = torch.arange(width, device=images.device) + 0.5
    y = rearrange(torch.arange(height, device=images.device) + 0.5, "h -> h 1")
    across, down = rearrange(matrix, "b row (column h w) -> row column b h w", h=1, w=1)
    source = (row[0] * x + row[1] * y + row[2] for row in (across, down))
    grid = torch.stack([2 * s / n - 1 for s, n in zip(source, (width, height), strict=True)], dim=-1)
    covered = images.new_ones(b, 1, height, width)
    moved = F.grid_sample(torch.cat([images, covered], 1), grid, sampling, "zeros", align_corners=False)
    moved, covered = moved.split([images.shape[1], 1], dim=1)
    # torchvision's rule. Beyond the border grid_sample has counted zeros already, so there `covered` counts twice.
    torch.addcmul(fill, moved.sub_(fill), covered, out=images).clamp_(0, 1)


def matrix_with(amount: Tensor, row: int, column: int) -> Tensor:
    """The identity with one entry increased -> b 2 3"""
    matrix = repeat(torch.eye(2, 3, device=amount.device), "row column -> b row column", b=len(amount)).clone()
    matrix[:, row, column] += amount.flatten()
    return matrix


def rotation_about_center(degrees: Tensor, height: int, width: int) -> Tensor:
    """Counter-clockwise as one sees it -> b 2 3"""
    rows = []
    x, y = width / 2, height / 2
    for angle in degrees.flatten().tolist():
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        rows.append([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])
    return torch.tensor(rows, device=degrees.device)
