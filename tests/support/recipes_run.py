"""The recipes as a command line starts them, within the test's own process and on runs of a second."""

import importlib
import sys
from pathlib import Path

import pytest

from sslvit.cli import run_cli
from sslvit.experiments.jobs import options_of

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = "--data shapes:n=64 --image_size 16 --model XS/8 --epochs 1 --warmup_epochs 0 --batch_size 16 --threads 1"
TRAINING = {
    "mpp": TINY,
    "mae": f"{TINY} --decoder 16 1 2",
    "moco_v3": f"{TINY} --hidden 32 --position learned_1d",
    "dino": f"{TINY} --freeze_last_layer_epochs 0 --crops 2 8 --head 32 16 64",
    "ibot": f"{TINY} --freeze_last_layer_epochs 0 --crops 2 8 --head 32 16 64",
    "dinov2": f"{TINY} --freeze_last_layer_epochs 0 --crops 2 8 --head 32 16 64",
    "simmim": TINY,
    "simclr": f"{TINY} --hidden 32",
    "vicreg": f"{TINY} --dimension 32",
    "lejepa": f"{TINY} --crops 2 2 --head 32 16",
    "ijepa": f"{TINY} --predictor 16 1",
    "data2vec": TINY,
    "supervised": TINY,
}


def run(recipe: str, words: str, **names: object) -> None:
    """main() of the recipe, as if started with these words; names: what stands in for things that it imports."""
    module = importlib.import_module(f"sslvit.recipes.{recipe}")
    with pytest.MonkeyPatch.context() as patched:
        for name, instead in names.items():
            patched.setattr(module, name, instead)
        patched.setattr(sys, "argv", [recipe, *words.split()])
        run_cli(module.main, options_of(module))
