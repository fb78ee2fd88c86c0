"""Linear classifiers on a frozen backbone's features, by the papers' protocols.

    python recipes/linear_probe.py --model runs/mpp/model --data shapes
    python recipes/linear_probe.py --model runs/mpp/model --data shapes --protocol dinov2

Each number stands beside that of the same architecture with random weights; nearest neighbours, few-shot and shares of
the labels are probe.py's. By default the classifier is logistic regression to its optimum, on standardised features of
the training images. The papers' protocols have their numbers in sslvit/evaluate/protocols.py: moco_v3, dino_s, dino_b,
mae, dinov2, and grid, which is ours; they read what the paper reads, and the readout that the model declares. attentive
learns to gather the patches (sslvit/evaluate/attentive.py), which are all kept in memory. The papers' probes see
another crop of an image in every epoch; with --augmented 8 eight versions of each take turns, for eight times the
extraction and memory (resized by bicubic interpolation, as in MAE and DINOv2; in MoCo v3 and DINO it is bilinear).
Settings are chosen on a held-out tenth of the training labels, never on the test set; the head that is tested was then
trained on all of them.

In --out are all digits with what was chosen (numbers.json), each head's weights (safetensors, as torch's Linear) and
predictions by image (parquet), what was printed (log.txt) and the settings (config.json).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sslvit import rng
from sslvit.cli import run_cli
from sslvit.config import LabelledConfig, check_bounds, option
from sslvit.data.subset import saved_ids
from sslvit.evaluate.features import left_out
from sslvit.evaluate.heads import ProbeLog, run_probe
from sslvit.evaluate.labelled import open_labelled
from sslvit.evaluate.protocols import PROTOCOLS
from sslvit.evaluate.stored import stored
from sslvit.processes.collectives import start
from sslvit.runs.settings import configuration
from sslvit.views.batching import Size
from sslvit.views.pretraining import CropFlip
from sslvit.weights.backbone import with_random_weights
from sslvit.weights.foreign.options import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig, LabelledConfig):
    """Probe a pretrained backbone on labelled images."""

    out: Path = Path("runs/linear_probe")
    """A folder for numbers, heads, predictions and what was printed; files of these names are replaced."""
    image_size: Size = 0
    """Side in pixels; 0 takes the model's own."""
    protocol: Literal["logistic", "grid", "moco_v3", "dino_s", "dino_b", "mae", "dinov2", "attentive"] = "logistic"
    """Logistic regression, or a paper's protocol; grid is ours."""
    augmented: int = option(0, least=0)
    """Augmented versions of each image to learn from; 0 takes it as it is. They are cropped and flipped, and the heads
    of a protocol see them by turns."""
    smallest_crop: float = option(0.08, above=0, most=1)
    """The smallest share of an image in these versions; the papers' is 0.08, and small images need a larger one."""
    limit: int = option(0, least=0)
    """Use at most this many training images, drawn at random; 0 uses all."""
    cache: Path = Path("runs/features")
    """Where features are kept, by hash of weights and data."""
    threads: int = option(0, least=0)
    """CPU threads; 0 takes one per core."""


def main(config: Config) -> dict[str, dict[str, Any]]:
    check_bounds(config)
    if config.augmented and config.protocol not in PROTOCOLS:
        raise ValueError(f"--augmented {config.augmented} is for --protocol {', '.join(PROTOCOLS)}")
    accelerator = start(threads=config.threads)
    pretrained, written = config.open()
    size = config.image_size or pretrained.image_size
    train, test, note = open_labelled(config, size, pretrained.channels, about=written)
    ids = rng.permutation(rng.key(0, "probe"), len(train)).numpy()[: config.limit or None]
    if config.protocol in PROTOCOLS:
        readouts = tuple(dict.fromkeys((*PROTOCOLS[config.protocol].readouts, written["readout"])))
    else:
        readouts = ("patches",) if config.protocol == "attentive" else pretrained.readouts
    report = ProbeLog(config.out, configuration(config), accelerator)
    report.say(f"{'accuracy, %':<24}{'linear' if config.protocol == 'logistic' else config.protocol:>10}")
    view, crops = config.eval_view(size), CropFlip(size, scale=(config.smallest_crop, 1.0))
    for name, backbone in {"random start": with_random_weights(pretrained), "pretrained": pretrained}.items():
        backbone.to(accelerator.device)
        x = stored(config.cache, backbone, train, view, accelerator, ids=ids, readouts=readouts)
        y = stored(config.cache, backbone, test, view, accelerator, readouts=readouts)
        versions = [
            stored(config.cache, backbone, train, crops, accelerator, ids=ids, readouts=readouts, version=version)
            for version in range(config.augmented)
        ]
        for readout in readouts:
            augmented = torch.stack([one.by_readout[readout] for one in versions]) if versions else None
            head = run_probe(
                config.protocol, x.by_readout[readout], x.labels, y.by_readout[readout], augmented=augmented
            )
            about = {"model": str(config.model), "start": name, "data": test.name, "protocol": config.protocol}
            report.add(head, y._replace(ids=saved_ids(test, y.ids)), about | {"readout": readout})
    for sentence in filter(None, (note, *map(left_out, (x, y), (train, test)))):
        report.say(sentence)
    report.finish()
    return report.numbers


if __name__ == "__main__":
    run_cli(main, Config)
