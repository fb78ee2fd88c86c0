"""VICReg: views agree, and their features stay spread and uncorrelated (https://arxiv.org/abs/2105.04906).

    accelerate launch recipes/vicreg.py                                                  the built-in images
    accelerate launch recipes/vicreg.py --preset paper --data folder:/imagenet/train     the paper's

The paper: a ResNet-50 on ImageNet at 224 px, batch 2048, 1,000 epochs. LARS, .2 per 256 images of a batch, 10 epochs of
warm-up, then a cosine to .002; weight decay 1e-6; an expander of three layers of 8,192; weights 25, 25, 1; the views of
BYOL. --preset paper has its views, expander, weights, batch and epochs; the backbone is a ViT-S/16, and so the
optimizer is AdamW, with MoCo v3's numbers for its ViTs: 1.5e-4 per 256 images, weight decay .1. Not yet run.
Views differ from the official ones in rounding, in the blur's filter and by --canvas: views/pretraining.py.
The defaults, --preset small, are for thousands of images of 28 to 64 px: a smaller expander, crops of 50 to 100%. They
were not tuned.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sslvit.cli import run_cli
from sslvit.config import PretrainConfig, option
from sslvit.evaluate.monitor import monitor_of
from sslvit.objectives.vicreg import VICReg
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.training.optim import NoWeightDecay
from sslvit.weights.backbone import new_backbone


@dataclass(frozen=True)
class Config(PretrainConfig):
    """Pretrain a Vision Transformer by VICReg, and show what it learned."""

    preset: Literal["small", "paper"] = "small"
    """Sets the defaults of the other options."""
    out: Path = Path("runs/vicreg")
    init: Literal["timm", "jax", "dino", "moco_v3", "mae"] = "jax"
    """The backbone's random weights: as timm or the code of these papers draws them; jax is the ViT paper's."""
    dimension: int = option(512, above=0)
    """Width of the three layers of the expander."""
    weights: tuple[float, float, float] = option((25.0, 25.0, 1.0), least=0)
    """Of invariance, variance and covariance in the loss."""
    smallest_crop: float = option(0.5, above=0, most=1)
    """The smallest share of an image that a random crop takes."""
    color: bool = True
    """Change saturation and hue, grey some views; --no_color for images that are neither grey nor RGB."""
    base_lr: float = 2e-3
    epochs: float = 20
    batch_size: int = 64
    warmup_epochs: float = 2
    weight_decay: float = 0.1
    no_weight_decay: NoWeightDecay = "nothing"


SMALL = Config()
PAPER = Config(
    preset="paper", data="", image_size=224, model="S/16", init="timm", dimension=8192, smallest_crop=0.08,
    base_lr=1.5e-4, epochs=1000, batch_size=2048, warmup_epochs=10,
)  # fmt: skip
PRESETS = {"small": SMALL, "paper": PAPER}


def main(config: Config) -> list[dict[str, Any]]:
    accelerator = start_run(config)
    images = config.open()
    backbone = new_backbone(config, images, PRESETS[config.preset], init=config.init, seed=config.seed)
    objective = VICReg(backbone, dimension=config.dimension, weights=config.weights, seed=config.seed)
    usual = objective.default_views(config.image_size, images.channels)
    views = replace(usual, scale=(config.smallest_crop, 1.0), color=config.color)
    views.check_channels(images.channels)
    if preview(config, objective, images, views, accelerator):
        return []
    live = LiveReport(config, objective, images, views, accelerator)
    evaluations = pretrain(objective, images, views, config, accelerator, monitor_of(config, images, accelerator), live)
    finish(config, objective, images, views, evaluations, accelerator)
    return evaluations


if __name__ == "__main__":
    run_cli(main, PRESETS)
