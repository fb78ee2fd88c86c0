"""What a linear classifier, nearest neighbours and ten labelled images a class make of a frozen backbone's features.

    python recipes/linear_probe.py --model runs/mpp/model --data shapes --image_size 32

Each number stands beside that of the same architecture at its random start. The linear classifier is logistic
regression to its optimum on standardised features of the training images; its penalty is chosen on a held-out tenth of
their labels, never on the test set.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from torch import Tensor

from sslvit import rng
from sslvit.data.source import open_source
from sslvit.data.views import Plain
from sslvit.distributed import start
from sslvit.errors import at_the_door
from sslvit.evaluate.features import extract
from sslvit.evaluate.fewshot import fewshot
from sslvit.evaluate.knn import knn
from sslvit.evaluate.logistic import logistic_probe
from sslvit.evaluate.metrics import top
from sslvit.model_folder import load_backbone


@dataclass(frozen=True)
class Config:
    """Probe a pretrained backbone."""

    model: Path = Path("runs/mpp/model")
    """The model folder of a run."""
    data: str = "shapes"
    """Labelled images with a train and a test split."""
    image_size: int = 32
    shots: int = 10
    limit: int = 0
    """At most so many random training images; 0 takes all."""
    threads: int = 0


def linear(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    mean, deviation = train.mean(0), train.std(0) + 1e-5
    head = logistic_probe((train - mean) / deviation, labels, penalties=(0.001, 0.01, 0.1, 1.0))
    return top(head.probabilities((test - mean) / deviation), test_labels)


def main() -> None:
    config = tyro.cli(Config)
    accelerator = start(threads=config.threads)
    sources = [open_source(config.data, split=split, image_size=config.image_size) for split in ("train", "test")]
    for source in sources:
        if source.labels is None:
            raise ValueError(f"{source.name} has no labels to probe with")
    order = rng.permutation(rng.key(0, "probe"), len(sources[0])).numpy()
    chosen = [(sources[0], order[: config.limit or None]), (sources[1], None)]
    pretrained = load_backbone(config.model)
    backbones = {"random start": type(pretrained)(**pretrained.config), "pretrained": pretrained}
    accelerator.print(f"{'accuracy, %':<24}{'linear':>10}{f'{config.shots}-shot':>10}{'20-nn':>10}")
    for name, backbone in backbones.items():
        backbone.to(accelerator.device)
        train, test = (extract(backbone, s, Plain(config.image_size), accelerator, ids=i) for s, i in chosen)
        for readout in backbone.readouts:
            four = train.by_readout[readout], train.labels, test.by_readout[readout], test.labels
            numbers = linear(*four), fewshot(*four, shots=config.shots).mean, knn(*four)
            accelerator.print(f"{name + ', ' + readout:<24}" + "".join(f"{100 * number:>10.1f}" for number in numbers))


if __name__ == "__main__":
    at_the_door(main)
