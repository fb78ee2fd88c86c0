"""I-JEPA: a teacher's features of hidden blocks (https://arxiv.org/abs/2301.08243).

    accelerate launch recipes/ijepa.py                                                   the built-in images
    accelerate launch recipes/ijepa.py --preset paper --data folder:/imagenet/train      the paper's

The paper: ImageNet at 224 px, 300 to 600 epochs at batch 2048, ViT-B/16, L/16 and H/14. AdamW, a rate of 1e-3 (1.25e-4
per 256 images of a batch), 15 epochs of warm-up from 1e-4, here from 0, then a cosine to 1e-6; weight decay .04 to .4
by a cosine, but none of biases and norms; bfloat16 (--precision bf16); no clipping; crops of 30 to 100%, nothing else.
The released settings warm up for 40 epochs from 2e-4, here from 0. L/16 and H/14 have --predictor 384 12. Not yet run.
The defaults, --preset small, are for thousands of images of 28 to 64 px with patches of 4: a smaller predictor. They
were not tuned. On a grid of 4 x 4 patches a block has one, two or rarely four.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslvit.cli import run_cli
from sslvit.config import PretrainConfig, option
from sslvit.evaluate.monitor import monitor_of
from sslvit.objectives.ijepa import IJEPA
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.training.optim import NoWeightDecay
from sslvit.weights.backbone import new_backbone


@dataclass(frozen=True)
class Config(PretrainConfig):
    """Pretrain a Vision Transformer by I-JEPA, and show what it learned."""

    preset: Literal["small", "paper"] = "small"
    """Sets the defaults of the other options."""
    out: Path = Path("runs/ijepa")
    predictor: tuple[int, int] = option((96, 3), above=0)
    """Its width and depth; it has as many heads as the backbone."""
    targets: int = option(4, above=0)
    """How many blocks are predicted."""
    target_scale: tuple[float, float] = option((0.15, 0.2), above=0, most=1)
    """The least and the largest share of the patches that are in such a block."""
    context_scale: tuple[float, float] = option((0.85, 1.0), above=0, most=1)
    """The same for the block that the student sees, without the targets."""
    momentum: float = option(0.996, least=0, most=1)
    """Of the target encoder's average of weights, at the start; it rises to 1."""
    base_lr: float = 2e-3
    final_lr: float = 1e-6
    epochs: float = 20
    batch_size: int = 64
    warmup_epochs: float = 2
    weight_decay: float = 0.04
    final_weight_decay: float | None = 0.4
    no_weight_decay: NoWeightDecay = "vectors"


SMALL = Config()
PAPER = Config(
    preset="paper", data="", image_size=224, model="B/16", predictor=(384, 6),
    base_lr=1.25e-4, epochs=600, batch_size=2048, warmup_epochs=15,
)  # fmt: skip
PRESETS = {"small": SMALL, "paper": PAPER}


def main(config: Config) -> list[dict[str, Any]]:
    accelerator = start_run(config)
    images = config.open()
    backbone = new_backbone(
        config, images, PRESETS[config.preset],
        class_token=False, position="sincos_mae", init="timm", seed=config.seed,
    )  # fmt: skip
    width, depth = config.predictor
    objective = IJEPA(
        backbone, predictor_width=width, predictor_depth=depth, targets=config.targets,
        target_scale=config.target_scale, context_scale=config.context_scale, momentum=config.momentum,
        seed=config.seed,
    )  # fmt: skip
    views = objective.default_views(config.image_size, images.channels)
    if preview(config, objective, images, views, accelerator):
        return []
    live = LiveReport(config, objective, images, views, accelerator)
    evaluations = pretrain(objective, images, views, config, accelerator, monitor_of(config, images, accelerator), live)
    finish(config, objective, images, views, evaluations, accelerator)
    return evaluations


if __name__ == "__main__":
    run_cli(main, PRESETS)
