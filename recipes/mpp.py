"""Masked patch prediction, the ViT paper's self-supervised objective (https://arxiv.org/abs/2010.11929, B.1.2).

    accelerate launch recipes/mpp.py                                   the built-in images
    accelerate launch recipes/mpp.py --data folder:/my/images --image_size 224 --model S/16

The paper: JFT-300M, 1M steps (13.5 epochs) at batch 4096, Adam at 2e-4 with 10k steps of warm-up, then a cosine,
ViT-B/16 at 224 px; decay, clipping and crops are not stated: --preset paper has 0, 0 and these crops. Not yet run.
The defaults, --preset small, are for 20,000 images of 32 px. On two CPU cores (2026-11-21) they took 4 minutes, and 20
nearest neighbours in the mean readout's space classified 46% of the shapes correctly, at the random start 15%.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslvit.cli import run_cli
from sslvit.config import PretrainConfig, option
from sslvit.evaluate.monitor import monitor_of
from sslvit.objectives.mpp import MPP
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.views.pretraining import CropFlip
from sslvit.weights.backbone import new_backbone


@dataclass(frozen=True)
class Config(PretrainConfig):
    """Pretrain a Vision Transformer by masked patch prediction, and show what it learned."""

    preset: Literal["small", "paper"] = "small"
    """Sets the defaults of the other options."""
    out: Path = Path("runs/mpp")
    model: str = "XS/8"
    conventions: Literal["timm", "jax"] = "timm"
    """The backbone's random weights, its GELU and how images are standardised: as in timm (exact, ImageNet's mean and
    deviation), or as in the ViT paper's code (tanh, to -1 to 1). A model of --init_from has its own."""
    target: Literal["mean", "downsized", "pixels"] = "mean"
    """What is predicted of a corrupted patch. Its mean colour, its 4x4 downsized version, or its pixels."""
    corrupt: float = option(0.5, above=0, most=1)
    """The share of patches that is corrupted."""
    epochs: float = 5
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    smallest_crop: float = option(0.5, above=0, most=1)
    """The smallest share of an image that a random crop takes."""


SMALL = Config()
PAPER = Config(
    preset="paper", data="", image_size=224, model="B/16", conventions="jax",
    lr=2e-4, epochs=13.5, batch_size=4096, warmup_epochs=0.135, weight_decay=0.0, clip=0.0,
)  # fmt: skip
PRESETS = {"small": SMALL, "paper": PAPER}


def main(config: Config) -> list[dict[str, Any]]:
    accelerator = start_run(config)
    images, preset = config.open(), PRESETS[config.preset]
    if config.conventions == "jax":
        half = (0.5,) * images.channels
        backbone = new_backbone(config, images, preset, init="jax", gelu="tanh", mean=half, std=half, seed=config.seed)
    else:
        backbone = new_backbone(config, images, preset, seed=config.seed)
    objective = MPP(backbone, target=config.target, corrupt=config.corrupt, seed=config.seed)
    views = CropFlip(config.image_size, scale=(config.smallest_crop, 1.0))
    if preview(config, objective, images, views, accelerator):
        return []
    live = LiveReport(config, objective, images, views, accelerator)
    evaluations = pretrain(objective, images, views, config, accelerator, monitor_of(config, images, accelerator), live)
    finish(config, objective, images, views, evaluations, accelerator)
    return evaluations


if __name__ == "__main__":
    run_cli(main, PRESETS)
