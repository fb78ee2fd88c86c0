"""Supervised classification, the other side of every comparison.

    accelerate launch recipes/supervised.py --preset small                    the built-in images, on one machine
    accelerate launch recipes/supervised.py --data folder:/imagenet/train     plain ViT-S/16, or --model R50x1, BiT
    accelerate launch recipes/supervised.py --preset vit --data ...        the ViT paper's B/16; its hybrid is R50+B/16

plain (https://arxiv.org/abs/2205.01580): ImageNet, 90 epochs at batch 1024, Adam at 1e-3, 10k steps of warm-up, then
a cosine; decay .1 of kernels alone (its code's 1e-4 is not multiplied by the rate); clipped to 1. Mean patch, fixed
positions, a linear head (its code has a hidden layer too: --tanh); inception crops, flips, RandAugment(2, 10), mixup
of .2. Not yet run.
vit (https://arxiv.org/abs/2010.11929, table 3): 300 epochs at batch 4096, 3e-3 with 10k steps of warm-up, decay .3,
dropout .1, clipped to 1; tanh in the head; crops and flips. Its label smoothing is not stated: 0 here. Not yet run.
--preset small is for thousands of images of 28 to 64 px: 1e-3 at batch 64. By 20-nn on 5,000 held-out training images
of Fashion-MNIST after 20,000 images (68.8 at the start; one seed, XS/7): 72.9 at 5e-4, 72.6 at 1e-3, 71.4 at 2e-3; by
10-shot 63.1, 63.0 and 63.9.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from sslvit.cli import choose, run_cli, typed_model
from sslvit.config import DataConfig, TrainConfig
from sslvit.evaluate.monitor import monitor_of
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.objectives.supervised import Supervised, balanced
from sslvit.preflight.dry_run import dry_run
from sslvit.preflight.views import show_views
from sslvit.processes.collectives import start_run
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.views.supervised import SupervisedView as Views
from sslvit.weights.foreign.open import start_from


@dataclass(frozen=True)
class Config(TrainConfig, DataConfig):
    """Train a Vision Transformer or a BiT ResNet on labels, and show what it learned."""

    preset: Literal["plain", "vit", "small"] = "plain"
    """What the other options are by default."""
    out: Path = Path("runs/supervised")
    data: str = tyro.MISSING
    model: str = "S/16"
    """A ViT by width and patch size, a hybrid (R50+B/16), or a BiT ResNet (R50x1; R20x0.5 for small images)."""
    class_token: bool = False
    position: Literal["sincos_big_vision", "learned_1d", "learned_2d", "relative", "none"] = "sincos_big_vision"
    position_at: Literal["stem", "every_layer", "every_layer_shared"] = "stem"
    """Where positions are added."""
    tanh: bool = False
    """A hidden layer with tanh in the head, as wide as the backbone."""
    dropout: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.2
    cutmix: float = 0.0
    balance: bool = False
    """Weigh classes so that each counts alike, however many images it has."""
    magnitude: float = 10.0
    """RandAugment's; 0 leaves crops and flips."""
    smallest_crop: float = 0.05
    epochs: float = 90
    batch_size: int = 1024
    lr: float = 1e-3
    warmup_epochs: float = 8
    weight_decay: float = 0.1
    clip: float = 1.0


VIT = {"model": "B/16", "class_token": True, "position": "learned_1d", "tanh": True, "dropout": 0.1, "mixup": 0.0}
VIT |= {"magnitude": 0.0, "epochs": 300, "batch_size": 4096, "lr": 3e-3, "warmup_epochs": 32, "weight_decay": 0.3}
SMALL = {"data": "shapes", "image_size": 32, "model": "XS/4", "magnitude": 0.0, "smallest_crop": 0.3}
SMALL |= {"epochs": 20, "batch_size": 64, "warmup_epochs": 2}
PRESETS = {"plain": Config(), "vit": Config(preset="vit", **VIT), "small": Config(preset="small", **SMALL)}


def main() -> None:
    config = choose(PRESETS)
    accelerator = start_run(config)
    size, seed = config.image_size, config.seed
    source = config.open()
    given = {"image_size": size, "channels": source.channels}
    start_of = {"seed": seed, "mean": (0.5,) * source.channels, "std": (0.5,) * source.channels}
    if "/" in config.model:
        start_of |= {name: getattr(config, name) for name in ("class_token", "position", "position_at", "dropout")}
        start_of |= {"gelu": "tanh", "init": "jax"}
    kind = ViT if "/" in config.model else BiT
    start = start_from(config.init_from, model=typed_model(config), **given)
    backbone = start or kind.variant(config.model, **given, **start_of)
    labels = torch.from_numpy(source.required_labels())
    classes = len(source.classes or ()) or int(labels.max()) + 1
    head = {
        "representation": backbone.width if config.tanh else None,
        "label_smoothing": config.label_smoothing,
        "seed": seed,
    }
    head |= {"class_weights": balanced(labels, classes) if config.balance else None}
    objective = Supervised(backbone, classes=classes, mixup=config.mixup, cutmix=config.cutmix, **head)
    views = Views.plain_vit(size, config.magnitude) if config.magnitude else Views(size)
    views = replace(views, scale=(config.smallest_crop, 1.0))
    if show_views(config, source, views, accelerator) or dry_run(config, objective, source, views, accelerator):
        return
    monitor = monitor_of(config, source, accelerator, hold_out=False)
    evaluations = pretrain(objective, source, views, config, accelerator, monitor)
    finish(config, objective, source, views, evaluations, accelerator)


if __name__ == "__main__":
    run_cli(main)
