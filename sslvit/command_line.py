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
    rates = [(rate, str, field(default="")) for rate in ("lr", "base_lr")]
    named = make_dataclass("Named", [(by, str, field(default=first)), *rates])
    given = tyro.cli(named, return_unknown_args=True, add_help=False)[0]
    preset = presets.get(getattr(given, by), presets[first])
    config = tyro.cli(type(presets[first]), default=preset, args=sys.argv[1:])
    if given.base_lr and not config.base_lr > 0:
        raise ValueError(f"--base_lr is {config.base_lr:g}; it must be above 0")
    if given.base_lr and given.lr and config.lr:
        raise ValueError(
            f"--base_lr {config.base_lr:g} and --lr {config.lr:g} are both given: --lr is the rate itself, --base_lr "
            "that for each 256 images of a batch; give one of them"
        )
    base = config.base_lr * config.batch_size / 256
    config = replace(config, lr=base if given.base_lr else config.lr or base)
    config.check()
    return config
