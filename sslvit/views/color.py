"""Colour operations on float batches in [0, 1], in place, each with one factor per sample.

The arithmetic is torchvision's on float images (`torchvision.transforms.v2.functional`): a uint8 pipeline truncates to
1/255 after every operation, ours never rounds. Grey images (one channel) pass through saturation, hue and grey
unchanged, as in torchvision; with any other number of channels these three have no meaning and say so.

Written for the cache: few passes, most of them in place, none with a branch. Shapes are b c h w; unsqueeze stands where
einops would, because at 32 px a pattern costs as much as the operation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sslvit import rng

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, in torchvision's digits
SOLARIZE_FROM = 128 / 255  # Pillow's threshold: the upper half of 0..255
HALF_TURN = torch.tensor(3.0)  # in sixths
HUES = (0.0, 2 / 6, 4 / 6)  # where red, green and blue stand, in turns


class Jitter(NamedTuple):
    """ColorJitter's parameters, a row per sample; `order` holds places in OPERATIONS."""

    factors: Tensor  # b 4: brightness, contrast, saturation, hue
    order: Tensor  # b 4
    chosen: Tensor  # b


def draw_jitter(key: Tensor, strengths: tuple[float, float, float, float], probability: float) -> Jitter:
    """Brightness, contrast, saturation in 1 +- strength, not below 0; hue in +- strength of a turn; in random order."""
    u = rng.uniform(key, 9)
    strength = torch.tensor(strengths, device=key.device)
    middle = torch.tensor([1.0, 1.0, 1.0, 0.0], device=key.device)
    low, high = middle - strength, middle + strength
    low[:3].clamp_(min=0)
    return Jitter(low + (high - low) * u[:, :4], u[:, 4:8].argsort(dim=-1, stable=True), u[:, 8] < probability)


def luma(images: Tensor) -> Tensor:
    """b c h w -> b 1 h w; channels other than red, green and blue count alike."""
    channels = images.shape[1]
    weights = LUMA if channels == 3 else (1 / channels,) * channels
    first, *rest = images.split(1, dim=1)
    grey = first * weights[0]
    for channel, weight in zip(rest, weights[1:], strict=True):
        grey.add_(channel, alpha=weight)
    return grey


def brightness_(images: Tensor, factor: Tensor) -> None:
    images.mul_(factor).clamp_(max=1)


def contrast_(images: Tensor, factor: Tensor) -> None:
    # The mean of the grey image is the grey of the mean colour. Rows first: a sum to a single number would be split
    # among threads, and its last bit would tell how many there were.
    mean = luma(images.sum(-1, keepdim=True).sum(-2, keepdim=True)).div_(images.shape[-2] * images.shape[-1])
    images.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def saturation_(images: Tensor, factor: Tensor) -> None:
    if images.shape[1] == 3:
        grey = luma(images).mul_(1 - factor)
        images.mul_(factor).add_(grey).clamp_(0, 1)


def hue_(images: Tensor, turn: Tensor) -> None:
    """Turns the hue of HSV by a fraction of a full turn; value and chroma stay."""
    if images.shape[1] == 3:
        turned(images, shifts(turn), out=images).clamp_(0, 1)


def shifts(turn: Tensor) -> Tensor:
    """The turns from each channel's own hue: b 1 1 1 -> b 3 1 1"""
    # Half a turn too far, so that 0.5 in [0, 1) is where the distance is 0. Two more turns keep it positive.
    return turn - turn.new_tensor(HUES).unsqueeze(-1).unsqueeze(-1) + 2.5


def turned(images: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """Without branches. With e = |g - b| / chroma and p = (max - r) / chroma, the hue's distance from red, in sixths of
    a turn, is e + p (3 - 2 e): on each side of the hexagon p = 0, e = 1 or p = 1, where it is e, 1 + p and 3 - e. The
    sign of g - b, which it takes on, tells left from right. Back: a channel is max - chroma * clamp(distance - 1, 0,
    1), where distance is the turned hue's from the channel's own, in sixths again. Rounding may leave [0, 1].
    """
    red, green, blue = images.split(1, dim=1)
    value = images.amax(1, keepdim=True)
    chroma = (value - images.amin(1, keepdim=True)).clamp_(min=1e-20)  # of grey: 0 / 1e-20 is still 0
    side = (green - blue).div_(chroma)
    p = (value - red).div_(chroma)
    hue = torch.addcmul(side, p, torch.copysign(HALF_TURN, side).sub_(side, alpha=2))
    away = torch.add(shift, hue, alpha=1 / 6).frac_().sub_(0.5).abs_().clamp_(1 / 6, 2 / 6)  # in turns
    # max - chroma * (6 * away - 1)
    return torch.addcmul(value.add_(chroma), chroma, away, value=-6, out=out)


OPERATIONS = (brightness_, contrast_, saturation_, hue_)


def grey_(images: Tensor) -> None:
    if images.shape[1] == 3:
        images.copy_(luma(images))


def solarize_(images: Tensor) -> None:
    # |1 - x| above the threshold and |0 - x| below it.
    upper = torch.ge(images, SOLARIZE_FROM, out=torch.empty_like(images))
    torch.sub(upper, images, out=images).abs_()
