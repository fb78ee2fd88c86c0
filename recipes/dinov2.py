"""DINOv2: DINO and iBOT together, with features kept apart (https://arxiv.org/abs/2304.07193).

    accelerate launch recipes/dinov2.py                                                  the built-in images
    accelerate launch recipes/dinov2.py --preset paper --data folder:/imagenet/train     the code's short schedule

The short schedule of the code: ImageNet at 224 px with 8 small crops of 96 px, ViT-L/16, 125,000 steps at batch 2048,
which are 200 epochs; it calls 1,250 steps an epoch, so its 10 epochs of warm-up are 20 here. AdamW, 4e-3 times the root
of 1/1024 of the batch (2e-3 per 256), then a cosine to 1e-6; layer decay .9; weight decay .04 to .4, but none of biases
and norms; clipping to 3, there of each network, here of all gradients together. Drop path .3, LayerScale 1e-5. Not yet
run. Its largest models: --head 2048 384 131072 --patch_head 2048 256 131072 --assignment sinkhorn --momentum .994, and
SwiGLU, drop path .4, 2e-4 in the place of 4e-3, no layer decay, weight decay to .2, 625,000 steps of 3072, 100,000 of
warm-up, patches of 14. Of DINOv3 it has --gram_weight 2.
In the W steps of warm-up the rate is i / W of its peak, in the official code i / (W - 1): lower by 1 / W of it, 8e-5.
Views differ from the official ones in rounding, in the blur's filter and by --canvas: views/pretraining.py.
The defaults, --preset small, are for thousands of images of 28 to 64 px. They are DINO's and have not been
tuned for DINOv2, which by 20-nn is ahead of DINO with them (docs/results/dense.md).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslvit.cli import run_cli
from sslvit.config import PretrainConfig, option
from sslvit.evaluate.monitor import monitor_of
from sslvit.objectives.dinov2 import DINOv2
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
    """Pretrain a Vision Transformer by DINOv2, and show what it learned."""

    preset: Literal["small", "paper"] = "small"
    """Sets the defaults of the other options."""
    out: Path = Path("runs/dinov2")
    init: Literal["timm", "jax"] = "jax"
    """The backbone's random weights: as timm and the paper's code draw them, or as the ViT paper's, whose random
    features separate images better."""
    layer_scale: float | None = None
    """Factors of the blocks' branches at the start, which are learned; by default there are none."""
    crops: tuple[int] | tuple[int, int] | tuple[int, int, int] = option((4,), least=0)
    """How many small crops, and their side, or height and width. By default half of the image's, above 96 px 96/224."""
    areas: tuple[float, float, float] = option((0.25, 0.6, 1.0), above=0, most=1)
    """Shares of an image: small crops have from the first to the second, large ones from the second to the third."""
    color: bool = True
    """Change saturation and hue, grey some views; --no_color for images that are neither grey nor RGB."""
    head: tuple[int, int, int] = option((512, 64, 1024), above=0)
    """Widths of its hidden layers, its bottleneck and its output."""
    patch_head: tuple[int, int, int] | None = option(None, above=0)
    """Widths of a head of their own for patches; by default they share the other."""
    assignment: Literal["centering", "sinkhorn"] = "centering"
    """What keeps the teacher from one output for all images."""
    mask_ratios: tuple[float, float] = option((0.1, 0.5), above=0, most=1)
    """The share of a large crop that is hidden. From the first to the second, of half of them."""
    patch_weight: float = option(1.0, least=0)
    """Weight of the loss of hidden patches; that of class tokens has 1."""
    koleo_weight: float = option(0.1, least=0)
    """Weight of the term that keeps the features of images apart."""
    koleo_group: int = option(64, least=2)
    """How many consecutive images of a batch that term compares with each other."""
    gram_weight: float = option(0.0, least=0)
    """Weight of DINOv3's Gram anchoring, there 2. It holds the likeness of patches to that of an earlier teacher."""
    gram_epochs: tuple[float, float] = option((10.0, 2.0), least=0)
    """Passes until it begins, and until that teacher is renewed; three times at most."""
    patch_rate: float = option(0.2, above=0)
    """The patch embedding's learning rate is multiplied by this."""
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
    base_lr: float = 3e-4
    lr_rule: Literal["linear", "sqrt"] = "sqrt"
    final_lr: float = 1e-6
    epochs: float = 20
    batch_size: int = 64
    warmup_epochs: float = 2
    weight_decay: float = 0.04
    final_weight_decay: float | None = 0.4
    clip: float = 3.0
    no_weight_decay: NoWeightDecay = "vectors"

    def check(self) -> None:
        super().check()
        if self.freeze_last_layer_epochs >= self.epochs:
            raise ValueError(
                f"--freeze_last_layer_epochs {self.freeze_last_layer_epochs:g} of --epochs {self.epochs:g}: the last "
                f"layer would never learn; give {self.epochs / 20:g} to freeze it for a twentieth"
            )
        if self.gram_weight and (self.gram_epochs[0] >= self.epochs or not self.gram_epochs[1]):
            raise ValueError(
                f"--gram_epochs {self.gram_epochs[0]:g} {self.gram_epochs[1]:g} of --epochs {self.epochs:g}: Gram "
                f"anchoring must begin before the end, and the second be above 0; give {self.epochs / 2:g} "
                f"{self.epochs / 10:g}"
            )


SMALL = Config()
PAPER = Config(
    preset="paper", data="", image_size=224, model="L/16", init="timm", layer_scale=1e-5, drop_path=0.3,
    crops=(8, 96), areas=(0.05, 0.32, 1.0), head=(2048, 256, 65536),
    teacher_temperature=(0.04, 0.07), temperature_epochs=60, momentum=0.992, freeze_last_layer_epochs=2,
    gram_epochs=(100, 20), base_lr=2e-3, layer_decay=0.9, epochs=200, batch_size=2048, warmup_epochs=20,
)  # fmt: skip
PRESETS = {"small": SMALL, "paper": PAPER}


def main(config: Config) -> list[dict[str, Any]]:
    accelerator = start_run(config)
    images = config.open()
    backbone = new_backbone(
        config, images, PRESETS[config.preset], init=config.init, layer_scale=config.layer_scale, seed=config.seed
    )
    hidden, bottleneck, outputs = config.head
    objective = DINOv2(
        backbone, hidden=hidden, bottleneck=bottleneck, outputs=outputs, norm_last_layer=config.norm_last_layer,
        patch_head=config.patch_head, assignment=config.assignment,
        mask_ratios=config.mask_ratios, patch_weight=config.patch_weight,
        koleo_weight=config.koleo_weight, koleo_group=config.koleo_group,
        gram_weight=config.gram_weight, gram_start=min(config.gram_epochs[0] / config.epochs, 1.0),
        gram_every=(config.gram_epochs[1] or 1.0) / config.epochs, patch_rate=config.patch_rate,
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
