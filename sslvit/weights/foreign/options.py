"""A model by the command line: ours, or anybody's checkpoint with what its file does not say."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.weights.foreign.open import open_backbone


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _above_zero(kind: type) -> Any:
    def read(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    return read


def _several(read: Any) -> Any:
    return lambda text: tuple(read(one) for one in text.split(","))


def _any(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _pixels(text: str) -> tuple[int, ...]:
    sides = _several(_above_zero(int))(text)
    if len(sides) > 2:
        raise ValueError
    return sides * 2 if len(sides) == 1 else sides


FACTS = {"family": str, "part": str, "gelu": str, "heads": _above_zero(int), "epsilon": _above_zero(float)}
FACTS |= {"mean": _several(_any), "std": _several(_above_zero(float)), "image_size": _pixels, "resize_to": _pixels}
FACTS |= {"leave_head": _truth, "drop_distillation": _truth}


@dataclass(frozen=True)
class ModelConfig:
    model: Path = Path("runs/mpp/model")
    """The model folder of a run, or the run's, which may not have ended yet; or a checkpoint of timm, torchvision,
    transformers, Google, MoCo v3, DINO, MAE or DINOv2."""
    foreign: tuple[str, ...] = ()
    """What such a checkpoint does not say of itself, e.g. family=mae, or heads=6 gelu=exact mean=.5,.5,.5
    std=.5,.5,.5; leave_head=true takes the backbone of a classifier."""

    def open(self) -> tuple[ViT | BiT, dict[str, Any]]:
        """The backbone, in evaluation mode, and what is said of it: at least its `readout`."""
        return open_backbone(self.model, **facts(self.foreign))


def facts(words: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in FACTS:
            raise ValueError(f"--foreign {word}: {name!r} is none of {', '.join(FACTS)}")
        if name in found:
            raise ValueError(f"--foreign {word}: {name} is said twice")
        try:
            if not value:
                raise ValueError
            found[name] = FACTS[name](value)
        except (ValueError, KeyError) as error:
            raise ValueError(f"--foreign {word}: {value!r} is no value for {name}") from error
    return found
