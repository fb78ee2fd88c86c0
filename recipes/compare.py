"""What did pretraining buy? Every method on the same images, from the same starting weights, at the same cost.

    python recipes/compare.py                                                        the built-in images
    python recipes/compare.py --data folder:/my/images --image_size 224 --model S/16 --methods mpp mae moco_v3 dino \
        --seeds 3 --epochs 100

Each method is trained from the weights that scratch has, on as many images, or --budget operations or seconds, as the
first one. All are read by the same protocols: nearest neighbours, few-shot and linear on frozen features, and
fine-tuning, with 1 %, 10 % and all of the labels. The report, with tables, curves and sentences about what the
differences support, is in OUT/report.html and report.md, its numbers in results.json. Stopped at any moment, the same
command goes on; several machines can work in one OUT. A method may carry flags of its recipe:
mpp:target=pixels,corrupt=0.15.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from sslvit.compare import Method, Part, check_settings, flags, work_on
from sslvit.config import DataConfig
from sslvit.dry_run import MEASURED
from sslvit.errors import at_the_door
from sslvit.model_folder import save_backbone
from sslvit.results import SCRATCH, collect
from sslvit.results_page import as_markdown, as_page
from sslvit.vit import ViT

HERE = Path(__file__).parent
WORK = {"mpp": 1.0, "mae": 0.9, "supervised": 1.0, "moco_v3": 2.7, "dino": 5.0}  # about, of pretraining


@dataclass(frozen=True)
class Config(DataConfig):
    """Compare ways to pretrain, on labelled images with a train and a test split."""

    out: Path = Path("runs/compare")
    """A folder for everything. A comparison that is there goes on, if its settings are the same."""
    image_size: int = 32
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
    finetune_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Fine-tuning's learning rates, of which each method takes the best on held-out training labels."""
    finetune_crop: float = 0.5
    """The smallest crop in fine-tuning, as a share of the image."""
    held_out: tuple[int, ...] = ()
    """Classes, by number, of which pretraining sees no image. What is learned afterwards are the classes that it saw
    and, from frozen features, these alone."""
    transfer: tuple[str, ...] = ()
    """Other labelled sets, in the words of --data, that are learned from frozen features."""
    limit_train: int = 10_000
    """Images that frozen features are read on; 0 takes all."""
    limit_test: int = 5_000
    jobs: int = 0
    """Parts at a time: by default one for each GPU, or for each core."""


def own(config: Config) -> tuple[str, ...]:
    """The words for the images that pretraining sees."""
    words = flags(data=config.data)
    if not config.held_out:
        return words
    labels = set(config.source(channels=config.channels).required_labels().tolist())
    return (*words, *flags(only=sorted(labels - set(config.held_out))))


def pretraining(config: Config, method: Method, start: Path, out: Path, epochs: float, seed: int) -> tuple[str, ...]:
    """The words of its recipe's command line."""
    words = (*own(config), *flags(image_size=config.image_size, threads=1, start=start, seed=seed, out=out))
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


def plan(config: Config, starts: dict[int, Path], epochs: dict[str, float]) -> list[Part]:
    """Everything that is to be done."""
    parts: list[Part] = []
    for seed, start in starts.items():
        models = {SCRATCH: (start, ())}
        for method in map(Method, config.methods):
            run, name = config.out / "runs" / f"{method.folder}-{seed}", f"pretrain/{method.folder}-{seed}"
            words = pretraining(config, method, start, run, epochs[method.folder], seed)
            work = WORK.get(method.recipe, 1.0) * epochs[method.folder] / config.epochs
            parts.append(Part(name, method.recipe, words, run / "model" / "README.md", work=work))
            models[method.folder] = (run, (name,))
        for method, (model, needs) in models.items():
            parts += evaluations(config, method, seed, model, needs)
    return parts


def evaluations(config: Config, method: str, seed: int, model: Path, needs: tuple[str, ...]) -> list[Part]:
    same = flags(image_size=config.image_size, threads=1, model=model)
    limits = flags(limit_train=config.limit_train, limit_test=config.limit_test, fractions=config.fractions)
    sets = {"own": own(config)}
    sets |= {"classes held out": flags(data=config.data, only=config.held_out)} if config.held_out else {}
    sets |= {f"transfer {number}": flags(data=data) for number, data in enumerate(config.transfer, 1)}
    parts = []
    for name, data in sets.items():
        out = config.out / "probes" / f"{method}-{seed}" / name
        words = (*same, *data, *limits, "--no-random", "--declared", *flags(out=out, cache=config.out / "features"))
        parts.append(Part(f"probe/{method}-{seed}/{name}", "probe", words, out / "numbers.json", needs, work=0.3))
    for fraction in config.fractions if config.finetune_steps else ():
        name = f"finetune/{method}-{seed}/{fraction:g}"
        out = config.out / "finetuned" / f"{method}-{seed}" / f"{fraction:g}"
        words = (*same, *sets["own"], *flags(fraction=fraction, seed=seed, out=out), "--resume")
        words += flags(steps=config.finetune_steps, batch_size=config.batch_size, rates=config.finetune_rates)
        words += flags(smallest_crop=config.finetune_crop)
        parts.append(Part(name, "finetune", words, out / "test.json", needs, work=0.3))
    return parts


def starts(config: Config) -> dict[int, Path]:
    """The weights that everything starts from, one set a seed."""
    channels = config.source(channels=config.channels).channels
    made = {}
    for seed in range(config.seeds):
        made[seed] = config.out / "starts" / f"{seed}"
        if not made[seed].exists():
            backbone = ViT.variant(config.model, image_size=config.image_size, channels=channels, seed=seed, init="jax")
            save_backbone(backbone, made[seed], {"objective": "random start", "readout": "mean", "data": "nothing"})
    return made


def main() -> None:
    config = tyro.cli(Config)
    for method in map(Method, config.methods):
        if not (HERE / f"{method.recipe}.py").exists():
            raise ValueError(f"--methods {method.text}: there is no recipe {HERE / method.recipe}.py")
    if len(config.held_out) == 1:
        raise ValueError(f"--held_out {config.held_out[0]}: one class alone leaves nothing to tell apart; hold out two")
    settings = check_settings(
        config, config.out / "compare.json", free=("out", "jobs"), grows=("methods", "seeds", "transfer")
    )
    models = starts(config)
    gpus = torch.cuda.device_count()
    parts = plan(config, models, passes(config, models[0], gpus))
    jobs = config.jobs or gpus or len(os.sched_getaffinity(0))
    work_on(parts, config.out, HERE, jobs=jobs, devices=gpus)
    chosen = [Method(text) for text in config.methods]
    names = [method.name for method in chosen]
    methods = {m.folder: name if names.count(name) == 1 else m.text for m, name in zip(chosen, names, strict=True)}
    methods = {SCRATCH: SCRATCH} | methods
    folders = {f"{SCRATCH}-{seed}": start for seed, start in models.items()}
    folders |= {f"{m}-{s}": config.out / "runs" / f"{m}-{s}" for m in methods if m != SCRATCH for s in models}
    results = {"data": config.data, "settings": settings} | collect(config.out, methods, list(models), folders)
    runs = {name: config.out / "runs" / f"{folder}-0" for folder, name in methods.items() if name != SCRATCH}
    (config.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (config.out / "report.html").write_text(as_page(results, runs, [part.command() for part in parts]))
    (config.out / "report.md").write_text(as_markdown(results))
    print(f"{as_markdown(results)}\nThe report is {config.out / 'report.html'}")


if __name__ == "__main__":
    at_the_door(main)
