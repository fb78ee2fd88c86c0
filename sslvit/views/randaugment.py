"""RandAugment (https://arxiv.org/abs/1909.13719) as in DeiT (timm's "rand-m9-mstd0.5-inc1") and as in plain ViTs.

Their code differs in this: DeiT resamples warped images with Pillow's bicubic filter, here they are
bilinear; big_vision's TensorFlow Contrast blends with a constant that grows with the image (196 at 224 px) where
Pillow and we take the grey mean; its Cutout and Translate are 40 and 100 pixels, here those shares of 224.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sslvit import rng
from sslvit.processes.device import send, send_together
from sslvit.views import color, operations
from sslvit.views.batching import true_indices
from sslvit.views.operations import Sampling, matrix_with, rotation_about_center, warp_

Style = Literal["deit", "plain_vit"]
Amount = Callable[[Tensor, Tensor], Tensor]  # of the level (magnitude / 10) and a random sign


class Augmentation(NamedTuple):
    """What happens to each sample in each layer."""

    operation: Tensor  # b n, places in the style's table; -1 for none
    level: Tensor  # b n, magnitude / 10
    sign: Tensor  # b n, -1 or 1
    center: Tensor  # b n 2, of a cutout, as shares of height and width


COMMON: dict[str, Amount] = {
    "autocontrast": lambda level, sign: level,
    "equalize": lambda level, sign: level,
    "invert": lambda level, sign: level,
    "rotate": lambda level, sign: 30 * level * sign,
    "solarize_add": lambda level, sign: (110 * level).floor(),
    "shear_x": lambda level, sign: 0.3 * level * sign,
    "shear_y": lambda level, sign: 0.3 * level * sign,
}
ENHANCEMENTS = ("saturation", "contrast", "brightness", "sharpness")
TRANSLATIONS = ("translate_x", "translate_y")
STYLES: dict[Style, dict[str, Amount]] = {
    # "inc": with the level, fewer bits stay and more is solarized; enhancements go both ways from 1.
    "deit": COMMON
    | {
        "posterize": lambda level, sign: 4 - (4 * level).floor(),
        "solarize": lambda level, sign: 256 - (256 * level).floor(),
        **dict.fromkeys(ENHANCEMENTS, lambda level, sign: (1 + 0.9 * level * sign).clamp(min=0.1)),
        **dict.fromkeys(TRANSLATIONS, lambda level, sign: 0.45 * level * sign),
    },
    "plain_vit": COMMON
    | {
        "posterize": lambda level, sign: (4 * level).floor().clamp(max=8),
        "solarize": lambda level, sign: (256 * level).floor(),
        **dict.fromkeys(ENHANCEMENTS, lambda level, sign: 1.8 * level + 0.1),
        **dict.fromkeys(TRANSLATIONS, lambda level, sign: 100 / 224 * level * sign),
        "cutout": lambda level, sign: 40 / 224 * level,
    },
}
CHANGES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "autocontrast": lambda images, amount: operations.autocontrast_(images),
    "equalize": lambda images, amount: operations.equalize_(images),
    "invert": lambda images, amount: operations.invert_(images),
    "posterize": operations.posterize_,
    "solarize": operations.solarize_,
    "solarize_add": operations.solarize_add_,
    "saturation": color.saturation_,
    "contrast": color.contrast_,
    "brightness": color.brightness_,
    "sharpness": operations.sharpness_,
}
WARPS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "rotate": rotation_about_center,
    "shear_x": lambda amount, height, width: matrix_with(amount, 0, 1),
    "shear_y": lambda amount, height, width: matrix_with(amount, 1, 0),
    "translate_x": lambda amount, height, width: matrix_with(amount * width, 0, 2),
    "translate_y": lambda amount, height, width: matrix_with(amount * height, 1, 2),
}


@dataclass(frozen=True)
class RandAugment:
    """Some operations in sequence, each drawn from the style's table with equal probability."""

    style: Style
    layers: int = 2
    magnitude: float = 9.0  # of 10
    spread: float = 0.5  # standard deviation of the magnitude
    probability: float = 0.5  # that a drawn operation is carried out
    sampling: Sampling = "bilinear"
    fill: tuple[float, ...] = (0.485, 0.456, 0.406)  # of what moves into the image

    @classmethod
    def deit(cls) -> "RandAugment":
        return cls("deit")

    @classmethod
    def plain_vit(cls, magnitude: float = 10.0) -> "RandAugment":
        return cls("plain_vit", 2, magnitude, 0.0, 1.0, "nearest", (128 / 255,) * 3)

    def draw(self, key: Tensor) -> Augmentation:
        u = rng.uniform(key, self.layers, 5)
        level = self.magnitude + self.spread * rng.normal(rng.fold(key, "magnitude"), self.layers)
        if self.spread:  # only then is it clipped: plain ViTs use magnitudes up to 20
            level = level.clamp(0, 10)
        operation = (u[..., 0] * len(STYLES[self.style])).floor().long()
        chosen = u[..., 1] < self.probability
        sign = torch.where(u[..., 2] < 0.5, -1.0, 1.0)
        return Augmentation(torch.where(chosen, operation, -1), level / 10, sign, u[..., 3:])

    def apply_(self, images: Tensor, augmentation: Augmentation) -> None:
        """b c h w in [0, 1], in place."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"RandAugment needs 1 or 3 channels, got {images.shape[1]}: leave it out")
        fill = self.fill if images.shape[1] == len(self.fill) else (sum(self.fill) / len(self.fill),)
        filling = send(torch.tensor(fill).unsqueeze(-1).unsqueeze(-1), images.device)
        for layer in range(self.layers):
            operation, level, sign, center = (x[:, layer] for x in augmentation)
            operation = operation.tolist()
            for place, (name, amount) in enumerate(STYLES[self.style].items()):
                rows = true_indices([chosen == place for chosen in operation])
                if rows:
                    which = torch.tensor(rows)
                    amounts = amount(level[which], sign[which])
                    self.carry_out_(name, filling, images, which, amounts, center[which])

    def carry_out_(
        self, name: str, fill: Tensor, images: Tensor, which: Tensor, amounts: Tensor, center: Tensor
    ) -> None:
        """On these rows, whose numbers are on the CPU."""
        warp, whole = WARPS.get(name), len(which) == len(images)
        given = warp(amounts, *images.shape[-2:]) if warp else amounts.view(-1, 1, 1, 1)
        if images.device.type != "cpu":
            which, given, center = send_together((which, given, center), images.device)
        part = images if whole else images.index_select(0, which)
        if warp:
            warp_(part, given, self.sampling, fill)
        elif name in CHANGES:
            CHANGES[name](part, given)
        else:
            operations.cutout_(part, given, center, fill)
        if not whole:
            images.index_copy_(0, which, part)
