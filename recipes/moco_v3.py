"""MoCo v3, contrastive learning with a teacher (https://arxiv.org/abs/2104.02057).

    accelerate launch recipes/moco_v3.py                                                  the built-in images
    accelerate launch recipes/moco_v3.py --preset paper --data folder:/imagenet/train     the paper's

The paper: ImageNet at 224 px, 300 epochs at batch 4096. AdamW with betas .9 and .999, 1.5e-4 per 256 images of a
batch, 40 epochs of warm-up, then a cosine to 0; weight decay .1, of all parameters; no clipping. Views: crops of 8 to
100%, colour, grey, blur, solarisation of the second. ViT-S with 12 heads (S-moco_v3/16), B/16, L/16. Not yet run.
Views differ from the official ones in rounding, in the blur's filter and by --canvas: views/pretraining.py.
The defaults, --preset small, are for thousands of images of 28 to 64 px: smaller heads; 5e-4 at batch 64, crops of 50
to 100%. By 20-nn on 5,000 held-out training images of Fashion-MNIST after 20,000 images (69.1 at the start; one seed,
XS/7): 76.3; with crops from 20% 74.7, with 1e-3 then 74.9, and at batch 256 72.3. docs/results has a full pass.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslvit.cli import run_cli
from sslvit.config import PretrainConfig, option
from sslvit.evaluate.monitor import monitor_of
from sslvit.objectives.moco_v3 import MoCoV3
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.training.optim import NoWeightDecay
from sslvit.views.pretraining import ContrastivePair
from sslvit.weights.backbone import new_backbone


@dataclass(frozen=True)
class Config(PretrainConfig):
    """Pretrain a Vision Transformer by MoCo v3, and show what it learned."""

    preset: Literal["small", "paper"] = "small"
    """Sets the defaults of the other options."""
    out: Path = Path("runs/moco_v3")
    position: Literal["sincos_moco_v3", "learned_1d", "none"] = "sincos_moco_v3"
    """The backbone's position embedding; the paper's is fixed, sine and cosine."""
    freeze_patch_projection: bool = True
    """Leave the patch projection at its random weights, as the paper does for stability."""
    hidden: int = option(512, above=0)
    """Width of the heads' hidden layers. The heads are the projector and the predictor."""
    smallest_crop: float = option(0.5, above=0, most=1)
    """The smallest share of an image that a random crop takes."""
    color: bool = True
    """Change saturation and hue, grey some views; --no_color for images that are neither grey nor RGB."""
    chunks: int = option(1, above=0)
    """What --accumulation would be, but for the backbone alone: the loss stays that of the whole batch."""
    base_lr: float = 2e-3
    epochs: float = 20
    batch_size: int = 64
    warmup_epochs: float = 2
    weight_decay: float = 0.1
    no_weight_decay: NoWeightDecay = "nothing"


SMALL = Config()
PAPER = Config(
    preset="paper", data="", image_size=224, model="S-moco_v3/16", hidden=4096, smallest_crop=0.08,
    base_lr=1.5e-4, epochs=300, batch_size=4096, warmup_epochs=40,
)  # fmt: skip
PRESETS = {"small": SMALL, "paper": PAPER}


def main(config: Config) -> list[dict[str, Any]]:
    accelerator = start_run(config)
    images = config.open()
    backbone = new_backbone(
        config, images, PRESETS[config.preset], position=config.position, init="moco_v3", seed=config.seed
    )
    objective = MoCoV3(
        backbone,
        hidden=config.hidden,
        freeze_patch_projection=config.freeze_patch_projection,
        chunks=config.chunks,
        seed=config.seed,
    )
    views = ContrastivePair(config.image_size, scale=(config.smallest_crop, 1.0), color=config.color)
    views.check_channels(images.channels)
    if preview(config, objective, images, views, accelerator):
        return []
    live = LiveReport(config, objective, images, views, accelerator)
    evaluations = pretrain(objective, images, views, config, accelerator, monitor_of(config, images, accelerator), live)
    finish(config, objective, images, views, evaluations, accelerator)
    return evaluations


if __name__ == "__main__":
    run_cli(main, PRESETS)
