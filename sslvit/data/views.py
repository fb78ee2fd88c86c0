"""Batched augmentation: a uint8 batch -> a tuple of float batches in [0, 1], on the device where the batch lies.

Every sample draws its own parameters from its own key, as one row of each parameter tensor, so neither the batch nor
the order in which samples are read can change a view. A view is a frozen dataclass; each of its operations is a pair
of functions, one that draws parameters and one that applies them.

A batch is a canvas (b c H W); with `extents` (b 2) sample i is the top left extents[i] = (height, width) of it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from sslvit import rng
from sslvit.data.resample import Axis, Interpolation, resample, resize_weights

CHUNK = 1 << 18  # values of an image batch that are worked on at a time on a CPU: they stay in the cache


class Crop(NamedTuple):
    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def both(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def check(pixels: Tensor, key: Tensor, extents: Tensor | None) -> Tensor:
    """The extents, once the batch is known to be one."""
    if pixels.ndim != 4 or pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8 of shape b c H W, not {pixels.dtype} of shape {tuple(pixels.shape)}")
    if key.shape != pixels.shape[:1]:
        raise ValueError(f"{len(pixels)} images need as many keys, not keys of shape {tuple(key.shape)}")
    height, width = pixels.shape[-2:]
    if extents is None:
        return torch.tensor([height, width]).expand(len(pixels), 2)
    if extents.shape != (len(pixels), 2):
        raise ValueError(f"extents of {len(pixels)} images have shape (b, 2), not {tuple(extents.shape)}")
    extents = extents.to("cpu", torch.int64)
    if bool((extents < 1).any()) or bool((extents > torch.tensor([height, width])).any()):
        raise ValueError(f"extents {extents.tolist()} do not lie in 1..{height} and 1..{width}, the canvas")
    return extents


def draw_crop(key: Tensor, extents: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> Crop:
    """RandomResizedCrop's box: ten tries to fit a random area and aspect ratio, else the largest central box.

    All ten are drawn at once and the first that fits is taken, which is the same distribution. float64, because
    devices round exp differently and a rounded half must not become another box.
    """
    u = rng.uniform(key, 22).double()
    height, width = (rearrange(x, "b -> b 1") for x in extents.to(key.device).double().unbind(-1))
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:, :10])
    low, high = torch.tensor(ratio, dtype=torch.float64).log().tolist()
    aspect = (low + (high - low) * u[:, 10:20]).exp()
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    tries = torch.arange(10, device=key.device)
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = torch.where(fits, tries, 10).amin(-1, keepdim=True)
    # No try fits: all of the image if its own ratio is allowed, else the largest part with the nearest allowed one.
    central_h = torch.minimum(height, (width / ratio[0]).round())
    central_w = torch.minimum(width, (height * ratio[1]).round())
    taken = first.clamp(max=9)
    h = torch.where(first < 10, h.gather(-1, taken), central_h)
    w = torch.where(first < 10, w.gather(-1, taken), central_w)
    top = torch.where(first < 10, u[:, 20:21] * (height - h + 1), (height - h) / 2).floor()
    left = torch.where(first < 10, u[:, 21:22] * (width - w + 1), (width - w) / 2).floor()
    return Crop(*(x.to(torch.int64).squeeze(-1) for x in (top, left, h, w)))


def draw_flip(key: Tensor, probability: float) -> Tensor:
    return rng.uniform(key) < probability


def apply_crop(pixels: Tensor, crop: Crop, flip: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """uint8 b c H W -> b c h w in [0, 1]"""
    nothing = torch.zeros_like(crop.top)
    vertical = Axis(crop.top, crop.height, torch.full_like(nothing, size[0]), nothing, nothing.bool())
    horizontal = Axis(crop.left, crop.width, torch.full_like(nothing, size[1]), nothing, flip)
    return apply_resize(pixels, vertical, horizontal, size, interpolation)


def apply_resize(
    pixels: Tensor, vertical: Axis, horizontal: Axis, size: tuple[int, int], interpolation: Interpolation
) -> Tensor:
    device = pixels.device
    vertical, horizontal = (Axis(*(x.to(device) for x in axis)) for axis in (vertical, horizontal))
    out = torch.empty(*pixels.shape[:2], *size, device=device)
    step = max(1, CHUNK // pixels[0].numel()) if device.type == "cpu" else len(pixels)
    for start in range(0, len(pixels), step):
        part = slice(start, start + step)
        rows = resize_weights(Axis(*(x[part] for x in vertical)), pixels.shape[2], size[0], interpolation)
        columns = resize_weights(Axis(*(x[part] for x in horizontal)), pixels.shape[3], size[1], interpolation)
        # Cubic weights overshoot at edges; uint8 pipelines clamp there too.
        out[part] = resample(pixels[part] / 255, rows, columns).clamp_(0, 1)
    return out


@dataclass(frozen=True)
class Light:
    """MAE's view (https://arxiv.org/abs/2111.06377): a random resized crop and a flip."""

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    flip: float = 0.5

    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None) -> tuple[Tensor, ...]:
        extents = check(pixels, key, extents)
        key = rng.fold(key, "view", 0)
        crop = draw_crop(rng.fold(key, "crop"), extents, self.scale, self.ratio)
        flip = draw_flip(rng.fold(key, "flip"), self.flip)
        return (apply_crop(pixels, crop, flip, both(self.size), self.interpolation),)


@dataclass(frozen=True)
class Plain:
    """The evaluation view: the whole image resized to the size; with `resize`, its shorter side is resized to that
    and the centre of the size is cut out (256 and 224 is ImageNet's custom)."""

    size: int | tuple[int, int]
    resize: int | None = None
    interpolation: Interpolation = "bicubic"

    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None) -> tuple[Tensor, ...]:
        extents = check(pixels, key, extents)
        size = both(self.size)
        resized = torch.tensor(size).expand_as(extents)
        if self.resize is not None:
            if self.resize < max(size):
                raise ValueError(f"resize {self.resize} leaves no centre of size {size}")
            # torchvision's rule: the longer side is truncated to whole pixels.
            resized = self.resize * extents // extents.amin(-1, keepdim=True)
        if (
            bool((extents == torch.tensor(pixels.shape[2:])).all())
            and bool((resized == extents).all())
            and (pixels.shape[2:] == torch.Size(size))
        ):
            return (pixels / 255,)
        nothing = torch.zeros_like(extents)
        # Half offsets go to the even pixel, as Python's round has it in torchvision's center_crop.
        offset = ((resized - torch.tensor(size)) / 2).round().to(torch.int64)
        axes = (Axis(nothing[:, i], extents[:, i], resized[:, i], offset[:, i], nothing[:, i].bool()) for i in range(2))
        return (apply_resize(pixels, *axes, size, self.interpolation),)
