"""What a linear classifier, nearest neighbours and ten labelled images a class make of a frozen backbone's features.

    python recipes/linear_probe.py --model runs/mpp/model --data shapes
    python recipes/linear_probe.py --model runs/mpp/model --data shapes --protocol dinov2

Each number stands beside that of the same architecture at its random start. By default the linear classifier is
logistic regression to its optimum on standardised features of the training images. The protocols of the papers go by
name, with the numbers in sslvit/evaluate/protocols.py: moco_v3, dino_s, dino_b, mae, dinov2, and grid, which is ours;
they read what the paper reads, and the readout that the model declares. attentive learns to gather the patches
(sslvit/evaluate/attentive.py), which are all kept in memory. The papers' probes see another crop of an image in every
epoch; with --augmented 8 eight versions of each take turns, for eight times the extraction and memory (resized by
bicubic interpolation, as in MAE and DINOv2; in MoCo v3 and DINO it is bilinear). Whatever is chosen is chosen on a
held-out tenth of the training labels, never on the test set; what is then tested was trained on all of them.

In --out are all digits with what was chosen (numbers.json), each head's weights (safetensors, as torch's Linear) and
predictions by image (parquet), what was printed (log.txt) and the settings (config.json).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sslvit import rng
from sslvit.cli import parse, run_cli
from sslvit.config import ImagesConfig, configuration
from sslvit.evaluate.features import left_out
from sslvit.evaluate.fewshot import fewshot
from sslvit.evaluate.heads import ProbeLog, run_probe
from sslvit.evaluate.knn import knn
from sslvit.evaluate.protocols import PROTOCOLS
from sslvit.evaluate.stored import stored
from sslvit.experiments.jobs import check_numbers
from sslvit.processes.collectives import start
from sslvit.views.batching import Size
from sslvit.views.pretraining import CropFlip
from sslvit.weights.foreign.options import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig, ImagesConfig):
    """Probe a pretrained backbone, on labelled images with a train and a test split."""

    out: Path = Path("runs/linear_probe")
    """A folder for numbers, heads, predictions and what was printed; files of these names are replaced."""
    image_size: Size = 0
    """0 takes the model's own."""
    protocol: Literal["logistic", "grid", "moco_v3", "dino_s", "dino_b", "mae", "dinov2", "attentive"] = "logistic"
    shots: int = 10
    augmented: int = 0
    """Versions of each training image, cropped and flipped, that the heads of a protocol learn from by turns; 0: the
    image as it is."""
    smallest_crop: float = 0.08
    """Of these versions, as a share of the image; the papers' is 0.08, and small images want a larger one."""
    limit: int = 0
    """At most so many random training images; 0 takes all."""
    cache: Path = Path("runs/features")
    """Where features are kept, by hash of weights and data."""
    threads: int = 0


def main() -> None:
    config = parse(Config)
    check_numbers(config, above="shots", from_zero="augmented limit threads")
    if config.augmented and config.protocol not in PROTOCOLS:
        raise ValueError(f"--augmented {config.augmented} is for --protocol {', '.join(PROTOCOLS)}")
    accelerator = start(threads=config.threads)
    pretrained, about = config.open()
    declared = about["readout"]
    size = config.image_size or pretrained.image_size
    like = {"image_size": size, "channels": pretrained.channels}
    sources = [config.source(**like)]
    sources.append(config.source("test", classes=sources[0].classes, **like))
    for source in sources:
        source.required_labels()
    order = rng.permutation(rng.key(0, "probe"), len(sources[0])).numpy()
    chosen = [(sources[0], order[: config.limit or None]), (sources[1], None)]
    backbones = {"random start": type(pretrained)(pretrained.config), "pretrained": pretrained}
    readouts = {"logistic": pretrained.readouts, "attentive": ("patches",)}
    readouts |= {name: tuple(dict.fromkeys((*known.readouts, declared))) for name, known in PROTOCOLS.items()}
    readouts, plain = readouts[config.protocol], config.protocol == "logistic"
    report = ProbeLog(config.out, configuration(config), accelerator)
    few = [f"{config.shots}-shot", "20-nn"] if plain else []
    title = "linear" if plain else config.protocol
    report.say(f"{'accuracy, %':<24}" + "".join(f"{column:>10}" for column in (title, *few)))
    for name, backbone in backbones.items():
        backbone.to(accelerator.device)
        given = {"view": config.eval_view(size), "accelerator": accelerator, "readouts": readouts}
        train, test = (stored(config.cache, backbone, s, ids=i, **given) for s, i in chosen)
        given["view"] = CropFlip(size, scale=(config.smallest_crop, 1.0))
        versions = [
            stored(config.cache, backbone, sources[0], ids=chosen[0][1], version=version, **given)
            for version in range(config.augmented)
        ]
        for readout in readouts:
            four = train.by_readout[readout], train.labels, test.by_readout[readout], test.labels
            augmented = torch.stack([one.by_readout[readout] for one in versions]) if versions else None
            head = run_probe(config.protocol, *four[:3], augmented=augmented)
            others = {}
            if plain:
                others = {few[0]: fewshot(*four, shots=config.shots).mean, few[1]: knn(*four)}
            told = {"model": str(config.model), "start": name, "data": sources[1].name, "protocol": config.protocol}
            report.add(head, test, others, told | {"readout": readout})
    for sentence in filter(None, map(left_out, (train, test), sources)):
        report.say(sentence)
    report.finish()


if __name__ == "__main__":
    run_cli(main)
