"""Batched augmentation: a uint8 batch -> a tuple of float batches in [0, 1], on the device where the batch lies.

Every sample draws its own parameters from its own key, as one row of each parameter tensor, and no operation lets
samples meet: neither the batch nor the order in which it is worked through can change a bit of a view. `draw` gives
the parameters of a view and `apply` carries them out.

A batch is a canvas, b c H W; with `extents` (b 2) sample i is the top left extents[i] = (height, width) of it. The
blur's sigma is in pixels of the output at every size, as it stands in the papers' code for 224 px: at 32 px the same
sigma takes away far more, and a recipe for small images may want a smaller one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sslvit import rng
from sslvit.data import color
from sslvit.data.color import Jitter, draw_jitter
from sslvit.data.crop import Crop, Scaled, centred, draw_crop, resized
from sslvit.data.pieces import Size, batch, both, checked, on, piece_length, pieces, true
from sslvit.data.resample import Axis, Blur, Interpolation, Resize


def fit(pixels: Tensor, axes: tuple[Axis, Axis], size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """uint8 b c H W -> b c h w in [0, 1]"""
    step = piece_length(pixels, size)
    resize = Resize(pixels, axes, size, interpolation, step)
    out = batch(*pixels.shape[:2], *size, device=pixels.device)
    for run in pieces(len(pixels), step):
        torch.clamp(resize(run).div_(255).transpose(2, 3), 0, 1, out=out[run])
    return out


@dataclass(frozen=True)
class Light(Scaled):
    """MAE's view (https://arxiv.org/abs/2111.06377): a random resized crop and a flip."""

    size: Size
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    flip: float = 0.5

    def draw(self, key: Tensor, extents: Tensor) -> Crop:
        return draw_crop(rng.fold(key, "crop"), extents, self.scale, self.ratio, self.flip)

    def apply(self, pixels: Tensor, crop: Crop) -> Tensor:
        return fit(pixels, resized(crop, both(self.size)), both(self.size), self.interpolation)

    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None) -> tuple[Tensor, ...]:
        key, extents = checked(pixels, key, extents)
        return (self.apply(pixels, self.draw(rng.fold(key, "view", 0), extents)),)


@dataclass(frozen=True)
class Plain:
    """The evaluation view: the whole image resized to the size; with `resize`, its shorter side is resized to that
    and the centre of the size is cut out (256 and 224 is ImageNet's custom)."""

    size: Size
    resize: int | None = None
    interpolation: Interpolation = "bicubic"

    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None) -> tuple[Tensor, ...]:
        _, extents = checked(pixels, key, extents)
        size = both(self.size)
        if self.resize is not None and self.resize < max(size):
            raise ValueError(f"resize {self.resize} leaves no centre of size {size}")
        axes = centred(extents, self.resize, size)
        if all(
            bool((axis.length == n).all() and (axis.resized == n).all()) for axis, n in zip(axes, size, strict=True)
        ):
            return (pixels[:, :, : size[0], : size[1]] / 255,)
        return (fit(pixels, axes, size, self.interpolation),)


class Distortion(NamedTuple):
    """What happens to the samples of a batch in one view, a row per sample."""

    crop: Crop
    jitter: Jitter
    grey: Tensor
    blur: Tensor
    sigma: Tensor
    solarise: Tensor


@dataclass(frozen=True)
class Distorted(Scaled):
    """One view of the contrastive kind: crop, flip, colour jitter, grey, blur and solarise, in this order, the last
    four with their probabilities."""

    size: Size
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"
    flip: float = 0.5
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    jitter: float = 0.8
    grey: float = 0.2
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0

    def draw(self, key: Tensor, extents: Tensor) -> Distortion:
        u = rng.uniform(rng.fold(key, "distortion"), 4)
        return Distortion(
            crop=draw_crop(rng.fold(key, "crop"), extents, self.scale, self.ratio, self.flip),
            jitter=draw_jitter(rng.fold(key, "jitter"), self.strengths, self.jitter),
            grey=u[:, 0] < self.grey,
            blur=u[:, 1] < self.blur,
            sigma=self.sigma[0] + (self.sigma[1] - self.sigma[0]) * u[:, 2],
            solarise=u[:, 3] < self.solarise,
        )

    def apply(self, pixels: Tensor, distortion: Distortion) -> Tensor:
        """uint8 b c H W -> b c h w in [0, 1]"""
        self.check_channels(pixels.shape[1])
        size, device = both(self.size), pixels.device
        step = piece_length(pixels, size)
        jitter, blur = distortion.jitter, distortion.blur.tolist()
        resize = Resize(pixels, resized(distortion.crop, size), size, self.interpolation, step)
        gaussian = Blur(distortion.sigma, size, pixels.shape[1], device)
        factors = jitter.factors.to(device).unsqueeze(-1).unsqueeze(-1).unsqueeze(-1).unbind(1)
        orders = torch.where(jitter.chosen.unsqueeze(-1), jitter.order, -1).tolist()
        grey, solarise = distortion.grey.tolist(), distortion.solarise.tolist()
        out = batch(*pixels.shape[:2], *size, device=device)
        for run in pieces(len(pixels), step):
            images = resize(run).div_(255).clamp_(0, 1)  # transposed, which colours do not see
            for position in range(len(color.OPERATIONS)):
                for operation, change in enumerate(color.OPERATIONS):
                    rows = true([order[position] == operation for order in orders[run]])
                    on(images, rows, change, factors[operation][run])
            on(images, true(grey[run]), color.grey_)
            rows = true(blur[run])
            samples = [run.start + row for row in rows]
            if len(rows) == len(images):
                out[run] = gaussian(images, samples)
            else:
                out[run] = images.transpose(2, 3)
                if rows:
                    out[samples] = gaussian(images[rows], samples)
            on(out[run], true(solarise[run]), color.solarise_)
        return out

    def check_channels(self, channels: int) -> None:
        needed = {"saturation": self.strengths[2], "hue": self.strengths[3], "grey": self.grey}
        wanted = [name for name, value in needed.items() if value > 0]
        if channels not in (1, 3) and wanted:
            raise ValueError(f"{' and '.join(wanted)} mean nothing on {channels} channels (1 or 3): set them to 0")

    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None) -> tuple[Tensor, ...]:
        return several((self,), pixels, key, extents)


def several(views: tuple[Distorted, ...], pixels: Tensor, key: Tensor, extents: Tensor | None) -> tuple[Tensor, ...]:
    """Each view of its own draws: the view's number is part of the key."""
    key, extents = checked(pixels, key, extents)
    return tuple(
        view.apply(pixels, view.draw(rng.fold(key, "view", number), extents)) for number, view in enumerate(views)
    )


def papers_blur(size: Size) -> tuple[float, float]:
    """The papers' sigma, which is in pixels of their 224, at this size by its shorter side."""
    return 0.1 * min(both(size)) / 224, 2.0 * min(both(size)) / 224


@dataclass(frozen=True)
class MoCoV3(Scaled):
    """The asymmetric pair of MoCo v3 (https://arxiv.org/abs/2104.02057), which is BYOL's: one view always blurred, the
    other seldom, and sometimes solarised."""

    size: Size
    scale: tuple[float, float] = (0.08, 1.0)  # of its ViTs; its ResNets have 0.2
    sigma: tuple[float, float] = (0.1, 2.0)

    @property
    def views(self) -> tuple[Distorted, ...]:
        return (
            Distorted(self.size, self.scale, blur=1.0, sigma=self.sigma),
            Distorted(self.size, self.scale, blur=0.1, sigma=self.sigma, solarise=0.2),
        )

    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None) -> tuple[Tensor, ...]:
        return several(self.views, pixels, key, extents)


@dataclass(frozen=True)
class DINO(Scaled):
    """DINO's multi-crop (https://arxiv.org/abs/2104.14294): two large crops, then several small ones. The scales are
    the code's defaults; the paper's models used (0.25, 1), (0.05, 0.25) and 10 small crops."""

    size: Size = 224
    small_size: Size = 96
    small: int = 8
    scale: tuple[float, float] = (0.4, 1.0)
    small_scale: tuple[float, float] = (0.05, 0.4)
    sigma: tuple[float, float] = (0.1, 2.0)

    @property
    def views(self) -> tuple[Distorted, ...]:
        def view(size: Size, scale: tuple[float, float], blur: float, solarise: float = 0.0) -> Distorted:
            return Distorted(size, scale, interpolation="bicubic", blur=blur, sigma=self.sigma, solarise=solarise)

        large = view(self.size, self.scale, 1.0), view(self.size, self.scale, 0.1, 0.2)
        return large + (view(self.small_size, self.small_scale, 0.5),) * self.small

    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None) -> tuple[Tensor, ...]:
        return several(self.views, pixels, key, extents)
