"""data2vec for images (https://arxiv.org/abs/2202.03555).

    accelerate launch recipes/data2vec.py                                                  the built-in images
    accelerate launch recipes/data2vec.py --preset paper --data folder:/imagenet/train     the official settings

Those settings: ImageNet at 224 px, ViT-B/16, 300 epochs at batch 2048. AdamW, a rate of 5e-4 (6.25e-5 per 256 images of
a batch), 10 epochs of warm-up, then a cosine; weight decay .05, of all parameters; gradients clipped to a global norm
of 3; drop path .25, LayerScale 1e-4, a bias of attention by offset. There weights begin as normals that are not cut,
here cut at one deviation, and the patch projection begins by torch's rule, here as the rest; norms have an epsilon of
1e-5, here 1e-6; attention probabilities are dropped (.05), here not; crops also change colours, here they do not. Not
yet run.
The defaults, --preset small, are for thousands of images of 28 to 64 px, with a teacher that follows sooner. They have
not been tuned: the rate is I-JEPA's. On CIFAR-10 features are worse than a random start's (docs/results/cifar10.md).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslvit.cli import run_cli
from sslvit.config import PretrainConfig, option
from sslvit.evaluate.monitor import monitor_of
from sslvit.models.vit_config import SHARED_BIAS
from sslvit.objectives.data2vec import Data2Vec
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.training.optim import NoWeightDecay
from sslvit.weights.backbone import new_backbone


@dataclass(frozen=True)
class Config(PretrainConfig):
    """Pretrain a Vision Transformer by data2vec, and show what it learned."""

    preset: Literal["small", "paper"] = "small"
    """Sets the defaults of the other options."""
    out: Path = Path("runs/data2vec")
    average_layers: int = option(0, least=0)
    """How many of the teacher's last blocks the targets are the mean of. 0 takes half of them, as the paper."""
    mask_ratio: float = option(0.612, above=0, most=1)
    """The share of patches that is hidden, in blocks; often a little less."""
    momentum: tuple[float, float] = option((0.99, 0.999), least=0, most=1)
    """Of the teacher's average of weights, at the start and at the end."""
    init: Literal["timm", "jax", "beit"] = "jax"
    """The backbone's random weights: as timm draws them, the ViT paper's code, or BEiT's."""
    relative_bias: bool = False
    """No positions but a bias of attention by offset, the same in all blocks, as in BEiT."""
    layer_scale: float | None = None
    """Factors of the blocks' branches at the start, which are learned; by default there are none."""
    drop_path: float = option(0.0, least=0, most=1)
    """The probability that a block is left out, in the last block; earlier ones have less."""
    base_lr: float = 2e-3
    epochs: float = 20
    batch_size: int = 64
    warmup_epochs: float = 2
    weight_decay: float = 0.05
    clip: float = 3.0
    no_weight_decay: NoWeightDecay = "vectors"


SMALL = Config()
PAPER = Config(
    preset="paper", data="", image_size=224, model="B/16", init="beit", relative_bias=True, layer_scale=1e-4,
    drop_path=0.25, momentum=(0.999, 0.9998), base_lr=6.25e-5, epochs=300, batch_size=2048, warmup_epochs=10,
    no_weight_decay="nothing",
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
    objective = Data2Vec(
        backbone, average_layers=config.average_layers, mask_ratio=config.mask_ratio, momentum=config.momentum,
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
