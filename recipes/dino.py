"""DINO, self-distillation with no labels (https://arxiv.org/abs/2104.14294).

    accelerate launch recipes/dino.py --preset small                         the built-in images, on one machine
    accelerate launch recipes/dino.py --data folder:/imagenet/train          the paper's

The paper: ImageNet at 224 px with 8 small crops of 96 px, ViT-S/16, 100 to 800 epochs at batch 1024. AdamW, 5e-4 for
each 256 images of a batch, 10 epochs of warm-up, then a cosine to 1e-6; weight decay .04 to .4 by a cosine, which
spares biases and norms; each parameter's gradient clipped to norm 3; the last layer held for an epoch. The teacher's
temperature rises from .04 to .07 in 30 epochs. ViT-B/16 has --norm_last_layer, rows of length 1. Not yet run.
In the W steps of warm-up the rate is i / W of its peak, in the official code i / (W - 1): lower by 1 / W of it, 8e-5.
--preset small is for thousands of images of 28 to 64 px. By 20-nn on 5,000 held-out training images of Fashion-MNIST
after 20,000 images (one seed, XS/7): with timm's start 62.6 became 59 to 61 at any rate that was tried; with the ViT
paper's, 67.0 became 68.8, at 1.5e-4 for batch 64 and a first momentum of .98 (68.2 at 5e-4 and .99). In these
runs the last layer was not held yet; the README has a full pass in which it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from sslvit.cli import choose, run_cli, typed_model
from sslvit.config import DataConfig, TrainConfig
from sslvit.evaluate.monitor import monitor_of
from sslvit.models.vit import ViT
from sslvit.objectives.dino import DINO
from sslvit.preflight.dry_run import dry_run
from sslvit.preflight.views import show_views
from sslvit.processes.collectives import start_run
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.training.optim import NoWeightDecay
from sslvit.views.pretraining import MultiCrop as Views
from sslvit.views.pretraining import papers_blur
from sslvit.weights.foreign.open import start_from


@dataclass(frozen=True)
class Config(TrainConfig, DataConfig):
    """Pretrain a Vision Transformer by DINO, and show what it learned."""

    preset: Literal["paper", "small"] = "paper"
    """What the other options are by default."""
    out: Path = Path("runs/dino")
    data: str = tyro.MISSING
    model: str = "S/16"
    """Width by name, and patch size: XS, mu, Ti, S, M, B, L, H, ..."""
    init: Literal["dino", "timm", "jax"] = "dino"
    """How the backbone starts: as the paper's does, as timm's (another class token), or as the ViT paper's, whose
    random features tell images apart more."""
    crops: tuple[int, int] | tuple[int, int, int] = (8, 96)
    """How many small crops, and their size: of a side, or height and width."""
    areas: tuple[float, float, float] = (0.05, 0.4, 1.0)
    """Shares of an image: small crops have from the first to the second, large ones from the second to the third."""
    color: bool = True
    """Change saturation and hue, and turn some views grey; --no-color for images that are neither grey nor RGB."""
    head: tuple[int, int, int] = (2048, 256, 65536)
    """Widths of its hidden layers, its bottleneck and its output."""
    norm_last_layer: bool = False
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    temperature_epochs: float = 30
    momentum: float = 0.996
    center_momentum: float = 0.9
    freeze_last_layer_epochs: float = 1
    drop_path: float = 0.1
    position_resize: Literal["bicubic_offset", "bicubic"] = "bicubic_offset"
    """How positions are resized for small crops: as the official code does, or as timm does by default."""
    base_lr: float = 5e-4
    final_lr: float = 1e-6
    epochs: float = 300
    batch_size: int = 1024
    warmup_epochs: float = 10
    weight_decay: float = 0.04
    final_weight_decay: float | None = 0.4
    clip_each: float = 3.0
    no_weight_decay: NoWeightDecay = "vectors"
    before: ClassVar[dict[str, Any]] = {"position_resize": "bicubic"}


SMALL = {"data": "shapes", "image_size": 32, "model": "XS/4", "crops": (4, 16), "areas": (0.25, 0.6, 1.0)}
SMALL |= {"head": (512, 64, 1024), "teacher_temperature": (0.04, 0.04), "momentum": 0.98, "drop_path": 0.0}
SMALL |= {
    "epochs": 20,
    "batch_size": 64,
    "warmup_epochs": 2,
    "base_lr": 6e-4,
    "freeze_last_layer_epochs": 0.05,
    "init": "jax",
}
PRESETS = {"paper": Config(), "small": Config(preset="small", **SMALL)}


def main() -> None:
    config = choose(PRESETS)
    if config.freeze_last_layer_epochs >= config.epochs:
        raise ValueError(
            f"--freeze_last_layer_epochs {config.freeze_last_layer_epochs:g} of --epochs {config.epochs:g}: "
            f"the last layer would never learn; give {config.epochs / 20:g} to freeze it for a twentieth"
        )
    accelerator = start_run(config)
    size, (small, middle, large) = config.image_size, config.areas
    source = config.open()
    start_of = {"init": config.init, "seed": config.seed}
    given = {"image_size": size, "channels": source.channels}
    start = start_from(config.init_from, model=typed_model(config), **given)
    backbone = start or ViT.variant(config.model, **given, **start_of)
    names = ("norm_last_layer", "teacher_temperature", "momentum", "center_momentum", "drop_path", "position_resize")
    options = {"seed": config.seed} | dict(zip(("hidden", "bottleneck", "outputs"), config.head, strict=True))
    options |= {name: getattr(config, name) for name in names}
    options |= {"temperature_warmup": min(config.temperature_epochs / config.epochs, 1.0)}
    objective = DINO(backbone, **options, freeze_last_layer=config.freeze_last_layer_epochs / config.epochs)
    count, *small_size = config.crops
    crops = {"small": count, "small_size": small_size[0] if len(small_size) == 1 else tuple(small_size)}
    areas = {"scale": (middle, large), "small_scale": (small, middle)}
    views = Views(size, **crops, **areas, sigma=papers_blur(size), color=config.color)
    views.check_channels(source.channels)
    if show_views(config, source, views, accelerator) or dry_run(config, objective, source, views, accelerator):
        return
    monitor = monitor_of(config, source, accelerator)
    evaluations = pretrain(objective, source, views, config, accelerator, monitor)
    finish(config, objective, source, views, evaluations, accelerator)


if __name__ == "__main__":
    run_cli(main)
