"""MAE, the masked autoencoder (https://arxiv.org/abs/2111.06377).

    accelerate launch recipes/mae.py --preset small                          the built-in images, on one machine
    accelerate launch recipes/mae.py --data folder:/imagenet/train           the paper's

The paper: ImageNet at 224 px, 800 epochs (1600 for its best) at batch 4096. AdamW with betas .9 and .95, 1.5e-4 for
each 256 images of a batch, 40 epochs of warm-up, then a cosine to 0; weight decay .05, which spares biases and norms;
no clipping. Crops of 20 to 100 % of the area, resized bicubically, and flips. ViT-B/16, L/16 and H/14. Not yet run.
--preset small is for thousands of images of 28 to 64 px: a smaller decoder; 1e-3 at batch 64, the best of 5e-4, 1e-3,
2e-3 and of 1e-3 at batch 256, by 20-nn on 5,000 held-out training images of Fashion-MNIST after 20,000 images (68.2 at
the start; 69.9, 72.6, 71.4 and 68.4; one seed, XS/7). The README has a full pass.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from sslvit.cli import choose, run_cli, typed_model
from sslvit.config import DataConfig, TrainConfig
from sslvit.evaluate.monitor import monitor_of
from sslvit.models.vit import ViT
from sslvit.objectives.mae import MAE
from sslvit.preflight.dry_run import dry_run
from sslvit.preflight.views import show_views
from sslvit.processes.collectives import start_run
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.training.optim import NoWeightDecay
from sslvit.views.pretraining import CropFlip
from sslvit.weights.foreign.open import start_from


@dataclass(frozen=True)
class Config(TrainConfig, DataConfig):
    """Pretrain a Vision Transformer as a masked autoencoder, and show what it learned."""

    preset: Literal["paper", "small"] = "paper"
    """What the other options are by default."""
    out: Path = Path("runs/mae")
    data: str = tyro.MISSING
    model: str = "B/16"
    """Width by name, and patch size: XS, mu, Ti, S, M, B, L, H, ..."""
    mask_ratio: float = 0.75
    """The share of patches that the encoder does not see."""
    norm_pix_loss: bool = True
    decoder: tuple[int, int, int] = (512, 8, 16)
    """Its width, depth and heads."""
    base_lr: float = 1.5e-4
    epochs: float = 800
    batch_size: int = 4096
    warmup_epochs: float = 40
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    no_weight_decay: NoWeightDecay = "vectors"


SMALL = {"data": "shapes", "image_size": 32, "model": "XS/4", "decoder": (128, 2, 4), "base_lr": 4e-3}
SMALL |= {"epochs": 20, "batch_size": 64, "warmup_epochs": 2}
PRESETS = {"paper": Config(), "small": Config(preset="small", **SMALL)}


def main() -> None:
    config = choose(PRESETS)
    accelerator = start_run(config)
    size = config.image_size
    source = config.open()
    start_of = {"position": "sincos_mae", "init": "mae", "seed": config.seed}
    given = {"image_size": size, "channels": source.channels}
    start = start_from(config.init_from, model=typed_model(config), **given)
    backbone = start or ViT.variant(config.model, **given, **start_of)
    decoder = dict(zip(("decoder_width", "decoder_depth", "decoder_heads"), config.decoder, strict=True))
    objective = MAE(
        backbone, mask_ratio=config.mask_ratio, norm_pix_loss=config.norm_pix_loss, seed=config.seed, **decoder
    )
    views = CropFlip(size)
    if show_views(config, source, views, accelerator) or dry_run(config, objective, source, views, accelerator):
        return
    monitor = monitor_of(config, source, accelerator)
    evaluations = pretrain(objective, source, views, config, accelerator, monitor)
    finish(config, objective, source, views, evaluations, accelerator)


if __name__ == "__main__":
    run_cli(main)
