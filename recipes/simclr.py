"""SimCLR, contrastive learning of two views (https://arxiv.org/abs/2002.05709).

    accelerate launch recipes/simclr.py                                                  the built-in images
    accelerate launch recipes/simclr.py --preset paper --data folder:/imagenet/train     the paper's

The paper: a ResNet-50 on ImageNet at 224 px, batch 4096, 100 to 1,000 epochs. LARS, .3 per 256 images of a batch, 10
epochs of warm-up, then a cosine to 0; weight decay 1e-6; temperature .1; crops of 8 to 100%, colour at full strength.
--preset paper has its views, heads, temperature, batch and epochs; the backbone is a ViT-S/16, and so the optimizer is
AdamW, with MoCo v3's numbers for its ViTs: 1.5e-4 per 256 images, 40 epochs of warm-up, weight decay .1. Not yet run.
Views differ from the official ones in rounding, in the blur's filter and by --canvas: views/pretraining.py.
The defaults, --preset small, are for thousands of images of 28 to 64 px: smaller heads, temperature .2, crops of 50 to
100%, half the colour. They were not tuned.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslvit.cli import run_cli
from sslvit.config import PretrainConfig, option
from sslvit.evaluate.monitor import monitor_of
from sslvit.objectives.simclr import SimCLR
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.training.optim import NoWeightDecay
from sslvit.views.pretraining import StrongPair
from sslvit.weights.backbone import new_backbone


@dataclass(frozen=True)
class Config(PretrainConfig):
    """Pretrain a Vision Transformer by SimCLR, and show what it learned."""

    preset: Literal["small", "paper"] = "small"
    """Sets the defaults of the other options."""
    out: Path = Path("runs/simclr")
    init: Literal["timm", "jax", "dino", "moco_v3", "mae"] = "jax"
    """The backbone's random weights: as timm or the code of these papers draws them; jax is the ViT paper's."""
    temperature: float = option(0.2, above=0)
    """Of the softmax over cosines."""
    hidden: int = option(512, above=0)
    """Width of the projector's hidden layer."""
    dimension: int = option(128, above=0)
    """Width of its output."""
    smallest_crop: float = option(0.5, above=0, most=1)
    """The smallest share of an image that a random crop takes."""
    strength: float = option(0.5, least=0, most=1)
    """Of the changes of colour; 1 is the paper's."""
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
    preset="paper", data="", image_size=224, model="S/16", init="timm", temperature=0.1, hidden=2048,
    smallest_crop=0.08, strength=1.0, base_lr=1.5e-4, epochs=100, batch_size=4096, warmup_epochs=40,
)  # fmt: skip
PRESETS = {"small": SMALL, "paper": PAPER}


def main(config: Config) -> list[dict[str, Any]]:
    accelerator = start_run(config)
    images = config.open()
    backbone = new_backbone(config, images, PRESETS[config.preset], init=config.init, seed=config.seed)
    heads = {"hidden": config.hidden, "dimension": config.dimension}
    objective = SimCLR(backbone, temperature=config.temperature, **heads, seed=config.seed)
    scale = (config.smallest_crop, 1.0)
    views = StrongPair(config.image_size, scale=scale, color=config.color, strength=config.strength)
    views.check_channels(images.channels)
    if preview(config, objective, images, views, accelerator):
        return []
    live = LiveReport(config, objective, images, views, accelerator)
    evaluations = pretrain(objective, images, views, config, accelerator, monitor_of(config, images, accelerator), live)
    finish(config, objective, images, views, evaluations, accelerator)
    return evaluations


if __name__ == "__main__":
    run_cli(main, PRESETS)
