"""What did pretraining buy? Every method on the same images, from the same starting weights, at the same cost.

    python recipes/compare.py                                                        the built-in images
    python recipes/compare.py --data folder:/my/images --image_size 224 --model S/16 --methods mpp mae moco_v3 dino \
        --seeds 3 --epochs 100

Each method is trained from the weights that scratch has, on as many images, or --budget operations or seconds, as the
first one. All are read by the same protocols: nearest neighbours, few-shot and linear on frozen features, and
fine-tuning, with 1 %, 10 % and all of the labels. An objective declares what is read of its model, class token or mean
patch; scratch is read in both ways, and each method is held against scratch that is read as the method is.

The report, with tables, curves and sentences about what the differences support, is in OUT/report.html and report.md,
its numbers in results.json. Stopped at any moment, the same command goes on; several machines can work in one OUT. A
method may carry flags of its recipe: mpp:target=pixels,corrupt=0.15.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import tyro

from sslvit.compare import Method, Part, check_settings, flags, names_of, reading, work_on
from sslvit.config import ImagesConfig
from sslvit.dry_run import MEASURED
from sslvit.errors import at_the_door
from sslvit.model_folder import save_backbone
from sslvit.results import OWN, SCRATCH, collect
from sslvit.results_page import as_markdown, as_page
from sslvit.vit import ViT

HERE = Path(__file__).parent
WORK = {"mpp": 1.0, "mae": 0.9, "supervised": 1.0, "moco_v3": 2.7, "dino": 5.0}  # about, of pretraining


@dataclass(frozen=True)
class Config(ImagesConfig):
    """Compare ways to pretrain, on labelled images with a train and a test split."""

    out: Path = Path("runs/compare")
    """A folder for everything. A comparison that is there goes on, if its settings are the same."""
    image_size: int = 32
    channels: Literal[1, 3] | None = None
    """Of image files: 1 reads them as grey; by default 3. Arrays have their own."""
    model: str = "XS/8"
    """Width by name, and patch size: XS, mu, Ti, S, M, B, L, H, ..."""
    methods: tuple[str, ...] = ("supervised", "mpp", "moco_v3")
    """Recipes, each with flags of its own if need be; scratch, the random start, is always there."""
    seeds: int = 1
    """How many, from 0."""
    epochs: float = 2
    """Passes over the images in pretraining, of the first method."""
    budget: Literal["images", "operations", "seconds"] = "images"
    """What the others get as much of: the images of these passes, or the operations or the seconds that the first
    method needs for them. Seconds are measured beforehand, one method at a time."""
    batch_size: int = 64
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the labels that are learned from."""
    finetune_steps: int = 100
    """Of fine-tuning, with each share of the labels; 0 leaves it out."""
    finetune_rates: tuple[float, ...] = (0.1,)
    """Fine-tuning's learning rate, the same for all; of several each method takes the best on held-out training labels,
    which takes that many trainings more."""
    finetune_everywhere: bool = True
    """Fine-tune on classes held out and on other sets too, not only on the classes that pretraining saw."""
    finetune_crop: float = 0.5
    """The smallest crop in fine-tuning, as a share of the image."""
    held_out: tuple[int, ...] = ()
    """Classes, by number, of which pretraining sees no image. What is learned afterwards are the classes that it saw
    and, apart from them, these."""
    transfer: tuple[str, ...] = ()
    """Other labelled sets, in the words of --data, that are learned afterwards."""
    limit_train: int = 0
    """At most so many images that frozen features are read on, and then shares of labels are of these; 0 takes all."""
    limit_test: int = 0
    jobs: int = 0
    """Parts at a time: by default one for each GPU, or for each core."""


@cache
def own(config: Config) -> tuple[str, ...]:
    """The words for the images that pretraining sees."""
    if not config.held_out:
        return reading(config)
    labels = set(config.source(channels=config.channels).required_labels().tolist())
    held, seen = set(config.held_out), sorted(labels - set(config.held_out))
    if held - labels or len(held) < 2 or len(seen) < 2:
        raise ValueError(
            f"--held_out {' '.join(map(str, config.held_out))} of the classes {' '.join(map(str, sorted(labels)))}: "
            "hold out two of them or more, and leave two or more"
        )
    return reading(config, only=seen)


def pretraining(config: Config, method: Method, start: Path, out: Path, epochs: float, seed: int) -> tuple[str, ...]:
    """The words of its recipe's command line."""
    words = (*own(config), *flags(threads=1, start=start, seed=seed, out=out))
    words += flags(channels=config.channels) if config.channels else ()
    long = flags(epochs=f"{epochs:g}", warmup_epochs=f"{epochs / 10:g}", evaluate_every=f"{epochs / 2:g}")
    return (*words, "--resume", "--preset", "small", *long, *flags(batch_size=config.batch_size), *method.words)


def passes(config: Config, start: Path, devices: int) -> dict[str, float]:
    """How long each method is trained, by the budget."""
    methods = [Method(text) for text in config.methods]
    if config.budget == "images":
        return {method.folder: config.epochs for method in methods}
    measures = []
    for method in methods:
        out = config.out / "measured" / method.folder
        words = (*pretraining(config, method, start, out, config.epochs, 0), "--dry_run")
        product = out.with_name(f"{out.name}-dry_run") / MEASURED
        measures.append(Part(f"measure/{method.folder}", method.recipe, words, product))
    work_on(measures, config.out, HERE, jobs=1, devices=devices)
    key = {"operations": "flops_per_image", "seconds": "seconds_per_image"}[config.budget]
    each = {m.folder: json.loads(part.product.read_text())[key] for m, part in zip(methods, measures, strict=True)}
    if None in each.values():
        raise ValueError(f"operations could not be counted: {each}. Take --budget images or seconds")
    return {name: config.epochs * each[methods[0].folder] / one for name, one in each.items()}


def plan(config: Config, starts: dict[str, Path], epochs: dict[str, float]) -> list[Part]:
    """Everything that is to be done."""
    parts: list[Part] = []
    for name, start in starts.items():
        parts += evaluations(config, name, start, ())
    for seed in range(config.seeds):
        for method in map(Method, config.methods):
            name, run = f"{method.folder}-{seed}", config.out / "runs" / f"{method.folder}-{seed}"
            start = starts[f"{SCRATCH['mean']}-{seed}"]
            words = pretraining(config, method, start, run, epochs[method.folder], seed)
            work = WORK.get(method.recipe, 1.0) * epochs[method.folder] / config.epochs
            parts.append(Part(f"pretrain/{name}", method.recipe, words, run / "report.md", work=work))
            parts += evaluations(config, name, run, (f"pretrain/{name}",))
    return parts


def places(config: Config) -> dict[str, tuple[str, ...]]:
    """What is learned afterwards, by name: the words for its images."""
    found = {OWN: own(config)}
    found |= {"classes held out": reading(config, only=config.held_out)} if config.held_out else {}
    sizes = flags(image_size=config.image_size)
    return found | {f"transfer {i}": (*flags(data=data), *sizes) for i, data in enumerate(config.transfer, 1)}


def evaluations(config: Config, name: str, model: Path, needs: tuple[str, ...]) -> list[Part]:
    """name: a method and a seed."""
    same, seed = flags(threads=1, model=model), name.rpartition("-")[2]
    limits = flags(limit_train=config.limit_train, limit_test=config.limit_test, fractions=config.fractions)
    parts = []
    for place, data in places(config).items():
        out = config.out / "probes" / name / place
        words = (*same, *data, *limits, "--no-random", "--declared", *flags(out=out, cache=config.out / "features"))
        parts.append(Part(f"probe/{name}/{place}", "probe", words, out / "numbers.json", needs, work=0.3))
        tuned = config.finetune_steps and (place == OWN or config.finetune_everywhere)
        for fraction in config.fractions if tuned else ():
            out = config.out / "finetuned" / name / place / f"{fraction:g}"
            words = (*same, *data, *flags(fraction=fraction, seed=seed, out=out), "--resume")
            words += flags(steps=config.finetune_steps, batch_size=config.batch_size, rates=config.finetune_rates)
            words += flags(smallest_crop=config.finetune_crop)
            part = f"finetune/{name}/{place}/{fraction:g}"
            parts.append(Part(part, "finetune", words, out / "test.json", needs, work=0.2 * len(config.finetune_rates)))
    return parts


def starts(config: Config) -> dict[str, Path]:
    """The weights that everything starts from, one set a seed, in a model to be read in each of the two ways."""
    channels = config.source(channels=config.channels).channels
    made = {}
    for seed in range(config.seeds):
        for readout, method in SCRATCH.items():
            made[f"{method}-{seed}"] = folder = config.out / "starts" / f"{method}-{seed}"
            if not folder.exists():
                sizes = {"image_size": config.image_size, "channels": channels}
                backbone = ViT.variant(config.model, **sizes, seed=seed, init="jax")
                save_backbone(backbone, folder, {"objective": "random start", "readout": readout, "data": "nothing"})
    return made


def main() -> None:
    config = tyro.cli(Config)
    methods = names_of(config.methods, HERE)
    own(config)
    settings = check_settings(
        config,
        config.out / "compare.json",
        free=("out", "jobs"),
        grows=("methods", "seeds"),
        appended=("transfer",),
    )
    models = starts(config)
    gpus = torch.cuda.device_count()
    parts = plan(config, models, passes(config, models[f"{SCRATCH['mean']}-0"], gpus))
    jobs = config.jobs or gpus or len(os.sched_getaffinity(0))
    work_on(parts, config.out, HERE, jobs=jobs, devices=gpus)
    models |= {f"{m}-{s}": config.out / "runs" / f"{m}-{s}" for m in methods for s in range(config.seeds)}
    results = {"data": config.data, "settings": settings}
    results |= collect(config.out, methods, list(range(config.seeds)), list(places(config)), models)
    runs = {name: models[f"{folder}-0"] for folder, name in methods.items()}
    (config.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (config.out / "report.html").write_text(as_page(results, runs, [part.command() for part in parts]))
    (config.out / "report.md").write_text(as_markdown(results))
    print(f"{as_markdown(results)}\nThe report is {config.out / 'report.html'}")


if __name__ == "__main__":
    at_the_door(main)
