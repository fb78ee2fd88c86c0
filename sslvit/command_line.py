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
    named = make_dataclass("Named", [(by, str, field(default=first))])
    name = getattr(tyro.cli(named, return_unknown_args=True, add_help=False)[0], by)
    config = tyro.cli(type(presets[first]), default=presets.get(name, presets[first]), args=sys.argv[1:])
    preset = presets.get(name, presets[first])
    if config.base_lr != preset.base_lr and config.lr:
        raise ValueError(f"--base_lr {config.base_lr:g} has no effect beside --lr {config.lr:g}: give --lr 0 with it")
    config = replace(config, lr=config.lr or config.base_lr * config.batch_size / 256)
    config.check()
    return config
