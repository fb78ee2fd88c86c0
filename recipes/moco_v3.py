"""MoCo v3 (https://arxiv.org/abs/2104.02057).

    accelerate launch recipes/moco_v3.py --preset small                      the built-in images, on one machine
    accelerate launch recipes/moco_v3.py --data folder:/imagenet/train       the paper's

The paper: ImageNet at 224 px, 300 epochs at batch 4096. AdamW with betas .9 and .999, 1.5e-4 for each 256 images of a
batch, 40 epochs of warm-up, then a cosine to 0; weight decay .1, of all parameters; no clipping. Views: crops of 8 to
100 %, colour, grey, blur, solarisation of the second. ViT-S with 12 heads (S-moco_v3/16), B/16, L/16. Not yet run.
--preset small is for thousands of images of 28 to 64 px: smaller heads; 5e-4 at batch 64, crops of 50 to 100 %. By
20-nn on 5,000 held-out training images of Fashion-MNIST after 20,000 images (69.1 at the start; one seed, XS/7): 76.3;
with crops from 20 % 74.7, with 1e-3 then 74.9, and at batch 256 72.3. The README has a full pass.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from sslvit.cli import choose, run_cli, typed_model
from sslvit.config import DataConfig, TrainConfig
from sslvit.evaluate.monitor import monitor_of
from sslvit.models.vit import ViT
from sslvit.objectives.moco_v3 import MoCoV3
from sslvit.preflight.dry_run import dry_run
from sslvit.preflight.views import show_views
from sslvit.processes.collectives import start_run
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.training.optim import NoWeightDecay
from sslvit.views.pretraining import ContrastivePair as Views
from sslvit.views.pretraining import papers_blur
from sslvit.weights.foreign.open import start_from


@dataclass(frozen=True)
class Config(TrainConfig, DataConfig):
    """Pretrain a Vision Transformer by MoCo v3, and show what it learned."""

    preset: Literal["paper", "small"] = "paper"
    """What the other options are by default."""
    out: Path = Path("runs/moco_v3")
    data: str = tyro.MISSING
    model: str = "S-moco_v3/16"
    """Width by name, and patch size: XS, mu, Ti, S-moco_v3 (12 heads), S, M, B, L, H, ..."""
    position: Literal["sincos_moco_v3", "learned_1d", "none"] = "sincos_moco_v3"
    freeze_patch_projection: bool = True
    hidden: int = 4096
    smallest_crop: float = 0.08
    color: bool = True
    """Change saturation and hue, and turn some views grey; --no-color for images that are neither grey nor RGB."""
    chunks: int = 1
    """What --accumulation would be, but for the backbone alone: the loss stays that of the whole batch."""
    base_lr: float = 1.5e-4
    epochs: float = 300
    batch_size: int = 4096
    warmup_epochs: float = 40
    weight_decay: float = 0.1
    no_weight_decay: NoWeightDecay = "nothing"


SMALL = {"data": "shapes", "image_size": 32, "model": "XS/4", "hidden": 512, "smallest_crop": 0.5, "base_lr": 2e-3}
SMALL |= {"epochs": 20, "batch_size": 64, "warmup_epochs": 2}
PRESETS = {"paper": Config(), "small": Config(preset="small", **SMALL)}


def main() -> None:
    config = choose(PRESETS)
    accelerator = start_run(config)
    size = config.image_size
    source = config.open()
    start_of = {"position": config.position, "init": "moco_v3", "seed": config.seed}
    given = {"image_size": size, "channels": source.channels}
    start = start_from(config.init_from, model=typed_model(config), **given)
    backbone = start or ViT.variant(config.model, **given, **start_of)
    names = ("hidden", "freeze_patch_projection", "chunks", "seed")
    objective = MoCoV3(backbone, **{name: getattr(config, name) for name in names})
    views = Views(size, scale=(config.smallest_crop, 1.0), sigma=papers_blur(size), color=config.color)
    views.check_channels(source.channels)
    if show_views(config, source, views, accelerator) or dry_run(config, objective, source, views, accelerator):
        return
    monitor = monitor_of(config, source, accelerator)
    evaluations = pretrain(objective, source, views, config, accelerator, monitor)
    finish(config, objective, source, views, evaluations, accelerator)


if __name__ == "__main__":
    run_cli(main)
