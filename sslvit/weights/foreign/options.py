"""Options of commands that open a model: --model and --foreign."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sslvit.errors import NoInput
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.weights.foreign.open import open_backbone


def _number(kind: type, above: float = -math.inf) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if not above < value < math.inf:
            raise ValueError
        return value

    return read


def _numbers(above: float) -> Callable[[str], tuple[float, ...]]:
    return lambda text: tuple(_number(float, above)(one) for one in text.split(","))


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition(",")
    return _number(int, above=0)(height), _number(int, above=0)(width or height)


FACTS: dict[str, Callable[[str], Any]] = {
    "family": str,
    "part": str,
    "gelu": str,
    "heads": _number(int, above=0),
    "epsilon": _number(float, above=0),
    "mean": _numbers(above=-math.inf),
    "std": _numbers(above=0),
    "image_size": _size,
    "periods": str,
    "leave_head": lambda text: {"true": True, "false": False}[text.lower()],
}

GONE = {
    "resize_to": "`sslvit convert --image_size` resizes positions for good",
    "drop_distillation": "DeiT's distillation token is kept, as a register",
}


@dataclass(frozen=True)
class ModelConfig:
    group: ClassVar[str] = "Model"
    model: Path = Path("runs/mpp/model")
    """A run, a model, or a checkpoint. A run's folder (finished or not), a model folder, or a file of timm,
    torchvision, transformers, Google, MoCo v3, DINO, MAE, BEiT, DINOv2 or DINOv3."""
    foreign: tuple[str, ...] = ()
    """Facts that such a checkpoint lacks, e.g. family=mae; or heads=6 gelu=exact mean=.5,.5,.5 std=.5,.5,.5;
    leave_head=true takes the backbone of a classifier."""

    def open(self) -> tuple[ViT | BiT, dict[str, Any]]:
        """The backbone, in evaluation mode, and its description: at least its `readout`."""
        unfinished = self.model.name == "model" and self.model.parent.is_dir()  # whose checkpoint is opened instead
        if not (unfinished or os.path.exists(self.model)):
            raise NoInput(f"--model {self.model} does not exist: it is a run's folder, a model folder or a checkpoint")
        return open_backbone(self.model, **facts(self.foreign))


def facts(words: tuple[str, ...]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name in GONE:
            raise ValueError(f"--foreign {word}: {GONE[name]}")
        if name not in FACTS:
            raise ValueError(f"--foreign {word}: the name must be one of {', '.join(FACTS)}, got {name!r}")
        if name in result:
            raise ValueError(f"--foreign {word}: {name} is said twice")
        try:
            if not value:
                raise ValueError
            result[name] = FACTS[name](value)
        except (ValueError, KeyError) as error:
            raise ValueError(f"--foreign {word}: {value!r} is no value for {name}") from error
    return result
