"""What frozen features are worth, for every way to read them: nearest neighbours, few-shot, logistic regression.

    python recipes/probe.py --model runs/mpp/model --data shapes

Beside each number stands that of the same architecture at its random start. * marks the readout that the model's
objective declares. With the default limits the 20-nn and 10-shot numbers are those that the run logged of the same
weights, to the last digit; --json writes all digits. Features are kept in --cache, by hash of weights and data.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from sslvit.config import ImagesConfig
from sslvit.data.views import Plain
from sslvit.distributed import start
from sslvit.errors import at_the_door
from sslvit.evaluate.features import left_out
from sslvit.evaluate.fewshot import fewshot
from sslvit.evaluate.knn import knn
from sslvit.evaluate.logistic import logistic_accuracy
from sslvit.evaluate.monitor import draw_ids
from sslvit.evaluate.stored import stored
from sslvit.model_folder import described, load_backbone
from sslvit.vit import ViT


@dataclass(frozen=True)
class Config(ImagesConfig):
    """Probe a pretrained backbone by every readout, on labelled images with a train and a test split."""

    model: Path = Path("runs/mpp/model")
    """The model folder of a run, or the run's."""
    image_size: int = 0
    """0 takes the model's own."""
    blocks: int = 4
    """Also read the class tokens, and the mean patches, of the last so many blocks, joined; 1 does not."""
    k: int = 20
    temperature: float = 0.07
    shots: tuple[int, ...] = (1, 5, 10)
    """Labelled images a class."""
    draws: int = 3
    """Of the shots."""
    limit_train: int = 10_000
    """At most so many random training images; 0 takes all."""
    limit_test: int = 5_000
    cache: Path = Path("runs/features")
    json: Path | None = None
    """A file for the numbers."""
    threads: int = 0


def main() -> None:
    config = tyro.cli(Config)
    accelerator = start(threads=config.threads)
    pretrained, declared = load_backbone(config.model), described(config.model)["readout"]
    size = config.image_size or pretrained.image_size
    like = {"image_size": size, "channels": pretrained.channels}
    train = config.source(**like)
    test = config.source("test", classes=train.classes, **like)
    for source in (train, test):
        source.required_labels()
    ids = draw_ids(train, config.limit_train), draw_ids(test, config.limit_test)
    readouts, blocks = pretrained.readouts, min(config.blocks, getattr(pretrained, "depth", 1))
    if isinstance(pretrained, ViT) and blocks > 1:
        readouts += tuple(f"{readout}:{blocks}" for readout in pretrained.readouts)
    columns = [f"{config.k}-nn", *(f"{shots}-shot" for shots in config.shots), "logistic"]
    accelerator.print(f"{'accuracy, %':<26}" + "".join(f"{column:>9}{'':<6}" for column in columns))
    numbers: dict[str, dict[str, float]] = {}
    backbones = {"random start": type(pretrained)(**pretrained.config), "pretrained": pretrained}
    for name, backbone in backbones.items():
        backbone.to(accelerator.device)
        given = {"view": Plain(size), "accelerator": accelerator, "readouts": readouts}
        x, y = (stored(config.cache, backbone, s, ids=i, **given) for s, i in zip((train, test), ids, strict=True))
        for readout in readouts:
            four = x.by_readout[readout], x.labels, y.by_readout[readout], y.labels
            few = {f"{shots}-shot": fewshot(*four, shots=shots, draws=config.draws) for shots in config.shots}
            row = {columns[0]: knn(*four, k=config.k, temperature=config.temperature)}
            row |= {column: drawn.mean for column, drawn in few.items()} | {"logistic": logistic_accuracy(*four)}
            spread = {column: f" ± {100 * drawn.spread:3.1f}" for column, drawn in few.items()}
            cells = "".join(f"{100 * value:>9.1f}{spread.get(column, ''):<6}" for column, value in row.items())
            mark = " *" if readout == declared else ""
            accelerator.print(f"{f'{name}, {readout}{mark}':<26}{cells}")
            numbers |= {f"{name}/{readout}": row | {f"{c} spread": drawn.spread for c, drawn in few.items()}}
    accelerator.print(
        f"* the readout that the objective declares. {len(x.ids):,} training and {len(y.ids):,} test images of "
        f"{train.name}.\n{config.k}-nn: cosine, votes weighted by exp(similarity / {config.temperature:g}). "
        f"Shots: mean ± deviation of {config.draws} draws.\n"
        "logistic: C chosen on a held-out tenth of the training labels."
    )
    for sentence in filter(None, map(left_out, (x, y), (train, test))):
        accelerator.print(sentence)
    if config.json and accelerator.is_main_process:
        config.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    at_the_door(main)
