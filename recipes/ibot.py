"""iBOT, self-distillation of class tokens and of hidden patches (https://arxiv.org/abs/2111.07832).

    accelerate launch recipes/ibot.py                                                  the built-in images
    accelerate launch recipes/ibot.py --preset paper --data folder:/imagenet/train     the paper's

The paper: ImageNet at 224 px with 10 small crops of 96 px, ViT-S/16, 800 epochs at batch 1024. AdamW, 5e-4 per 256
images of a batch, 10 epochs of warm-up, then a cosine to 1e-6; weight decay .04 to .4 by a cosine, but none of biases
and norms; each parameter's gradient clipped to norm 3; the last layer frozen for an epoch. The teacher's temperature
rises from .04 to .07 in 30 epochs. One head of 8,192 outputs for class tokens and patches. Not yet run.
In the W steps of warm-up the rate is i / W of its peak, in the official code i / (W - 1): lower by 1 / W of it, 8e-5.
Views differ from the official ones in rounding, in the blur's filter and by --canvas: views/pretraining.py.
The defaults, --preset small, are for thousands of images of 28 to 64 px. They are DINO's and have not been
tuned for iBOT: on CIFAR-10 little above a random start (docs/results/cifar10.md).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslvit.cli import run_cli
from sslvit.config import PretrainConfig, option
from sslvit.evaluate.monitor import monitor_of
from sslvit.objectives.ibot import IBOT
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.training.optim import NoWeightDecay
from sslvit.views.pretraining import MultiCrop, small_crops
from sslvit.weights.backbone import new_backbone


@dataclass(frozen=True)
class Config(PretrainConfig):
    """Pretrain a Vision Transformer by iBOT, and show what it learned."""

    preset: Literal["small", "paper"] = "small"
    """Sets the defaults of the other options."""
    out: Path = Path("runs/ibot")
    init: Literal["dino", "timm", "jax"] = "jax"
    """The backbone's random weights: as the paper's code draws them, as timm does (another class token), or as the ViT
    paper's, whose random features separate images better."""
    crops: tuple[int] | tuple[int, int] | tuple[int, int, int] = option((4,), least=0)
    """How many small crops, and their side, or height and width. By default half of the image's, above 96 px 96/224."""
    areas: tuple[float, float, float] = option((0.25, 0.6, 1.0), above=0, most=1)
    """Shares of an image: small crops have from the first to the second, large ones from the second to the third."""
    color: bool = True
    """Change saturation and hue, grey some views; --no_color for images that are neither grey nor RGB."""
    head: tuple[int, int, int] = option((512, 64, 1024), above=0)
    """Widths of its hidden layers, its bottleneck and its output."""
    mask_ratios: tuple[float, float] = option((0.1, 0.5), above=0, most=1)
    """The share of a large crop that is hidden. From the first to the second, of half of them."""
    patch_weight: float = option(1.0, least=0)
    """Weight of the loss of hidden patches; that of class tokens has 1."""
    norm_last_layer: bool = False
    """Keep the rows of the last layer at length 1."""
    teacher_temperature: tuple[float, float] = option((0.04, 0.04), above=0)
    """The teacher's, at the start and after --temperature_epochs."""
    temperature_epochs: float = option(30, least=0)
    """Passes over which the teacher's temperature rises."""
    momentum: float = option(0.98, least=0, most=1)
    """Of the teacher's average of weights, at the start; it rises to 1."""
    center_momentum: float = option(0.9, least=0, most=1)
    """Of the running mean that is subtracted from the teacher's output."""
    freeze_last_layer_epochs: float = option(0.05, least=0)
    """Passes in which the last layer does not learn yet."""
    drop_path: float = option(0.0, least=0, most=1)
    """The probability that a block of the student is left out, in the last block; earlier ones have less."""
    position_resize: Literal["bicubic_offset", "bicubic"] = "bicubic_offset"
    """How positions are resized for small crops: as the official code does, or as timm does by default."""
    base_lr: float = 6e-4
    final_lr: float = 1e-6
    epochs: float = 20
    batch_size: int = 64
    warmup_epochs: float = 2
    weight_decay: float = 0.04
    final_weight_decay: float | None = 0.4
    clip_each: float = 3.0
    no_weight_decay: NoWeightDecay = "vectors"

    def check(self) -> None:
        super().check()
        if self.freeze_last_layer_epochs >= self.epochs:
            raise ValueError(
                f"--freeze_last_layer_epochs {self.freeze_last_layer_epochs:g} of --epochs {self.epochs:g}: the last "
                f"layer would never learn; give {self.epochs / 20:g} to freeze it for a twentieth"
            )


SMALL = Config()
PAPER = Config(
    preset="paper", data="", image_size=224, model="S/16", init="dino", drop_path=0.1,
    crops=(10, 96), areas=(0.05, 0.25, 1.0), head=(2048, 256, 8192),
    teacher_temperature=(0.04, 0.07), momentum=0.996, freeze_last_layer_epochs=1,
    base_lr=5e-4, epochs=800, batch_size=1024, warmup_epochs=10,
)  # fmt: skip
PRESETS = {"small": SMALL, "paper": PAPER}


def main(config: Config) -> list[dict[str, Any]]:
    accelerator = start_run(config)
    images = config.open()
    backbone = new_backbone(config, images, PRESETS[config.preset], init=config.init, seed=config.seed)
    hidden, bottleneck, outputs = config.head
    objective = IBOT(
        backbone, hidden=hidden, bottleneck=bottleneck, outputs=outputs, norm_last_layer=config.norm_last_layer,
        mask_ratios=config.mask_ratios, patch_weight=config.patch_weight,
        freeze_last_layer=config.freeze_last_layer_epochs / config.epochs,
        teacher_temperature=config.teacher_temperature,
        temperature_warmup=min(config.temperature_epochs / config.epochs, 1.0),
        momentum=config.momentum, center_momentum=config.center_momentum,
        drop_path=config.drop_path, position_resize=config.position_resize, seed=config.seed,
    )  # fmt: skip
    usual = objective.default_views(config.image_size, images.channels).small_size
    (small, middle, large), (count, side) = config.areas, small_crops(config.crops, usual, backbone.patch_size)
    views = MultiCrop(
        config.image_size, scale=(middle, large), color=config.color,
        small=count, small_size=side, small_scale=(small, middle),
    )  # fmt: skip
    views.check_channels(images.channels)
    if preview(config, objective, images, views, accelerator):
        return []
    live = LiveReport(config, objective, images, views, accelerator)
    evaluations = pretrain(objective, images, views, config, accelerator, monitor_of(config, images, accelerator), live)
    finish(config, objective, images, views, evaluations, accelerator)
    return evaluations


if __name__ == "__main__":
    run_cli(main, PRESETS)
