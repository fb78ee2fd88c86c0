"""How models hold up when test images change: corrupted, with patches missing or shuffled, with misleading colours.

    python recipes/robustness.py --model runs/supervised runs/mpp --data shapes
    python recipes/robustness.py --model runs/finetune --data folder:/my/labelled --limit_test 1000

A fine-tuned model answers by its own head; of any other, the readout that its objective declares is read by a probe,
fitted once on unchanged training images. Beside them stands the same architecture with random weights. All models see
the same changed images, so they compare image by image; the first is the one that the others are measured against. What
is done to the images, and where it comes from: sslvit/evaluate/robustness. In --out are report.html and numbers.json.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sslvit.cli import run_cli
from sslvit.config import LabelledConfig, check_bounds, option
from sslvit.errors import DataError
from sslvit.evaluate.labelled import open_labelled
from sslvit.evaluate.monitor import draw_ids
from sslvit.evaluate.robustness.assess import Model, assess, channels_of, image_size_of
from sslvit.evaluate.stored import stored
from sslvit.models.readout import Classifier
from sslvit.processes.collectives import start
from sslvit.processes.progress import progress_bar
from sslvit.reports import robustness as report
from sslvit.storage import durable, sealed
from sslvit.views.batching import Size, to_pair
from sslvit.weights.folder import load_classifier
from sslvit.weights.foreign.open import is_ours
from sslvit.weights.foreign.options import ModelConfig


@dataclass(frozen=True)
class Config(LabelledConfig):
    """Measure the robustness of one or more models, on labelled images."""

    model: tuple[Path, ...] = (Path("runs/mpp/model"),)
    """Runs, models or checkpoints, as of `probe`. The others are compared with the first."""
    names: tuple[str, ...] = ()
    """Their names in the report; by default those of their folders."""
    foreign: tuple[str, ...] = ()
    """Facts that other people's checkpoints lack, as of `probe`."""
    heads: bool = True
    """Let a fine-tuned model answer by its own head; otherwise a probe reads its features."""
    probe: Literal["logistic", "knn"] = "logistic"
    """What reads frozen features. Logistic regression, or 20 nearest neighbours."""
    random: bool = True
    """Show the same architecture with random weights as well."""
    grid: Size = 0
    """Patches in each direction of the grid that loses some; 0 takes the first ViT's. The paper has 14."""
    image_size: Size = 0
    """Side in pixels, the same for all models; 0 takes their own."""
    limit_train: int = option(10_000, least=0)
    """Fit probes to at most this many training images, drawn at random; 0 takes all."""
    limit_test: int = option(5_000, least=0)
    """Test on at most this many images, drawn at random; 0 takes all."""
    out: Path = Path("runs/robustness")
    """A folder for report.html and numbers.json; files of these names are replaced."""
    cache: Path = Path("runs/features")
    """Where features of training images are kept, by hash of weights and data."""
    threads: int = option(0, least=0)
    """CPU threads; 0 takes one per core."""


def names_of(config: Config) -> list[str]:
    """By default a run's folder, with as much of its path as tells it from the others."""
    paths = [Path(path) for path in config.model]
    paths = [path.parent if path.name == "model" else path for path in paths]
    names = list(config.names) or [path.name for path in paths]
    names = names if len(set(names)) == len(names) or config.names else [str(path) for path in paths]
    if len(names) != len(paths) or len(set(names)) < len(names):
        raise ValueError(f"--names {' '.join(names)}: give {len(paths)} different ones, one for each --model")
    return names


def opened(path: Path, config: Config) -> tuple[Model, dict[str, Any]]:
    foreign = () if os.path.exists(path) and is_ours(path) else config.foreign
    backbone, about = ModelConfig(path, foreign).open()
    answers = config.heads and "head.bias" in (about.get("head") or ())
    return (load_classifier(path.parent if path.is_file() else path) if answers else backbone, about["readout"]), about


def main(config: Config) -> dict[str, Any]:
    check_bounds(config)
    names, accelerator = names_of(config), start(threads=config.threads)
    found = [opened(Path(path), config) for path in config.model]
    models, about = {name: model for name, (model, _) in zip(names, found, strict=True)}, found[0][1]
    size = to_pair(config.image_size or image_size_of(models))
    train, test, note = open_labelled(replace(config, image_size=size), size, channels_of(models), about=about)
    for name, (model, _), classes in zip(names, models.values(), (one.get("classes") for _, one in found), strict=True):
        if isinstance(model, Classifier) and classes and train.classes and tuple(classes) != train.classes:
            raise DataError(f"the classes of the head of {name} are not those of {train.name}: give --no_heads")
    ids, view = draw_ids(test, config.limit_test), config.eval_view(size)

    def extract(backbone: Any, readout: str) -> Any:
        chosen = draw_ids(train, config.limit_train)
        return stored(config.cache, backbone, train, view, accelerator, ids=chosen, readouts=(readout,))

    with progress_bar(total=len(ids), desc="changed images", delay=3, disable=None) as bar:
        numbers = assess(
            models, test, ids, view, size, accelerator.device, extract,
            grid=to_pair(config.grid), probe=config.probe, random=config.random, tell=bar.update,
        )  # fmt: skip
    accelerator.print("\n".join(filter(None, [*report.lines_of(numbers), note])))
    if accelerator.is_main_process:
        durable.replace_text(config.out / "report.html", report.as_page(numbers))
        sealed.write(config.out / "numbers.json", numbers)
    accelerator.print(f"All numbers and the curves are in {config.out}")
    return numbers


if __name__ == "__main__":
    run_cli(main, Config)
