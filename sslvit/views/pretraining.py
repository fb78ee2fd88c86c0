"""Batched augmentation: a uint8 batch -> a tuple of float batches in [0, 1], on the device where the batch lies.

Every sample draws its own parameters from its own key, as one row of each parameter tensor, and no operation mixes
samples: neither the batch nor the order of work can change a bit of a view. `draw` gives the parameters of a view and
`apply` carries them out.

A batch is a canvas, b c H W; with `extents` (b 2) sample i is the top left extents[i] = (height, width) of it. The
blur's sigma is in pixels of the output. A pair of views and multi-crop scale the papers' sigma, which is for 224 px, to
their size, since at 32 px the same sigma would remove far more.

What differs from the official pipelines, all of which use Pillow: the blur is a Gaussian, there three box blurs;
colours are not rounded to 256 levels between operations; and files much larger than the image size are reduced to a
canvas first (--canvas of the configuration).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from sslvit import rng
from sslvit.views import color
from sslvit.views.batching import Size, apply_to_rows, batch, checked, piece_length, pieces, to_pair, true_indices
from sslvit.views.color import draw_jitter
from sslvit.views.crop import Crop, Scaled, centered, draw_crop, resized
from sslvit.views.kernels import Distortion, Part, distorted, fitted
from sslvit.views.resample import Axis, Blur, Interpolation, Resize


def fit(
    pixels: Tensor,
    axes: tuple[Axis, Axis],
    size: tuple[int, int],
    interpolation: Interpolation,
    change_: Callable[[Tensor, slice], None] | None = None,
) -> Tensor:
    """uint8 b c H W -> b c h w in [0, 1]. change_: carried out in place on each piece of the batch."""
    if pixels.device.type != "cpu":
        out = fitted(pixels, axes, size, interpolation)
        if change_:
            change_(out, slice(0, len(out)))
        return out
    step = piece_length(pixels, size)
    resize = Resize(pixels, axes, size, interpolation, step)
    out = batch(*pixels.shape[:2], *size)
    for piece in pieces(len(pixels), step):
        torch.clamp(resize(piece).div_(255).transpose(2, 3), 0, 1, out=out[piece])
        if change_:
            change_(out[piece], piece)
    return out


@dataclass(frozen=True)
class CropFlip(Scaled):
    """MAE's view (https://arxiv.org/abs/2111.06377): a random resized crop and a flip. Other views do more to it."""

    size: Size
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    flip: float = 0.5

    def crop(self, key: Tensor, extents: Tensor) -> Crop:
        return draw_crop(rng.fold(key, "crop"), extents, self.scale, self.ratio, self.flip)

    def draw(self, key: Tensor, extents: Tensor) -> Any:
        return self.crop(key, extents)

    def apply(self, pixels: Tensor, drawn: Any) -> Tensor:
        """uint8 b c H W -> b c h w in [0, 1]"""
        return fit(pixels, resized(drawn, to_pair(self.size)), to_pair(self.size), self.interpolation)

    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None) -> tuple[Tensor, ...]:
        key, extents = checked(pixels, key, extents)
        return (self.apply(pixels, self.draw(rng.fold(key, "view", 0), extents)),)


@dataclass(frozen=True)
class EvalView:
    """The evaluation view: the whole image resized to the size; with `resize`, its shorter side is resized to that
    (with a height and a width, the image to just cover them) and the centre is cut out (256 and 224 for ImageNet)."""

    size: Size
    resize: Size | None = None
    interpolation: Interpolation = "bicubic"

    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None) -> tuple[Tensor, ...]:
        _, extents = checked(pixels, key, extents)
        size, cover = to_pair(self.size), None if self.resize is None else to_pair(self.resize)
        if cover is not None and any(wide < side for wide, side in zip(cover, size, strict=True)):
            raise ValueError(f"resize {self.resize} leaves no centre of size {size}")
        axes = centered(extents, cover, size)
        if all(
            bool((axis.length == n).all() and (axis.resized == n).all()) for axis, n in zip(axes, size, strict=True)
        ):
            return (pixels[:, :, : size[0], : size[1]] / 255,)
        return (fit(pixels, axes, size, self.interpolation),)


THUMBNAIL = 96  # pixels: images up to this size (STL-10, CIFAR, MNIST) are evaluated whole by custom
CENTER_CROP = 0.875  # 224 of 256
LEAST_CROP = 0.1  # smaller shares are mistakes


def is_thumbnail(size: Size) -> bool:
    return max(to_pair(size)) <= THUMBNAIL


def default_eval_crop(size: Size) -> float:
    """The share of the shorter side that is evaluated."""
    return 1.0 if is_thumbnail(size) else CENTER_CROP


def eval_view(size: Size, crop: float | None = None) -> EvalView:
    """The view of every evaluation: in training, by probes and after fine-tuning.

    crop: the share of the shorter side in the centre crop. By default 0.875 above 96 px, as in DINO, MoCo v3
    and MAE at 224 px (above that MAE keeps all of it), and all of it up to 96 px. With 1 the shorter side is resized to
    the size; with 0 nothing is cut and the whole image is squeezed into the size.
    """
    crop = default_eval_crop(size) if crop is None else crop
    if crop != 0 and not LEAST_CROP <= crop <= 1:
        raise ValueError(f"--eval_crop is {crop:g}; it must be a share of the shorter side, from 0.1 to 1, or 0")
    if crop == 0:
        return EvalView(size)
    height, width = (int(side / crop + 1e-9) for side in to_pair(size))  # rounded down, as in DeiT
    return EvalView(size, (height, width))


@dataclass(frozen=True)
class ContrastiveView(CropFlip):
    """Crop, flip, colour jitter, grey, blur and solarize, in this order, the last four with their probabilities."""

    scale: tuple[float, float] = (0.08, 1.0)
    interpolation: Interpolation = "bilinear"
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    jitter: float = 0.8
    grey: float = 0.2
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def draw(self, key: Tensor, extents: Tensor) -> Distortion:
        u = rng.uniform(rng.fold(key, "distortion"), 4)
        return Distortion(
            crop=self.crop(key, extents),
            jitter=draw_jitter(rng.fold(key, "jitter"), self.strengths, self.jitter),
            grey=u[:, 0] < self.grey,
            blur=u[:, 1] < self.blur,
            sigma=self.sigma[0] + (self.sigma[1] - self.sigma[0]) * u[:, 2],
            solarize=u[:, 3] < self.solarize,
        )

    def apply(self, pixels: Tensor, drawn: Distortion) -> Tensor:
        self.check_channels(pixels.shape[1])
        size = to_pair(self.size)
        if pixels.device.type != "cpu":
            return distorted(pixels, [Part(drawn, size)], self.interpolation)[0]
        step = piece_length(pixels, size)
        resize = Resize(pixels, resized(drawn.crop, size), size, self.interpolation, step)
        gaussian = Blur(drawn.sigma, size, pixels.shape[1])
        factors = drawn.jitter.factors.unsqueeze(-1).unsqueeze(-1).unsqueeze(-1).unbind(1)
        orders = torch.where(drawn.jitter.chosen.unsqueeze(-1), drawn.jitter.order, -1).tolist()
        grey, blur, solarize = drawn.grey.tolist(), drawn.blur.tolist(), drawn.solarize.tolist()
        out = batch(*pixels.shape[:2], *size)
        for piece in pieces(len(pixels), step):
            images = resize(piece).div_(255).clamp_(0, 1)  # transposed, which colours do not see
            for position in range(len(color.OPERATIONS)):
                for operation, change in enumerate(color.OPERATIONS):
                    rows = true_indices([order[position] == operation for order in orders[piece]])
                    apply_to_rows(images, rows, change, factors[operation][piece])
            apply_to_rows(images, true_indices(grey[piece]), color.grey_)
            rows = true_indices(blur[piece])
            samples = [piece.start + row for row in rows]
            if len(rows) == len(images):
                out[piece] = gaussian(images, samples)
            else:
                out[piece] = images.transpose(2, 3)
                if rows:
                    out[samples] = gaussian(images[rows], samples)
            apply_to_rows(out[piece], true_indices(solarize[piece]), color.solarize_)
        return out

    def check_channels(self, channels: int) -> None:
        needed = {"saturation": self.strengths[2], "hue": self.strengths[3], "grey": self.grey}
        wanted = [name for name, value in needed.items() if value > 0]
        if channels not in (1, 3) and wanted:
            raise ValueError(f"{' and '.join(wanted)} mean nothing on {channels} channels (1 or 3): use --no-color")


def joined(draws: Sequence[Any]) -> Any:
    """The draws of several views, one after another."""
    if isinstance(draws[0], Tensor):
        return torch.cat(list(draws))
    return type(draws[0])(*(joined(parts) for parts in zip(*draws, strict=True)))


def papers_blur(size: Size) -> tuple[float, float]:
    """The papers' sigma, which is in pixels of their 224, at this size by its shorter side."""
    return 0.1 * min(to_pair(size)) / 224, 2.0 * min(to_pair(size)) / 224


class SeveralViews(Scaled):
    """More than one view of an image. Without colour (color=False) saturation, hue and grey are left out.

    sigma: the range of the blur's, in pixels of the output; by default the papers' at this size.
    """

    size: Size
    sigma: tuple[float, float] | None
    color: bool

    @property
    @abstractmethod
    def views(self) -> tuple[ContrastiveView, ...]: ...

    def view(
        self,
        size: Size,
        scale: tuple[float, float],
        interpolation: Interpolation = "bilinear",
        *,
        blur: float,
        solarize: float = 0.0,
    ) -> ContrastiveView:
        """One of them."""
        sigma = self.sigma or papers_blur(self.size)
        view = ContrastiveView(size, scale, interpolation=interpolation, blur=blur, sigma=sigma, solarize=solarize)
        return view if self.color else replace(view, strengths=(0.4, 0.4, 0.0, 0.0), grey=0.0)

    def check_channels(self, channels: int) -> None:
        for view in self.views:
            view.check_channels(channels)

    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None) -> tuple[Tensor, ...]:
        """Each view by its own draws: its number is part of the key."""
        key, extents = checked(pixels, key, extents)
        if pixels.device.type != "cpu":
            return self.together(pixels, key, extents)
        return tuple(
            view.apply(pixels, view.draw(rng.fold(key, "view", number), extents))
            for number, view in enumerate(self.views)
        )

    def together(self, pixels: Tensor, key: Tensor, extents: Tensor) -> tuple[Tensor, ...]:
        """Views of one size as one batch, and those that are alike by one draw."""
        self.check_channels(pixels.shape[1])
        sizes: dict[tuple[int, int], list[Distortion]] = {}
        for view, alike in groupby(enumerate(self.views), key=lambda each: each[1]):
            keys = [rng.fold(key, "view", number) for number, _ in alike]
            drawn = view.draw(torch.cat(keys), extents.repeat(len(keys), 1))
            sizes.setdefault(to_pair(view.size), []).append(drawn)
        parts = [Part(joined(draws), size) for size, draws in sizes.items()]
        made = distorted(pixels, parts, view.interpolation)
        views = {size: iter(images.split(len(pixels))) for images, size in zip(made, sizes, strict=True)}
        return tuple(next(views[to_pair(view.size)]) for view in self.views)


@dataclass(frozen=True)
class ContrastivePair(SeveralViews):
    """The asymmetric pair of MoCo v3 (https://arxiv.org/abs/2104.02057), which is BYOL's: one view always blurred, the
    other seldom, and sometimes solarized."""

    size: Size
    scale: tuple[float, float] = (0.08, 1.0)  # of its ViTs; its ResNets have 0.2
    sigma: tuple[float, float] | None = None
    color: bool = True
    interpolation: Interpolation = "bilinear"  # VICReg's is bicubic

    @property
    def views(self) -> tuple[ContrastiveView, ...]:
        first = self.view(self.size, self.scale, self.interpolation, blur=1.0)
        return first, self.view(self.size, self.scale, self.interpolation, blur=0.1, solarize=0.2)


@dataclass(frozen=True)
class StrongPair(SeveralViews):
    """SimCLR's two views (https://arxiv.org/abs/2002.05709), with stronger colour jitter, half of them blurred."""

    size: Size
    scale: tuple[float, float] = (0.08, 1.0)
    sigma: tuple[float, float] | None = None
    color: bool = True
    strength: float = 1.0  # of brightness, contrast and saturation .8, of hue .2

    @property
    def views(self) -> tuple[ContrastiveView, ...]:
        view, s = self.view(self.size, self.scale, "bicubic", blur=0.5), self.strength
        color = (0.8 * s, 0.2 * s) if self.color else (0.0, 0.0)
        return (replace(view, strengths=(0.8 * s, 0.8 * s, *color)),) * 2


@dataclass(frozen=True)
class EqualCrops(SeveralViews):
    """LeJEPA's views (https://arxiv.org/abs/2511.08544): large and small crops that are changed in the same way."""

    size: Size = 224
    small_size: Size = 98
    large: int = 2
    small: int = 6
    scale: tuple[float, float] = (0.3, 1.0)
    small_scale: tuple[float, float] = (0.05, 0.3)
    sigma: tuple[float, float] | None = None
    color: bool = True

    @property
    def views(self) -> tuple[ContrastiveView, ...]:
        large = self.view(self.size, self.scale, blur=0.5, solarize=0.2)
        small = self.view(self.small_size, self.small_scale, blur=0.5, solarize=0.2)
        return (large,) * self.large + (small,) * self.small


@dataclass(frozen=True)
class MultiCrop(SeveralViews):
    """DINO's multi-crop (https://arxiv.org/abs/2104.14294): two large crops, then several small ones. The scales are
    the code's defaults."""

    size: Size = 224
    small_size: Size = 96
    small: int = 8
    scale: tuple[float, float] = (0.4, 1.0)
    small_scale: tuple[float, float] = (0.05, 0.4)
    sigma: tuple[float, float] | None = None
    color: bool = True

    @property
    def views(self) -> tuple[ContrastiveView, ...]:
        first = self.view(self.size, self.scale, "bicubic", blur=1.0)
        second = self.view(self.size, self.scale, "bicubic", blur=0.1, solarize=0.2)
        return first, second, *[self.view(self.small_size, self.small_scale, "bicubic", blur=0.5)] * self.small


def small_crops(crops: tuple[int, ...], usual: Size, patch: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Of --crops, how many small crops, and their height and width in whole patches: the usual ones if not named."""
    count, (height, width) = crops[0], (crops[1], crops[-1]) if len(crops) > 1 else to_pair(usual)
    if any(side < 1 or side % length for side, length in zip((height, width), patch, strict=True)):
        given, side = " ".join(map(str, crops)), f"{patch[0]} x {patch[1]}"
        raise ValueError(f"--crops {given}: sides must be multiples of the model's patch of {side} pixels")
    return count, (height, width)
