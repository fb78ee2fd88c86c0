"""Frozen patch features and the classes of pixels: nearest neighbours and logistic regression, by mean IoU.

    python recipes/probe_dense.py --model runs/mpp/model --data shapes:scenes --image_size 64
    python recipes/probe_dense.py --model FILE --data folder:/ADEChallengeData2016 --reduce_zero_label --image_size 224

Beside each number stand that of the same architecture with random weights, that of raw pixels, and that of the most
frequent class. Intervals are over test images; --beside compares further models on the same ones. Scores are at the
stride of the patches, enlarged bilinearly to the mask. In --out are all digits (numbers.json), counts by image in a
file for each row, and some predictions as a picture. The linear protocol of DINOv2 and DINOv3, a head trained on random
crops, is `sslvit segment --preset linear`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from sslvit.cli import run_cli
from sslvit.config import check_bounds, option
from sslvit.evaluate.dense.options import DenseOptions, MaskedConfig
from sslvit.evaluate.dense.probe import HEADER, check_models, gaps, line_of, numbers_of, probed
from sslvit.evaluate.dense.probes import Answers
from sslvit.evaluate.dense.scores import PixelCounts
from sslvit.evaluate.dense.windows import RawPixels
from sslvit.processes.collectives import start
from sslvit.reports.segmented import draw_predictions
from sslvit.storage import durable, sealed
from sslvit.weights.backbone import with_random_weights
from sslvit.weights.foreign.open import open_backbone
from sslvit.weights.foreign.options import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig, DenseOptions, MaskedConfig):
    """Probe the patch features of a pretrained backbone, on images with masks."""

    out: Path = Path("runs/probe-dense")
    """A folder for numbers and pictures; files of these names are replaced."""
    beside: tuple[Path, ...] = ()
    """Further models to compare it with, on the same test images."""
    random: bool = True
    """Show random weights, raw pixels and the most frequent class as well."""
    threads: int = option(0, least=0)
    """CPU threads; 0 takes one per core."""


def main(config: Config) -> dict[str, dict[str, Any]]:
    check_bounds(config)
    accelerator = start(threads=config.threads)
    if accelerator.num_processes > 1:
        raise ValueError(f"{accelerator.num_processes} processes: the dense probe runs in one, without a launcher")
    pretrained = config.open()[0]
    models: dict[str, nn.Module] = {"pretrained": pretrained}
    models |= {str(path): open_backbone(path)[0] for path in config.beside}
    config = replace(config, image_size=config.image_size or max(pretrained.image_size))
    check_models(models, config.image_size, config.blocks)
    train, test, note = config.open_images(config.image_size)
    if config.random:
        models |= {"random start": with_random_weights(pretrained), "raw pixels": RawPixels(pretrained.patch_size)}

    def watch(name: str, answers: Answers) -> Answers:
        if name != "pretrained":
            return answers
        return draw_predictions(answers, config.heads[-1], len(train.classes), config.out / "predictions.png")

    accelerator.print(f"{train.name}, test images: {test.name}; {len(train.classes)} classes\n{HEADER}")
    counts: dict[str, PixelCounts] = {}
    for row, one in probed(models, train, test, config, accelerator.device, config.out, watch=watch):
        counts[row] = one
        accelerator.print(line_of(row, one))
        name = row.replace(", ", "-").replace(" ", "-").replace("/", "-")
        durable.replace(config.out / f"{name}.safetensors", durable.tensor_pieces(one._asdict()))
    for row, gap in gaps(counts, "pretrained").items():
        accelerator.print(f"pretrained minus {row}: {gap.points}")
    if note:
        accelerator.print(note)
    numbers = numbers_of(counts, train.classes, "pretrained")
    sealed.write(config.out / "numbers.json", numbers)
    accelerator.print(f"All digits, IoU by class, counts by image and predictions.png are in {config.out}")
    return numbers


if __name__ == "__main__":
    run_cli(main, Config)
