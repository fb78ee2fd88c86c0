"""Masked patch prediction, the ViT paper's self-supervised objective (https://arxiv.org/abs/2010.11929, B.1.2).

    accelerate launch recipes/mpp.py                                   the built-in images
    accelerate launch recipes/mpp.py --data folder:/my/images --image_size 224 --model S/16

The paper: JFT-300M, 1M steps (13.5 epochs) at batch 4096, Adam at 2e-4 with 10k steps of warm-up, then a cosine,
ViT-B/16 at 224 px; decay, clipping and crops are not stated: --preset paper has 0, 0 and these crops. Not yet run.
The defaults, --preset small, are for 20,000 images of 32 px. On two CPU cores (2026-11-21) they took 4 minutes, and 20
nearest neighbours in the mean readout's space told 46 % of the shapes, at the random start 15 %. See the README.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from sslvit.cli import choose, run_cli, typed_model
from sslvit.config import DataConfig, TrainConfig
from sslvit.evaluate.monitor import monitor_of
from sslvit.models.vit import ViT
from sslvit.objectives.mpp import MPP
from sslvit.preflight.dry_run import dry_run
from sslvit.preflight.views import show_views
from sslvit.processes.collectives import start_run
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.views.batching import Size
from sslvit.views.pretraining import CropFlip
from sslvit.weights.foreign.open import start_from


@dataclass(frozen=True)
class Config(TrainConfig, DataConfig):
    """Pretrain a Vision Transformer by masked patch prediction, and show what it learned."""

    preset: Literal["small", "paper"] = "small"
    """What the other options are by default."""
    out: Path = Path("runs/mpp")
    image_size: Size = 32
    model: str = "XS/8"
    """Width by name, and patch size: XS, mu, Ti, S, M, B, L, H, ..."""
    conventions: Literal["timm", "jax"] = "timm"
    """The backbone's random start, its GELU and what images are standardised with: timm's (exact, ImageNet's mean and
    deviation), or those of the ViT paper's code (tanh, to -1 to 1). A model of --init_from has its own."""
    target: Literal["mean", "downsized", "pixels"] = "mean"
    """What is predicted of a corrupted patch: its mean colour, its 4x4 downsized version, or its pixels."""
    corrupt: float = 0.5
    """The share of patches that is corrupted."""
    epochs: float = 5
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    smallest_crop: float = 0.5
    """The smallest share of an image that a random crop takes."""


PAPER = {"data": tyro.MISSING, "image_size": 224, "model": "B/16", "epochs": 13.5, "batch_size": 4096, "lr": 2e-4}
PAPER |= {"warmup_epochs": 0.135, "weight_decay": 0.0, "clip": 0.0, "conventions": "jax"}
PRESETS = {"small": Config(), "paper": Config(preset="paper", **PAPER)}


def main() -> None:
    config = choose(PRESETS)
    accelerator = start_run(config)
    source = config.open()
    given = {"image_size": config.image_size, "channels": source.channels}
    start_of, half = {"seed": config.seed}, (0.5,) * source.channels
    start_of |= {"init": "jax", "gelu": "tanh", "mean": half, "std": half} if config.conventions == "jax" else {}
    start = start_from(config.init_from, model=typed_model(config), **given)
    backbone = start or ViT.variant(config.model, **given, **start_of)
    objective = MPP(backbone, target=config.target, corrupt=config.corrupt, seed=config.seed)
    views = CropFlip(config.image_size, scale=(config.smallest_crop, 1.0))
    if show_views(config, source, views, accelerator) or dry_run(config, objective, source, views, accelerator):
        return
    monitor = monitor_of(config, source, accelerator)
    evaluations = pretrain(objective, source, views, config, accelerator, monitor)
    last = evaluations[-1] if evaluations else {}
    if "accuracy" in last:
        right, commonest = 100 * last["accuracy"], 100 * last["accuracy_of_commonest_colour"]
        accelerator.print(f"Colours of corrupted patches: {right:.0f} % right; always the commonest: {commonest:.0f} %")
    finish(config, objective, source, views, evaluations, accelerator)


if __name__ == "__main__":
    run_cli(main)
