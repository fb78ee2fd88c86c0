"""Frozen features and their accuracies, for every way to read them: nearest neighbours, few-shot, logistic regression.

    python recipes/probe.py --model runs/mpp/model --data shapes

Beside each number stands that of the same architecture with random weights. * marks the readout that the model's
objective declares. With the default limits the 20-nn and 10-shot numbers are those that the run logged of the same
weights, to the last digit. In --out are all digits (numbers.json), each logistic regression's predictions by image, in
parquet files by readout and share of the labels, and confusion matrices with most labels as pictures. Features are kept
in --cache, by hash of weights and data. Test images with near-duplicates among those that the model was pretrained on
are counted, where these are known.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslvit.cli import run_cli
from sslvit.config import LabelledConfig, check_bounds, option
from sslvit.data.subset import saved_ids
from sslvit.evaluate.features import left_out
from sslvit.evaluate.labelled import open_labelled
from sslvit.evaluate.metrics import confusion
from sslvit.evaluate.monitor import draw_ids
from sslvit.evaluate.near_duplicates import near_duplicates_of_run
from sslvit.evaluate.predictions import save_predictions
from sslvit.evaluate.probe_table import lines_of, numbers_of, row_of
from sslvit.evaluate.probing import Probed, ProbeOptions, probed
from sslvit.evaluate.stored import stored
from sslvit.models.vit import ViT
from sslvit.processes.collectives import start
from sslvit.reports.figures import draw_confusion
from sslvit.storage import durable, sealed
from sslvit.views.batching import Size
from sslvit.weights.backbone import with_random_weights
from sslvit.weights.foreign.options import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig, ProbeOptions, LabelledConfig):
    """Probe a pretrained backbone by every readout, on labelled images."""

    out: Path = Path("runs/probe")
    """A folder for numbers, predictions and pictures; files of these names are replaced."""
    image_size: Size = 0
    """Side in pixels; 0 takes the model's own."""
    blocks: int = option(1, above=0)
    """Also read this many last blocks, joined; 1 does not. Of each the class token, or the mean patch."""
    random: bool = True
    """Show the same architecture with random weights as well."""
    declared: bool = False
    """Read only by the readout that the model's objective declares."""
    limit_train: int = option(10_000, least=0)
    """Use at most this many training images, drawn at random; 0 takes all."""
    limit_test: int = option(5_000, least=0)
    """The same for the test images."""
    seen: str = ""
    """The images that the model was pretrained on, in the form of --data; by default those that its run names."""
    cache: Path = Path("runs/features")
    """Where features are kept, by hash of weights and data."""
    threads: int = option(0, least=0)
    """CPU threads; 0 takes one per core."""


def main(config: Config) -> dict[str, dict[str, Any]]:
    check_bounds(config)
    if config.declared and config.blocks > 1:
        raise ValueError(f"--declared reads no joined blocks: leave out --blocks {config.blocks}")
    accelerator = start(threads=config.threads)
    pretrained, written = config.open()
    declared = written["readout"]
    size = config.image_size or pretrained.image_size
    train, test, note = open_labelled(config, size, pretrained.channels, about=written)
    ids = draw_ids(train, config.limit_train), draw_ids(test, config.limit_test)
    readouts = (declared,) if config.declared else pretrained.readouts
    if isinstance(pretrained, ViT) and config.blocks > 1:
        blocks = min(config.blocks, pretrained.depth)
        readouts += tuple(f"{readout}:{blocks}" for readout in pretrained.readouts if blocks > 1)
    view, numbers = config.eval_view(size), dict[str, dict[str, Any]]()
    backbones = {"random start": with_random_weights(pretrained)} if config.random else {}
    for name, backbone in (backbones | {"pretrained": pretrained}).items():
        backbone.to(accelerator.device)
        x = stored(config.cache, backbone, train, view, accelerator, ids=ids[0], readouts=readouts)
        y = stored(config.cache, backbone, test, view, accelerator, ids=ids[1], readouts=readouts)
        for readout in readouts:
            about = {"model": str(config.model), "start": name, "data": test.name, "protocol": "logistic regression"}
            one = probed(x, y._replace(ids=saved_ids(test, y.ids)), readout, config, about)
            if not numbers:
                accelerator.print(row_of("accuracy, %", one.numbers))
            numbers[f"{name}/{readout}"] = numbers_of(one, y.labels)
            for line in lines_of(f"{name}, {readout}", one, y.labels, mark=" *" if readout == declared else ""):
                accelerator.print(line)
            if accelerator.is_main_process:
                save(one, train.classes, config.out, f"{name.split()[0]}-{readout.replace(':', '-')}")
    accelerator.print(
        f"* the readout that the objective declares. {len(x.ids):,} training and {len(y.ids):,} test images of "
        f"{train.name}.\n{config.k}-nn: cosine, votes weighted by exp(similarity / {config.temperature:g}). "
        f"Shots: mean ± deviation of {config.draws} draws.\n"
        "linear: logistic regression on this share of the labels, C chosen on a held-out tenth of them."
    )
    for sentence in filter(None, (note, *map(left_out, (x, y), (train, test)))):
        accelerator.print(sentence)
    if accelerator.is_main_process:
        sealed.write(config.out / "numbers.json", numbers)
        sentence, leaks = near_duplicates_of_run(config.model, config.seen, test, ids[1])
        accelerator.print(sentence)
        if leaks:
            pairs = {"test ids": leaks.ids.tolist(), "seen ids": leaks.twins.tolist()}
            pairs |= {"similarity": leaks.similarity.tolist(), "looked at": leaks.total}
            durable.replace(config.out / "leaks.json", [json.dumps(pairs).encode()])
        accelerator.print(f"All digits, predictions and confusion matrices are in {config.out}")
    return numbers


def save(one: Probed, classes: tuple[str, ...] | None, out: Path, name: str) -> None:
    """The predictions by share of the labels, and the confusion matrix with most labels."""
    for fraction, predictions in one.predictions.items():
        save_predictions(out / f"{name}-{fraction:g}.parquet", predictions)
    if one.predictions:
        *_, most = one.predictions.values()
        draw_confusion(confusion(most.probabilities, most.labels), classes, out / f"{name}.png")


if __name__ == "__main__":
    run_cli(main, Config)
