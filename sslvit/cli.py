"""What a recipe is told: flags of its configuration, on top of the preset that they name."""

import sys
from dataclasses import field, make_dataclass, replace
from typing import TypeVar

import tyro

from sslvit.config import TrainConfig

Chosen = TypeVar("Chosen", bound=TrainConfig)


def choose(presets: dict[str, Chosen], by: str = "preset") -> Chosen:
    """The first preset is what is trained where the flag --preset (or `by`) names none.

    Of --lr and --base_lr the one on the command line wins over the other in the preset; a base rate is for each 256
    images of a batch.
    """
    first = next(iter(presets))
    given = {rate: typed(rate) for rate in ("lr", "base_lr")}
    config = tyro.cli(type(presets[first]), default=presets.get(typed(by), presets[first]), args=sys.argv[1:])
    if given["base_lr"] and not config.base_lr > 0:
        raise ValueError(f"--base_lr is {config.base_lr:g}; it must be above 0")
    if given["base_lr"] and given["lr"] and config.lr:
        raise ValueError(
            f"--base_lr {config.base_lr:g} and --lr {config.lr:g} are both given: --lr is the rate itself, --base_lr "
            "that for each 256 images of a batch; give one of them"
        )
    base = config.base_lr * config.batch_size / 256
    config = replace(config, lr=base if given["base_lr"] else config.lr or base)
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
