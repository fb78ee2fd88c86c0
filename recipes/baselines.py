"""Accuracies without a model: always the commonest class of the training labels; raw pixels by probe.py's protocols.

    python recipes/baselines.py --data shapes --image_size 32

compare.py and study.py run this for their tables. Raw pixels are the images as an evaluation sees them, flattened, and
reduced to at most 32 x 32. In --out are all digits (numbers.json), and the predictions of each logistic regression.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslvit.cli import run_cli
from sslvit.config import DataConfig, check_bounds, option
from sslvit.data.subset import saved_ids
from sslvit.errors import DataError
from sslvit.evaluate.balance import balanced_accuracy
from sslvit.evaluate.baselines import COMMONEST, PIXELS, READOUT, baselines
from sslvit.evaluate.monitor import draw_ids, monitor_of
from sslvit.evaluate.predictions import save_predictions
from sslvit.evaluate.probing import ProbeOptions, probed
from sslvit.processes.collectives import start
from sslvit.storage import sealed


@dataclass(frozen=True)
class Config(ProbeOptions, DataConfig):
    """Read raw pixels, on labelled images; without a test split a tenth of the training images is held out."""

    out: Path = Path("runs/baselines")
    """A folder for numbers and predictions; files of these names are replaced."""
    limit_train: int = option(10_000, least=0)
    """Use at most this many training images, drawn at random; 0 uses all."""
    limit_test: int = option(5_000, least=0)
    """The same for the test images."""
    threads: int = option(0, least=0)
    """CPU threads; 0 takes one per core."""


def main(config: Config) -> None:
    check_bounds(config)
    accelerator = start(threads=config.threads)
    train = config.open()
    monitor = monitor_of(config, train, accelerator)
    if not monitor:
        raise DataError(f"--data {config.data}: there is nothing to evaluate on")
    train, test = monitor.sources
    ids = draw_ids(train, config.limit_train), draw_ids(test, config.limit_test)
    baseline = baselines(train, test, ids, monitor.view, accelerator)
    about = {"model": PIXELS, "data": test.name, "protocol": "logistic regression"}
    scored = baseline.test._replace(ids=saved_ids(test, baseline.test.ids))
    pixels = probed(baseline.train, scored, READOUT, config, about)
    for name, value in {COMMONEST: baseline.commonest, **pixels.numbers}.items():
        accelerator.print(f"{name:<20}{100 * value:>8.1f}")
    accelerator.print(
        f"accuracy, %; all but the first of raw pixels, {baseline.side} x {baseline.side}. "
        f"{len(baseline.train.ids):,} training and {len(baseline.test.ids):,} test images of {train.name}."
    )
    if accelerator.is_main_process:
        for fraction, predictions in pixels.predictions.items():
            save_predictions(config.out / f"pixels-{fraction:g}.parquet", predictions)
        numbers: dict[str, Any] = {"side": baseline.side, COMMONEST: baseline.commonest}
        numbers |= {f"{COMMONEST} of all": baseline.commonest_of_all}
        balanced = {name: balanced_accuracy(one, baseline.test.labels) for name, one in pixels.answers.items()}
        numbers |= {PIXELS: pixels.numbers | {"balanced accuracy": balanced}}
        sealed.write(config.out / "numbers.json", numbers)


if __name__ == "__main__":
    run_cli(main, Config)
