"""What frozen features are worth, for every way to read them: nearest neighbours, few-shot, logistic regression.

    python recipes/probe.py --model runs/mpp/model --data shapes

Beside each number stands that of the same architecture at its random start. * marks the readout that the model's
objective declares. With the default limits the 20-nn and 10-shot numbers are those that the run logged of the same
weights, to the last digit. In --out are all digits (numbers.json), each logistic regression's predictions by image, in
parquet files by readout and share of the labels, and confusion matrices with most labels as pictures. Features are kept
in --cache, by hash of weights and data. Test images with near-duplicates among those that the model was pretrained on
are counted, where these are known.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from sslvit.cli import parse, run_cli
from sslvit.config import ImagesConfig
from sslvit.evaluate.balance import balanced_accuracy, collapsed, unbalanced
from sslvit.evaluate.features import left_out
from sslvit.evaluate.metrics import confusion, metrics
from sslvit.evaluate.monitor import draw_ids
from sslvit.evaluate.near_duplicates import near_duplicates_of_run
from sslvit.evaluate.predictions import save_predictions
from sslvit.evaluate.probing import ProbeOptions, probed
from sslvit.evaluate.stored import stored
from sslvit.experiments.jobs import check_numbers
from sslvit.models.vit import ViT
from sslvit.processes.collectives import start
from sslvit.reports.figures import draw_confusion
from sslvit.storage import durable, sealed
from sslvit.views.batching import Size
from sslvit.weights.foreign.options import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig, ProbeOptions, ImagesConfig):
    """Probe a pretrained backbone by every readout, on labelled images with a train and a test split."""

    out: Path = Path("runs/probe")
    """A folder for numbers, predictions and pictures; files of these names are replaced."""
    image_size: Size = 0
    """0 takes the model's own."""
    blocks: int = 1
    """Also read the class tokens, and the mean patches, of the last so many blocks, joined; 1 does not."""
    random: bool = True
    """Show the same architecture at its random start as well."""
    declared: bool = False
    """Read by no other readout than that which the model's objective declares."""
    limit_train: int = 10_000
    """At most so many random training images; 0 takes all."""
    limit_test: int = 5_000
    seen: str = ""
    """The images that the model was pretrained on, in the words of --data; by default what its run says."""
    cache: Path = Path("runs/features")
    threads: int = 0


def main() -> None:
    config = parse(Config)
    check_numbers(config, above="k draws blocks", from_zero="limit_train limit_test threads")
    accelerator = start(threads=config.threads)
    pretrained, about = config.open()
    size = config.image_size or pretrained.image_size
    like = {"image_size": size, "channels": pretrained.channels}
    train = config.source(**like)
    test = config.source("test", classes=train.classes, **like)
    for source in (train, test):
        source.required_labels()
    ids = draw_ids(train, config.limit_train), draw_ids(test, config.limit_test)
    if config.declared and config.blocks > 1:
        raise ValueError(f"--declared reads no joined blocks: leave out --blocks {config.blocks}")
    readouts, blocks = pretrained.readouts, min(config.blocks, getattr(pretrained, "depth", 1))
    if config.declared:
        readouts = (about["readout"],)
    elif isinstance(pretrained, ViT) and blocks > 1:
        readouts += tuple(f"{readout}:{blocks}" for readout in pretrained.readouts)
    numbers: dict[str, dict[str, float]] = {}
    backbones = {"random start": type(pretrained)(pretrained.config)} if config.random else {}
    backbones |= {"pretrained": pretrained}
    for name, backbone in backbones.items():
        backbone.to(accelerator.device)
        given = {"view": config.eval_view(size), "accelerator": accelerator, "readouts": readouts}
        x, y = (stored(config.cache, backbone, s, ids=i, **given) for s, i in zip((train, test), ids, strict=True))
        for readout in readouts:
            told = {"model": str(config.model), "start": name, "data": test.name, "protocol": "logistic regression"}
            row, spread, found, answers = probed(x, y, readout, config, told)
            if not numbers:
                accelerator.print(f"{'accuracy, %':<26}" + "".join(f"{column:>13}" for column in row))
            cells = [f"{100 * v:.1f}" + (f" ± {100 * spread[c]:3.1f}" if c in spread else "") for c, v in row.items()]
            mark = " *" if readout == about["readout"] else ""
            accelerator.print(f"{f'{name}, {readout}{mark}':<26}" + "".join(f"{cell:>13}" for cell in cells))
            balanced = {column: balanced_accuracy(predicted, y.labels) for column, predicted in answers.items()}
            if unbalanced(y.labels):
                cells = [f"{100 * balanced[column]:.1f}" if column in balanced else "" for column in row]
                accelerator.print(f"{'  balanced accuracy':<26}" + "".join(f"{cell:>13}" for cell in cells))
            for column, predicted in answers.items():
                if sentence := collapsed(predicted, y.labels):
                    accelerator.print(f"warning: {name}, {readout}, {column}: {sentence}")
            numbers[f"{name}/{readout}"] = row | {f"{c} spread": v for c, v in spread.items()}
            numbers[f"{name}/{readout}"]["balanced accuracy"] = balanced
            if not found:
                continue
            *_, most = found.values()
            numbers[f"{name}/{readout}"] |= metrics(most.probabilities, most.labels)._asdict()
            if accelerator.is_main_process:
                file = f"{name.split()[0]}-{readout.replace(':', '-')}"
                for fraction, one in found.items():
                    save_predictions(config.out / f"{file}-{fraction:g}.parquet", one)
                counts = confusion(most.probabilities, most.labels)
                draw_confusion(counts, train.classes, config.out / f"{file}.png")
    accelerator.print(
        f"* the readout that the objective declares. {len(x.ids):,} training and {len(y.ids):,} test images of "
        f"{train.name}.\n{config.k}-nn: cosine, votes weighted by exp(similarity / {config.temperature:g}). "
        f"Shots: mean ± deviation of {config.draws} draws.\n"
        "linear: logistic regression on this share of the labels, C chosen on a held-out tenth of them."
    )
    for sentence in filter(None, map(left_out, (x, y), (train, test))):
        accelerator.print(sentence)
    if accelerator.is_main_process:
        sealed.write(config.out / "numbers.json", numbers)
        sentence, leaks = near_duplicates_of_run(config.model, config.seen, test, ids[1])
        accelerator.print(sentence)
        if leaks:
            rows = {"test ids": leaks.ids.tolist(), "seen ids": leaks.twins.tolist()}
            rows |= {"similarity": leaks.similarity.tolist(), "looked at": leaks.total}
            durable.replace(config.out / "leaks.json", [json.dumps(rows).encode()])
        accelerator.print(f"All digits, predictions and confusion matrices are in {config.out}")


if __name__ == "__main__":
    run_cli(main)
