"""Continued pretraining: a model, ours or anybody's, on other images without labels.

    accelerate launch recipes/adapt.py --init_from runs/mpp/model --data folder:/my/images
    accelerate launch recipes/adapt.py --init_from dinov2_vits14_pretrain.pth --data folder:/my/images --image_size 224

Two stages. For --head_epochs the backbone stays as it is and the new heads learn; a head with random weights would
otherwise pull good features apart. Then the backbone's rate rises along a line to --backbone_lr of the heads', less
from each block to the one before it (--layer_decay).

After each --evaluate_every passes, and 100, 200, 400, ... steps after the backbone begins to learn, it is evaluated:
nearest neighbours and few-shot on the new images if they have labels and on a labelled set that it should not forget
(--keep_data); in any case how far its features have moved and in how many directions they differ. Then comes a verdict
in words. The best model is kept in OUT/best, and the run ends early when the model has collapsed or has forgotten more
than --most_forgotten.

The defaults are for 1,000 to 1,000,000 images and one device. Not from a paper; not yet run at scale.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from sslvit.cli import run_cli
from sslvit.config import EVALUATION, FREE, PretrainConfig, option
from sslvit.data.source import Source
from sslvit.errors import NoInput
from sslvit.evaluate.adaptation import Adaptation, is_early, kept_monitor
from sslvit.evaluate.monitor import monitor_of
from sslvit.models.partial import parse
from sslvit.models.vit import ViT
from sslvit.objectives.dino import DINO
from sslvit.objectives.dinov2 import DINOv2
from sslvit.objectives.ibot import IBOT
from sslvit.objectives.mae import MAE
from sslvit.objectives.moco_v3 import MoCoV3
from sslvit.objectives.mpp import MPP
from sslvit.objectives.objective import Objective
from sslvit.objectives.simmim import SimMIM
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.run import finish
from sslvit.train import pretrain
from sslvit.training.optim import NoWeightDecay
from sslvit.training.state import about_model
from sslvit.weights.foreign.open import as_it_is, fitted


@dataclass(frozen=True)
class Config(PretrainConfig):
    """Continue pretraining a Vision Transformer on your own unlabelled images."""

    preset: Literal["safe"] = "safe"
    """Sets the defaults of the other options."""
    out: Path = Path("runs/adapt")
    model: str = ""
    """Not an option here: the model is that of --init_from."""
    init_from: str = ""
    """The model to adapt; required. A run, a model, or a file of timm, transformers, DINOv2, DINOv3, MAE, ..."""
    image_size: int | tuple[int, int] = 0
    """Side in pixels; 0 takes the model's own. At another size positions are interpolated."""
    objective: Literal["dinov2", "dino", "ibot", "mae", "simmim", "mpp", "moco_v3"] = "dinov2"
    """What it is trained by."""
    keep_data: str = option("shapes", EVALUATION)
    """Labelled images that it should not forget. In the form of --data; empty for none."""
    most_forgotten: float = option(1.0, FREE, above=0, most=1)
    """End when the accuracy of nearest neighbours on --keep_data has fallen by more than this; 1 only reports it."""
    head_epochs: float = option(1, least=0)
    """Passes in which only the heads learn."""
    ramp_epochs: float = option(1, least=0)
    """Passes over which the backbone's learning rate rises after that."""
    backbone_lr: float = option(0.1, above=0)
    """The backbone's learning rate over the heads'."""
    train: str = "all"
    """all, norm, attention, last:N or lora:RANK. What is trained of the backbone."""
    base_lr: float = 5e-4
    final_lr: float = 1e-6
    epochs: float = 10
    batch_size: int = 64
    warmup_epochs: float = 0.5
    layer_decay: float = 0.8
    weight_decay: float = 0.04
    clip: float = 3.0
    no_weight_decay: NoWeightDecay = "vectors"
    evaluate_every: float = 1
    backbone_apart: ClassVar[bool] = True

    def backbone_rate(self, progress: float) -> float:
        passes = progress * self.epochs - self.head_epochs
        if passes < 0:
            return 0.0
        return self.backbone_lr * (min(passes / self.ramp_epochs, 1.0) if self.ramp_epochs else 1.0)

    def is_evaluated(self, step: int, steps: int, epoch_images: int) -> bool:
        learnt = step - math.ceil(self.head_epochs * epoch_images / self.batch_size)
        return (self.evaluate_every > 0 and is_early(learnt)) or super().is_evaluated(step, steps, epoch_images)

    def check(self) -> None:
        super().check()
        if self.head_epochs >= self.epochs:
            raise ValueError(
                f"--head_epochs {self.head_epochs:g} of --epochs {self.epochs:g}: the backbone would never learn; give "
                f"{self.epochs / 10:g} for a tenth"
            )


PRESETS = {"safe": Config()}
TEACHERS: dict[str, Callable[..., Objective]] = {"dinov2": DINOv2, "dino": DINO, "ibot": IBOT}


def main(config: Config) -> list[dict[str, Any]]:
    accelerator = start_run(config)
    if parse(config.train).kind == "head":
        raise ValueError("--train head would leave the model as it is: choose a part of the backbone")
    if not config.init_from:
        raise NoInput("--init_from is missing: the model to adapt, a folder or a file")
    if config.model:
        raise ValueError(f"--model {config.model}: adapt takes its model from --init_from, whatever its size")
    opened = as_it_is(config.init_from, leave_head=True)
    channels: Any = config.channels or (None if config.inflate else opened.channels)
    config = replace(config, image_size=config.image_size or opened.image_size, channels=channels)
    images = config.open()
    backbone = fitted(opened, config.init_from, config.image_size, images.channels, config.inflate)
    objective = objective_of(config, backbone)
    views = objective.default_views(config.image_size, images.channels)
    if preview(config, objective, images, views, accelerator):
        return []
    if not isinstance(images, Source):
        raise ValueError(f"--data {config.data}: adapt needs images that can be read by number, and no stream")
    watch = Adaptation(
        monitor_of(config, images, accelerator),
        kept_monitor(config.keep_data, config, backbone.channels, accelerator), images, config.image_size, accelerator,
        out=config.out, readout=objective.readout, view=config.eval_view(config.image_size),
        most_forgotten=config.most_forgotten,
        about=partial(about_model, objective, images),
    )  # fmt: skip
    live = LiveReport(config, objective, images, views, accelerator)
    evaluations = pretrain(objective, images, views, config, accelerator, watch, live)
    finish(config, objective, images, views, evaluations, accelerator)
    watch.conclude()
    return evaluations


def objective_of(config: Config, backbone: Any) -> Objective:
    if not isinstance(backbone, ViT):
        raise ValueError(f"--init_from {config.init_from} is a {backbone.name}, and adapt needs a ViT")
    if backbone.drop_path or backbone.dropout:  # of the training that it comes from
        state = backbone.state_dict()
        backbone = ViT(replace(backbone.config, drop_path=0.0, dropout=0.0))
        backbone.load_state_dict(state)
    objective = new_objective(config, backbone)
    objective.train_only(config.train, seed=config.seed)
    return objective


def new_objective(config: Config, backbone: ViT) -> Objective:
    """With heads of a size for one device: the papers' are for batches of thousands."""
    wanted, lacks = config.objective, ""
    if wanted in (*TEACHERS, "moco_v3") and "cls" not in backbone.readouts:
        lacks = "class token"
    if wanted == "mae" and backbone.position_at != "stem":
        lacks = "positions before the first block"
    if lacks:
        raise ValueError(
            f"--objective {wanted}: the model of --init_from {config.init_from} has no {lacks}, which it needs; simmim "
            "and mpp do without"
        )
    if wanted in TEACHERS:
        return TEACHERS[wanted](
            backbone, hidden=1024, bottleneck=256, outputs=4096, teacher_temperature=(0.04, 0.04), momentum=0.996,
            freeze_last_layer=0.0, norm_last_layer=True, drop_path=0.0,
            position_resize=backbone.config.position_resize, seed=config.seed,
        )  # fmt: skip
    if wanted == "mae":
        width = 32 * min(max(backbone.width // 32, 1), 8)  # no wider than the encoder, or it costs more
        return MAE(backbone, decoder_width=width, decoder_depth=2, decoder_heads=width // 32, seed=config.seed)
    if wanted == "mpp":
        return MPP(backbone, target="pixels" if backbone.channels > 3 else "mean", seed=config.seed)
    return SimMIM(backbone, seed=config.seed) if wanted == "simmim" else MoCoV3(backbone, seed=config.seed)


if __name__ == "__main__":
    run_cli(main, PRESETS)
