"""Supervised classification, the other side of every comparison.

    accelerate launch recipes/supervised.py                                                  the built-in images
    accelerate launch recipes/supervised.py --preset plain --data folder:/imagenet/train     plain ViT-S/16
    accelerate launch recipes/supervised.py --preset vit --data ...        the ViT paper's B/16; its hybrid is R50+B/16

plain (https://arxiv.org/abs/2205.01580): ImageNet, 90 epochs at batch 1024, Adam at 1e-3, 10k steps of warm-up, then
a cosine; decay .1 of kernels alone (its code's 1e-4 is not multiplied by the rate); clipped to 1. Mean patch, fixed
positions, a linear head (its code has a hidden layer too: --tanh); inception crops, flips, RandAugment(2, 10), mixup
of .2. Not yet run.
vit (https://arxiv.org/abs/2010.11929, table 3): 300 epochs at batch 4096, 3e-3 with 10k steps of warm-up, decay .3 (of
what is not stated, here of kernels alone), dropout .1, clipped to 1; tanh in the head; crops and flips. Its label
smoothing is not stated: 0 here. Not yet run.
The defaults, --preset small, are for thousands of images of 28 to 64 px: 1e-3 at batch 64. By 20-nn on 5,000 held-out
training images of Fashion-MNIST after 20,000 images (68.8 at the start; one seed, XS/7): 72.9 at 5e-4, 72.6 at 1e-3,
71.4 at 2e-3; by 10-shot 63.1, 63.0 and 63.9.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sslvit.cli import run_cli
from sslvit.config import PretrainConfig, option
from sslvit.evaluate.monitor import monitor_of
from sslvit.models.resnet import BiT
from sslvit.objectives.supervised import Supervised, balanced
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.views.supervised import SupervisedView
from sslvit.weights.backbone import new_backbone


@dataclass(frozen=True)
class Config(PretrainConfig):
    """Train a Vision Transformer or a BiT ResNet on labels, and show what it learned."""

    preset: Literal["small", "plain", "vit"] = "small"
    """Sets the defaults of the other options."""
    out: Path = Path("runs/supervised")
    model: str = "XS/4"
    """Width and patch size: XS/4, S/16, ... Or a hybrid (R50+B/16), or a BiT ResNet (R50x1, R20x0.5 for small ones)."""
    class_token: bool = False
    """Read a class token; without, the mean patch is read."""
    position: Literal["sincos_big_vision", "learned_1d", "learned_2d", "relative", "none"] = "sincos_big_vision"
    """The position embedding; plain ViT's is fixed, sine and cosine."""
    position_at: Literal["stem", "every_layer", "every_layer_shared"] = "stem"
    """Where positions are added."""
    tanh: bool = False
    """A hidden layer with tanh in the head, as wide as the backbone."""
    dropout: float = option(0.0, least=0, most=1)
    """The probability that a value of a block's output is set to 0 in training."""
    label_smoothing: float = option(0.0, least=0, most=1)
    """The share of each label that is spread over all classes."""
    mixup: float = option(0.2, least=0, most=1)
    """Mix pairs of images: the parameter of the beta distribution; 0 does not."""
    cutmix: float = option(0.0, least=0, most=1)
    """Paste a piece of another image: the parameter of the beta distribution; 0 does not."""
    balance: bool = False
    """Weigh classes so that each counts alike, however many images it has."""
    magnitude: float = option(0.0, least=0, most=20)
    """RandAugment's; 0 leaves crops and flips."""
    smallest_crop: float = option(0.3, above=0, most=1)
    """The smallest share of an image that a random crop takes."""
    epochs: float = 20
    batch_size: int = 64
    lr: float = 1e-3
    warmup_epochs: float = 2
    weight_decay: float = 0.1
    clip: float = 1.0


SMALL = Config()
PLAIN = Config(
    preset="plain", data="", image_size=224, model="S/16", magnitude=10.0, smallest_crop=0.05,
    epochs=90, batch_size=1024, warmup_epochs=8,
)  # fmt: skip
VIT = Config(
    preset="vit", data="", image_size=224, model="B/16", class_token=True, position="learned_1d",
    tanh=True, dropout=0.1, mixup=0.0, smallest_crop=0.05,
    lr=3e-3, epochs=300, batch_size=4096, warmup_epochs=32, weight_decay=0.3,
)  # fmt: skip
PRESETS = {"small": SMALL, "plain": PLAIN, "vit": VIT}


def main(config: Config) -> list[dict[str, Any]]:
    accelerator = start_run(config)
    images = config.open()
    preset, seed, half = PRESETS[config.preset], config.seed, (0.5,) * images.channels
    if "/" in config.model:
        backbone = new_backbone(
            config, images, preset, class_token=config.class_token, position=config.position,
            position_at=config.position_at, dropout=config.dropout,
            init="jax", gelu="tanh", mean=half, std=half, seed=seed,
        )  # fmt: skip
    else:
        backbone = new_backbone(config, images, preset, kind=BiT, mean=half, std=half, seed=seed)
    labels = torch.from_numpy(images.required_labels())
    classes = len(images.classes or ()) or int(labels.max()) + 1
    objective = Supervised(
        backbone,
        classes=classes,
        representation=backbone.width if config.tanh else None,
        label_smoothing=config.label_smoothing,
        mixup=config.mixup,
        cutmix=config.cutmix,
        class_weights=balanced(labels, classes) if config.balance else None,
        seed=seed,
    )
    size = config.image_size
    views = SupervisedView.plain_vit(size, config.magnitude) if config.magnitude else SupervisedView(size)
    views = replace(views, scale=(config.smallest_crop, 1.0))
    if preview(config, objective, images, views, accelerator):
        return []
    monitor = monitor_of(config, images, accelerator, hold_out=False)
    live = LiveReport(config, objective, images, views, accelerator)
    evaluations = pretrain(objective, images, views, config, accelerator, monitor, live)
    finish(config, objective, images, views, evaluations, accelerator)
    return evaluations


if __name__ == "__main__":
    run_cli(main, PRESETS)
