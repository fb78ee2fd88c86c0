"""SimMIM, masked image modelling (https://arxiv.org/abs/2111.09886).

    accelerate launch recipes/simmim.py                                                  the built-in images
    accelerate launch recipes/simmim.py --preset paper --data folder:/imagenet/train     the paper's

The paper: ImageNet at 224 px, ViT-B/16, 800 epochs at batch 2048. AdamW, 1e-4 per 512 images of a batch (5e-5 per 256),
10 epochs of warm-up, a tenth of the rate from epoch 700 on; weight decay .05, but none of biases and norms; gradients
clipped to a global norm of 5; drop path .1, LayerScale .1, a bias of attention by offset; crops of 67 to 100% of the
area and flips. Not yet run.
There the rate warms up from 5e-7 per 512 images, and the class token is spared weight decay; here it warms up from 0,
and the class token decays as the mask token and the bias of attention do.
The defaults, --preset small, are for thousands of images of 28 to 64 px. They have not been tuned: the rate is MAE's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslvit.cli import run_cli
from sslvit.config import PretrainConfig, option
from sslvit.evaluate.monitor import monitor_of
from sslvit.models.vit_config import SHARED_BIAS
from sslvit.objectives.simmim import SimMIM
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.training.optim import NoWeightDecay
from sslvit.weights.backbone import new_backbone


@dataclass(frozen=True)
class Config(PretrainConfig):
    """Pretrain a Vision Transformer by SimMIM, and show what it learned."""

    preset: Literal["small", "paper"] = "small"
    """Sets the defaults of the other options."""
    out: Path = Path("runs/simmim")
    mask_ratio: float = option(0.6, above=0, most=1)
    """The share of squares that is hidden."""
    unit: int = option(0, least=0)
    """Side of these squares, in patches. 0 takes what is nearest to the paper's 32 of 224 px."""
    init: Literal["timm", "jax", "beit"] = "jax"
    """The backbone's random weights: as timm draws them, the ViT paper's code, or BEiT's."""
    relative_bias: bool = False
    """No positions but a bias of attention by offset, the same in all blocks, as in BEiT."""
    layer_scale: float | None = None
    """Factors of the blocks' branches at the start, which are learned; by default there are none."""
    drop_path: float = option(0.0, least=0, most=1)
    """The probability that a block is left out, in the last block; earlier ones have less."""
    base_lr: float = 4e-3
    epochs: float = 20
    batch_size: int = 64
    warmup_epochs: float = 2
    weight_decay: float = 0.05
    clip: float = 5.0
    no_weight_decay: NoWeightDecay = "vectors"


SMALL = Config()
PAPER = Config(
    preset="paper", data="", image_size=224, model="B/16", init="beit", relative_bias=True, layer_scale=0.1,
    drop_path=0.1, base_lr=5e-5, epochs=800, batch_size=2048, warmup_epochs=10, lr_drops=(0.875,),
)  # fmt: skip
PRESETS = {"small": SMALL, "paper": PAPER}


def main(config: Config) -> list[dict[str, Any]]:
    accelerator = start_run(config)
    images = config.open()
    backbone = new_backbone(
        config, images, PRESETS[config.preset],
        init=config.init, layer_scale=config.layer_scale, drop_path=config.drop_path, seed=config.seed,
        **(SHARED_BIAS if config.relative_bias else {}),
    )  # fmt: skip
    objective = SimMIM(backbone, mask_ratio=config.mask_ratio, unit=config.unit, seed=config.seed)
    views = objective.default_views(config.image_size, images.channels)
    if preview(config, objective, images, views, accelerator):
        return []
    live = LiveReport(config, objective, images, views, accelerator)
    evaluations = pretrain(objective, images, views, config, accelerator, monitor_of(config, images, accelerator), live)
    finish(config, objective, images, views, evaluations, accelerator)
    return evaluations


if __name__ == "__main__":
    run_cli(main, PRESETS)
