"""LeJEPA: views agree, and their features stay Gaussian (https://arxiv.org/abs/2511.08544).

    accelerate launch recipes/lejepa.py                                                  the built-in images
    accelerate launch recipes/lejepa.py --preset paper --data folder:/imagenet/train     the paper's

The paper: two crops of 224 px and six of 98 px of each image; AdamW at 5e-4, an epoch of warm-up, then a cosine to a
thousandth; weight decay .05; bfloat16 (--precision bf16); a projector of two hidden layers of 2,048. --preset paper has
these with L/14. The weight of SIGReg is that of the authors' example; the batch that the rate is for, the number of
epochs and the width of the projector's output are ours. Not yet run.
The authors' short example, of Imagenette, but for its rate, which ends at 1e-3, and for its backbone's linear layer to
512 values, which its projector reads: --preset paper --image_size 128 --model S/8 --crops 4 0 --head 2048 16
--directions 256 --base_lr 2e-3 --batch_size 256 --epochs 800.
Views differ from the official ones in rounding, in the blur's filter and by --canvas: views/pretraining.py.
The defaults, --preset small, are for thousands of images of 28 to 64 px: narrower heads, smaller crops of 25 to 60%.
They were not tuned.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sslvit.cli import run_cli
from sslvit.config import PretrainConfig, option
from sslvit.evaluate.monitor import monitor_of
from sslvit.objectives.lejepa import LeJEPA
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.training.optim import NoWeightDecay
from sslvit.weights.backbone import new_backbone


@dataclass(frozen=True)
class Config(PretrainConfig):
    """Pretrain a Vision Transformer by LeJEPA, and show what it learned."""

    preset: Literal["small", "paper"] = "small"
    """Sets the defaults of the other options."""
    out: Path = Path("runs/lejepa")
    init: Literal["timm", "jax", "dino", "moco_v3", "mae"] = "jax"
    """The backbone's random weights: as timm or the code of these papers draws them; jax is the ViT paper's."""
    weight: float = option(0.02, least=0, most=1)
    """Of SIGReg in the loss; invariance has the rest."""
    crops: tuple[int, int] = option((2, 4), least=0)
    """How many large crops and small ones. These have half the side, above 96 px 98/224 of it, in whole patches."""
    areas: tuple[float, float, float] = option((0.25, 0.6, 1.0), above=0, most=1)
    """Shares of an image: small crops have from the first to the second, large ones from the second to the third."""
    directions: int = option(256, above=0)
    """Random directions along which embeddings are compared with a Gaussian, in each step."""
    head: tuple[int, int] = option((512, 64), above=0)
    """Widths of its two hidden layers and of its output."""
    color: bool = True
    """Change saturation and hue, grey some views; --no_color for images that are neither grey nor RGB."""
    base_lr: float = 2e-3
    final_lr: float = 5e-7
    epochs: float = 20
    batch_size: int = 64
    warmup_epochs: float = 2
    weight_decay: float = 0.05
    no_weight_decay: NoWeightDecay = "nothing"


SMALL = Config()
PAPER = Config(
    preset="paper", data="", image_size=224, model="L/14", init="timm", crops=(2, 6), areas=(0.05, 0.3, 1.0),
    directions=1024, head=(2048, 64), base_lr=5e-4, final_lr=5e-7, epochs=100, batch_size=256, warmup_epochs=1,
)  # fmt: skip
PRESETS = {"small": SMALL, "paper": PAPER}


def main(config: Config) -> list[dict[str, Any]]:
    accelerator = start_run(config)
    images = config.open()
    backbone = new_backbone(config, images, PRESETS[config.preset], init=config.init, seed=config.seed)
    (large, small), (hidden, dimension) = config.crops, config.head
    objective = LeJEPA(
        backbone, weight=config.weight, large=large, directions=config.directions,
        hidden=hidden, dimension=dimension, seed=config.seed,
    )  # fmt: skip
    least, middle, most = config.areas
    usual = objective.default_views(config.image_size, images.channels)
    views = replace(usual, small=small, scale=(middle, most), small_scale=(least, middle), color=config.color)
    views.check_channels(images.channels)
    if preview(config, objective, images, views, accelerator):
        return []
    live = LiveReport(config, objective, images, views, accelerator)
    evaluations = pretrain(objective, images, views, config, accelerator, monitor_of(config, images, accelerator), live)
    finish(config, objective, images, views, evaluations, accelerator)
    return evaluations


if __name__ == "__main__":
    run_cli(main, PRESETS)
