"""A ViT trained to segment: all weights and a pyramid head, or a linear head alone; then mean IoU on the test images.

    accelerate launch recipes/segment.py --model runs/mpp/model --data shapes:scenes --image_size 64
    accelerate launch recipes/segment.py --preset linear --model FILE --data folder:/ADE20K --reduce_zero_label

Preset linear is the linear protocol of DINOv2 and DINOv3: batch norm and a linear layer on frozen patches, AdamW with a
rate of 1e-3 and a weight decay of 1e-4, batches of 16, 40,000 steps of which 1,500 warm up. Deviations: the rate falls
by a cosine, there linearly; other deviations of the view and the loss are in sslvit/views/segmentation.py and
sslvit/objectives/segmentation.py. Not run in full. Preset finetune is ours, for sets of thousands of images.

The test images are read once, at the end, by windows (probe_dense.py). The run's folder has the backbone in model/, the
head in head.safetensors, numbers in test.json, and predictions.png. An image or mask that cannot be read ends the run
with its name; --resume continues it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sslvit.cli import run_cli
from sslvit.config import TrainConfig, option
from sslvit.evaluate.dense.options import MaskedConfig
from sslvit.evaluate.dense.probe import HEADER, check_models, line_of, numbers_of
from sslvit.finetuning import in_epochs, prepare
from sslvit.models.partial import parse, train_only
from sslvit.objectives.segmentation import Segmentation
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.segmented import segmented
from sslvit.reports.tested import write_report
from sslvit.storage import durable, sealed
from sslvit.train import pretrain
from sslvit.views.segmentation import SegmentationView
from sslvit.weights.backbone import with_random_weights
from sslvit.weights.foreign.options import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig, TrainConfig, MaskedConfig):
    """Train a pretrained ViT to segment, on images with masks."""

    out: Path = Path("runs/segment")
    preset: Literal["finetune", "linear"] = "finetune"
    """Sets the defaults of the other options."""
    image_size: int = option(0, least=0)
    """Side of the crops, and of the windows of the test; 0 takes the model's own."""
    scratch: bool = False
    """Start with random weights instead. Of the same architecture."""
    train: str = "all"
    """all, head, norm, attention, last:N or lora:RANK: what is trained besides the head."""
    head: Literal["linear", "pyramid"] = "pyramid"
    """linear (batch norm and a linear layer), or pyramid (four blocks at four resolutions)."""
    blocks: int = option(1, above=0)
    """The linear head reads this many last blocks."""
    steps: int = option(2_000, least=0)
    """Length of the run, instead of epochs; 0 counts epochs."""
    drop_path: float = option(0.1, least=0, most=1)
    """The probability that a block is left out, in the last block; earlier ones have less."""
    scales: tuple[float, float] = option((0.5, 2.0), above=0)
    """Images are enlarged by a random factor before they are cropped: the smallest and the largest."""
    color: float = option(0.5, least=0, most=1)
    """The probability of each change of colour."""
    batch_size: int = 16
    lr: float = 5e-4
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    clip: float = 1.0


WARMUP = 1_500  # steps of the linear protocol
PRESETS = {
    "finetune": Config(),
    "linear": Config(
        preset="linear", train="head", head="linear", steps=40_000, lr=1e-3, weight_decay=1e-4, layer_decay=1.0,
        clip=0.0, drop_path=0.0,
    ),
}  # fmt: skip


def settled(config: Config) -> Config:
    """Without the preset's steps if there are --epochs; an error where both were chosen."""
    preset = PRESETS[config.preset]
    if config.steps and (config.epochs, config.warmup_epochs) != (preset.epochs, preset.warmup_epochs):
        if config.steps != preset.steps or config.epochs == preset.epochs:
            raise ValueError("--steps sets epochs and their warm-up itself: give --epochs, with --steps 0")
        return replace(config, steps=0)
    return config


def main(config: Config) -> dict[str, Any]:
    config = settled(config)
    parse(config.train)
    accelerator = start_run(config)
    backbone, _ = config.open()
    size = config.image_size or max(backbone.image_size)
    check_models({str(config.model): backbone}, size, config.blocks)
    train, test, note = config.open_images(size)
    if config.scratch:
        backbone = with_random_weights(backbone, seed=config.seed)
    backbone = prepare(backbone, size, drop_path=config.drop_path)
    train_only(backbone, config.train, seed=config.seed)
    classes = len(train.classes)
    objective = Segmentation(backbone, classes=classes, head=config.head, blocks=config.blocks, seed=config.seed)
    views = SegmentationView(size, config.scales, color=config.color)
    if config.steps:
        warmup = WARMUP if config.preset == "linear" else 500
        whole = len(train) - len(train) % config.batch_size  # an epoch's incomplete batch is left out
        config = replace(config, **in_epochs(config.steps, config.batch_size, whole or len(train), warmup))
    if preview(config, objective, train, views, accelerator):
        return {}
    if note:
        accelerator.print(note)
    pretrain(
        objective, train, views, config, accelerator, None, LiveReport(config, objective, train, views, accelerator)
    )
    if accelerator.is_main_process:
        durable.replace(config.out / "head.safetensors", durable.tensor_pieces(objective.head.state_dict()))
    counts = segmented(objective, test, size, accelerator.device, config.out / "predictions.png", config.workers)
    accelerator.print(f"{HEADER}\n{line_of('test', counts)}")
    numbers = numbers_of({"test": counts}, train.classes, "test")["test"] | {"scratch": config.scratch}
    if accelerator.is_main_process:
        sealed.write(config.out / "test.json", numbers)
        durable.replace(config.out / "counts.safetensors", durable.tensor_pieces(counts._asdict()))
        write_report(config.out)
    accelerator.print(f"Numbers, predictions.png and the head are in {config.out}")
    return numbers


if __name__ == "__main__":
    run_cli(main, PRESETS)
