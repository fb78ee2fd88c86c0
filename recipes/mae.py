"""MAE, the masked autoencoder (https://arxiv.org/abs/2111.06377).

    accelerate launch recipes/mae.py                                                   the built-in images
    accelerate launch recipes/mae.py --preset paper --data folder:/imagenet/train      the paper's

The paper: ImageNet at 224 px, 800 epochs (1600 for its best) at batch 4096. AdamW with betas .9 and .95, 1.5e-4 per
256 images of a batch, 40 epochs of warm-up, then a cosine to 0; weight decay .05, but none of biases and norms; no
clipping. Crops of 20 to 100% of the area, resized bicubically, and flips. ViT-B/16, L/16 and H/14. Not yet run.
The defaults, --preset small, are for thousands of images of 28 to 64 px: a smaller decoder; 1e-3 at batch 64, the best
of 5e-4, 1e-3, 2e-3 and of 1e-3 at batch 256, by 20-nn on 5,000 held-out training images of Fashion-MNIST after 20,000
images (68.2 at the start; 69.9, 72.6, 71.4 and 68.4; one seed, XS/7). docs/results has a full pass.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslvit.cli import run_cli
from sslvit.config import PretrainConfig, option
from sslvit.evaluate.monitor import monitor_of
from sslvit.objectives.mae import MAE
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.training.optim import NoWeightDecay
from sslvit.weights.backbone import new_backbone


@dataclass(frozen=True)
class Config(PretrainConfig):
    """Pretrain a Vision Transformer as a masked autoencoder, and show what it learned."""

    preset: Literal["small", "paper"] = "small"
    """Sets the defaults of the other options."""
    out: Path = Path("runs/mae")
    mask_ratio: float = option(0.75, above=0, most=1)
    """The share of patches that the encoder does not see."""
    norm_pix_loss: bool = True
    """Standardise the pixels of each patch, which are then predicted."""
    decoder: tuple[int, int, int] = option((128, 2, 4), above=0)
    """Its width, depth and heads."""
    base_lr: float = 4e-3
    epochs: float = 20
    batch_size: int = 64
    warmup_epochs: float = 2
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    no_weight_decay: NoWeightDecay = "vectors"


SMALL = Config()
PAPER = Config(
    preset="paper", data="", image_size=224, model="B/16", decoder=(512, 8, 16),
    base_lr=1.5e-4, epochs=800, batch_size=4096, warmup_epochs=40,
)  # fmt: skip
PRESETS = {"small": SMALL, "paper": PAPER}


def main(config: Config) -> list[dict[str, Any]]:
    accelerator = start_run(config)
    images = config.open()
    backbone = new_backbone(config, images, PRESETS[config.preset], position="sincos_mae", init="mae", seed=config.seed)
    width, depth, heads = config.decoder
    objective = MAE(
        backbone,
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.norm_pix_loss,
        decoder_width=width,
        decoder_depth=depth,
        decoder_heads=heads,
        seed=config.seed,
    )
    views = objective.default_views(config.image_size, images.channels)
    if preview(config, objective, images, views, accelerator):
        return []
    live = LiveReport(config, objective, images, views, accelerator)
    evaluations = pretrain(objective, images, views, config, accelerator, monitor_of(config, images, accelerator), live)
    finish(config, objective, images, views, evaluations, accelerator)
    return evaluations


if __name__ == "__main__":
    run_cli(main, PRESETS)
