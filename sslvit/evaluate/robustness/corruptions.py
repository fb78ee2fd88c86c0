"""The corruptions of ImageNet-C (Hendrycks and Dietterich 2019, https://arxiv.org/abs/1903.12261), in five strengths.

Fourteen of the fifteen: frost is left out, since it is made of six photographs. Drawn by keys, so that an image is
corrupted in the same way in any batch. Parameters are those of ImageNet-C (as in imagecorruptions 1.1.2, for 224 px)
above 96 px and those of CIFAR-10-C (for 32 px) up to that, both from https://github.com/hendrycks/robustness.

The arithmetic is that of imagecorruptions, which has its own motion blur in place of ImageMagick's and an elastic
transform without ImageNet-C's affine one; CIFAR-10-C's has it, and here too. Its glass blur writes one pixel over
another where the paper exchanges the two, and so does this one. Deviations: zoomed images of CIFAR-10-C are cut at
their middle, here at their corner; they are not saved as JPEG files, as ImageNet-C's images are.
"""

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslvit import rng
from sslvit.evaluate.robustness import pixels
from sslvit.views.pretraining import is_thumbnail

STRENGTHS = (1, 2, 3, 4, 5)
ROUNDING = 1e-6  # of a level: pixels are cut off to whole numbers, and a sum that is one must not fall below it
LUMA = (0.299, 0.587, 0.114)


def gaussian_noise(x: Tensor, key: Tensor, spread: float) -> Tensor:
    return x + rng.normal(key, *x.shape[1:]).double() * spread


def shot_noise(x: Tensor, key: Tensor, photons: int) -> Tensor:
    """Poisson numbers, by the inverse of their distribution at uniform ones."""
    table, levels = poisson(photons).to(x.device), (x * 255).round()
    place = torch.searchsorted(table.flatten(), rng.uniform(key, *x.shape[1:]) + levels)
    return (place - levels.long() * table.shape[1]).double() / photons


@cache
def poisson(photons: int) -> Tensor:
    """For each level of 0..255 the chances of at most 0, 1, ... photons; the level is added, so that all of them
    ascend."""
    mean = torch.arange(256, dtype=torch.float64)[:, None] * (photons / 255)
    count = torch.arange(int(photons + 12 * photons**0.5 + 20), dtype=torch.float64)
    chances = (torch.xlogy(count, mean) - mean - torch.lgamma(count + 1)).exp().cumsum(1).clamp(max=1)
    chances[:, -1] = 1
    return chances + torch.arange(256)[:, None]


def impulse_noise(x: Tensor, key: Tensor, share: float) -> Tensor:
    flipped, white = (rng.uniform(rng.fold(key, i), *x.shape[1:]).double() for i in (0, 1))
    return torch.where(flipped <= share, (white <= 0.5).double(), x)


def defocus_blur(x: Tensor, key: Tensor, radius: float, sigma: float) -> Tensor:
    return pixels.weighted(x, pixels.disk(radius, sigma), pixels.reflected)


def glass_blur(x: Tensor, key: Tensor, sigma: float, reach: int, times: int) -> Tensor:
    """Each pixel, from the last one on, is replaced by a near one. Chains of replacements are followed by doubling."""
    x = whole(pixels.gaussian(x, (sigma, sigma), pixels.clamped))
    b, c, h, w = x.shape
    place = torch.arange(h * w, device=x.device).view(h, w)
    inside = torch.zeros(h, w, dtype=torch.bool, device=x.device)
    inside[reach + 1 : h - reach + 1, reach + 1 : w - reach + 1] = True
    for time in range(times):
        across, down = (rng.integers(rng.fold(key, time), 2 * reach, h, w, 2) - reach).unbind(-1)
        source = torch.where(inside, place + down * w + across, place)
        replaced = inside.flatten()[source.flatten(1)].view_as(source) & (source > place)  # before this one was
        # The first half of these pointers is for pixels as they end, the second for pixels as they are.
        pointer = torch.cat([torch.where(replaced, source, source + h * w), (place + h * w).expand(b, h, w)], 1)
        pointer = pointer.flatten(1)
        for _ in range((h * w).bit_length()):
            pointer = pointer.gather(1, pointer)
        ends = (pointer[:, : h * w] - h * w)[:, None].expand(b, c, h * w)
        x = x.flatten(2).gather(2, ends).view(b, c, h, w)
    return pixels.gaussian(x, (sigma, sigma), pixels.clamped)


def motion_blur(x: Tensor, key: Tensor, radius: int, sigma: float) -> Tensor:
    return pixels.motion(x, radius, sigma, rng.uniform(key).double() * 90 - 45)


def zoom_blur(x: Tensor, key: Tensor, end: float, step: float) -> Tensor:
    factors = np.arange(1, end, step).tolist()
    total = x.clone()
    for factor in factors:
        total += pixels.zoomed(x, factor)[..., : x.shape[2], : x.shape[3]]
    return total / (len(factors) + 1)


def snow(x: Tensor, key: Tensor, *settings: Any) -> Tensor:
    mean, spread, zoom, least, radius, sigma, rest = settings
    flakes = rng.normal(rng.fold(key, "flakes"), 1, *x.shape[2:]).double() * spread + mean
    flakes = pixels.zoomed(flakes, zoom)
    flakes = torch.where(flakes < least, 0.0, flakes).clamp(0, 1)
    angle = rng.uniform(rng.fold(key, "angle")).double() * 90 - 135
    layer = (pixels.motion(flakes, radius, sigma, angle) * 255).round() / 255
    layer = layer[..., : x.shape[2], : x.shape[3]]
    grey = sum(x[:, i : i + 1] * share for i, share in enumerate(LUMA)) if x.shape[1] == 3 else x
    return x * rest + torch.maximum(x, grey * 1.5 + 0.5) * (1 - rest) + layer + layer.flip(2, 3)


def fog(x: Tensor, key: Tensor, thickness: float, decay: float) -> Tensor:
    h, w = x.shape[2:]
    clouds = pixels.plasma(key, 1 << (max(h, w) - 1).bit_length(), decay)[:, None, :h, :w]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + clouds * thickness) * brightest / (brightest + thickness)


def brightness(x: Tensor, key: Tensor, more: float) -> Tensor:
    """A larger value of HSV, of the same hue and saturation."""
    value = x.amax(1, keepdim=True)
    brighter = (value + more).clamp(max=1)
    return torch.where(value > 0, x * (brighter / value.clamp_min(1e-9)), brighter)


def contrast(x: Tensor, key: Tensor, share: float) -> Tensor:
    mean = (x * 255).round().sum((2, 3), keepdim=True) / (255 * x.shape[2] * x.shape[3])  # whole numbers: exact
    return (x - mean) * share + mean


def elastic_transform(x: Tensor, key: Tensor, amplitude: float, sigma: float, corners: float) -> Tensor:
    """Shares of the image: how far and how smoothly pixels move, and how far three corners do before."""
    b, _, h, w = x.shape
    rows, columns = (torch.arange(n, dtype=torch.float64, device=x.device).expand(b, 1, n) for n in (h, w))
    rows = rows.mT
    if corners:
        middle, reach = torch.tensor([w // 2, h // 2]), min(h, w) // 3
        before = (middle + torch.tensor([[reach, reach], [reach, -reach], [-reach, -reach]])).double()
        moved = before + (rng.uniform(rng.fold(key, "corners"), 3, 2).double().cpu() * 2 - 1) * (corners * h)
        back = torch.linalg.solve(torch.cat([moved, torch.ones(b, 3, 1)], 2), before.expand(b, 3, 2)).to(x.device)
        back = back[..., None, None]
        across, down = (columns * back[:, 0, i] + rows * back[:, 1, i] + back[:, 2, i] for i in (0, 1))
        x = pixels.sampled(x, down, across, pixels.reflected)
    if amplitude:
        offsets = [rng.uniform(rng.fold(key, axis), 1, h, w).double() * 2 - 1 for axis in ("columns", "rows")]
        across, down = (
            pixels.gaussian(one, (sigma * h, sigma * w), pixels.mirrored, truncate=3)[:, 0] * (amplitude * h)
            for one in offsets
        )
        x = pixels.sampled(x, rows + down, columns + across, pixels.mirrored)
    return x


def pixelate(x: Tensor, key: Tensor, share: float) -> Tensor:
    def change(image: Image.Image) -> Image.Image:
        small = max(1, int(image.width * share)), max(1, int(image.height * share))
        return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)

    return by_pillow(x, change)


def jpeg_compression(x: Tensor, key: Tensor, quality: int) -> Tensor:
    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return by_pillow(x, change)


def by_pillow(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """One image after another."""
    arrays = (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    changed = [np.asarray(change(Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one))) for one in arrays]
    return torch.from_numpy(np.stack(changed)).reshape(arrays.shape).permute(0, 3, 1, 2).to(x) / 255


# Of each its function, and its parameters by strength: ImageNet-C's, then CIFAR-10-C's.
Table = tuple[Any, ...]
CORRUPTIONS: dict[str, tuple[Callable[..., Tensor], Table, Table]] = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.1)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (
        defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": (
        glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": (
        motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "zoom_blur": (
        zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    "snow": (
        snow,
        ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
         (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
        ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
         (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
    ),
    "fog": (
        fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        elastic_transform, tuple((1.25 * k, 0.01, 0) for k in (0.05, 0.065, 0.085, 0.1, 0.12)),
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
}  # fmt: skip
NAMES = tuple(CORRUPTIONS)


def table_of(size: tuple[int, int]) -> str:
    """Whose parameters images of this height and width get."""
    return "CIFAR-10-C" if is_thumbnail(size) else "ImageNet-C"


def whole(x: Tensor) -> Tensor:
    """Cut off to the 256 levels of a pixel."""
    return (x.clamp(0, 1) * 255 + ROUNDING).floor() / 255


def corrupt(images: Tensor, name: str, strength: int, key: Tensor) -> Tensor:
    """Images in [0, 1] by one of NAMES: b c h w and a key for each, b -> b c h w, in the levels of pixels. Both are
    rounded to these before and cut off after, as files are."""
    if name not in CORRUPTIONS or strength not in STRENGTHS:
        raise ValueError(f"corruption {name!r} of strength {strength}: there are {', '.join(NAMES)}, of 1 to 5")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or key.shape != images.shape[:1]:
        raise ValueError(
            f"images of shape {tuple(images.shape)} and keys of shape {tuple(key.shape)}: corruptions are for images "
            "b c h w of 1 or 3 channels with as many keys"
        )
    function, large, small = CORRUPTIONS[name]
    chosen = (small if is_thumbnail((images.shape[2], images.shape[3])) else large)[strength - 1]
    levels = (images.double() * 255).round() / 255
    changed = function(levels, rng.fold(key, name, strength), *(chosen if isinstance(chosen, tuple) else (chosen,)))
    return whole(changed).to(images.dtype)
