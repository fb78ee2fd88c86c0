"""What a recipe is told: flags of its configuration, on top of the preset that they name."""

import sys
from dataclasses import field, make_dataclass, replace
from typing import TypeVar

import tyro

from sslvit.config import TrainConfig

Chosen = TypeVar("Chosen", bound=TrainConfig)


def choose(presets: dict[str, Chosen], by: str = "preset") -> Chosen:
    """The first preset is what is trained where the flag --preset (or `by`) names none.

    A learning rate that nobody gave is the preset's for each 256 images of a batch.
    """
    first = next(iter(presets))
    name = typed(by) or first
    config = tyro.cli(type(presets[first]), default=presets.get(name, presets[first]), args=sys.argv[1:])
    preset = presets.get(name, presets[first])
    if config.base_lr != preset.base_lr and config.lr:
        raise ValueError(f"--base_lr {config.base_lr:g} has no effect beside --lr {config.lr:g}: give --lr 0 with it")
    config = replace(config, lr=config.lr or config.base_lr * config.batch_size / 256)
    config.check()
    return config


def typed(flag: str) -> str:
    """What the command line itself gives a flag, or nothing."""
    alone = make_dataclass("Alone", [(flag, str, field(default=""))])
    return getattr(tyro.cli(alone, return_unknown_args=True, add_help=False)[0], flag)


def typed_model(config: TrainConfig) -> str:
    """The --model that was typed, which beside --start must be the model that is there, while a preset's gives way. A
    run that goes on is what it was: what it was started with is compared elsewhere."""
    return "" if config.resume and (config.out / "checkpoints").exists() else typed("model")
