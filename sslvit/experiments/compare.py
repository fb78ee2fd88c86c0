"""What a comparison consists of: what can be chosen, and the parts that this makes.

Pretraining, one part for each method and seed, and then of each model and of scratch the probes and the fine-tuning, in
every place where something is learned: on the classes that pretraining saw, on classes held out, on other sets. The
random starts are made here; with a budget of operations or seconds, a step of each method is measured first.
"""

from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from sslvit.config import ImagesConfig
from sslvit.experiments.disk import needed
from sslvit.experiments.jobs import Job, check_numbers, check_words, flags, made_again, reading, work_on
from sslvit.experiments.results import BASELINES, OWN, SCRATCH
from sslvit.models.vit import ViT
from sslvit.preflight.dry_run import MEASURED
from sslvit.storage import sealed
from sslvit.storage.sealed import NUMBER
from sslvit.views.batching import Size
from sslvit.weights.folder import WEIGHTS, save_backbone

NAMES = {"mpp": "MPP", "mae": "MAE", "moco_v3": "MoCo v3", "dino": "DINO"}  # of recipes, as papers spell them
WORK = {"mpp": 1.0, "mae": 0.9, "supervised": 1.0, "moco_v3": 2.7, "dino": 5.0}  # about, of pretraining
HELD_OUT = "classes held out"
GIVEN = (
    *(
        "out",
        "data",
        "only_classes",
        "images",
        "image_size",
        "model",
        "init_from",
        "seed",
        "epochs",
        "resume",
        "overwrite",
    ),
    *("dry_run", "show_views"),
)


@dataclass(frozen=True)
class Method:
    """E.g. mpp, or mpp:target=pixels,corrupt=0.15 with flags of its recipe."""

    text: str

    @property
    def recipe(self) -> str:
        return self.text.partition(":")[0]

    @property
    def words(self) -> tuple[str, ...]:
        given = filter(None, self.text.partition(":")[2].split(","))
        return tuple(
            word for pair in given for word in (f"--{pair.partition('=')[0]}", *pair.partition("=")[2].split())
        )

    @property
    def name(self) -> str:
        """For people: MPP (pixels, corrupt 0.15). Numbers need the name of their flag."""
        pairs = [pair.partition("=") for pair in self.text.partition(":")[2].split(",") if pair]
        values = [value if value[:1].isalpha() else f"{flag} {value}".strip() for flag, _, value in pairs]
        return NAMES.get(self.recipe, self.recipe) + (f" ({', '.join(values)})" if values else "")

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() or c in "._" else "-" for c in self.text)


def called(methods: tuple[str, ...]) -> dict[str, str]:
    """Names for people, by folder. Two that would be called alike are called by their text."""
    chosen = [Method(text) for text in methods]
    names = [method.name for method in chosen]
    return {m.folder: name if names.count(name) == 1 else m.text for m, name in zip(chosen, names, strict=True)}


def check_methods(methods: tuple[str, ...], recipes: Path) -> None:
    chosen = [Method(text) for text in methods]
    if not chosen or len({method.folder for method in chosen}) < len(chosen):
        raise ValueError(f"--methods {' '.join(methods)}: name one or more, and each once")
    if missing := [method for method in chosen if not (recipes / f"{method.recipe}.py").exists()]:
        raise ValueError(f"--methods {missing[0].text}: there is no recipe {recipes / missing[0].recipe}.py")


@dataclass(frozen=True)
class ComparisonConfig(ImagesConfig):
    """Compare ways to pretrain, on labelled images with a train and a test split."""

    out: Path = Path("runs/compare")
    """A folder for everything. A comparison that is there goes on, if its settings are the same."""
    image_size: Size = 32
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
    budget: Literal["images", "flops", "seconds"] = "images"
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


def check(config: ComparisonConfig, recipes: Path) -> None:
    """Tells what is wrong before anything is trained or written."""
    check_methods(config.methods, recipes)
    check_numbers(
        config, above="seeds epochs batch_size image_size", from_zero="limit_train limit_test finetune_steps jobs"
    )
    check_numbers(config, above="finetune_rates", shares="fractions finetune_crop")
    for method in map(Method, config.methods):
        said = f"--methods {method.text}"
        names = [word for word in method.words if word.startswith("--")]
        if taken := [name for name in names if name[2:].replace("-", "_").removeprefix("no_") in GIVEN]:
            raise ValueError(f"{said}: {taken[0]} is given to all alike by the comparison")
        words = pretraining(config, method, Path("start"), config.out, config.epochs, 0)
        check_words(recipes / f"{method.recipe}.py", words, said)
    if len({config.data, *config.transfer}) < 1 + len(config.transfer):
        raise ValueError(f"--transfer {' '.join(config.transfer)}: name each set once, and none that pretraining sees")
    ViT.variant(config.model, image_size=config.image_size)
    channels = config.source(channels=config.channels).channels
    for place in sets(config).values():
        check_set(place, config, channels)


def check_set(place: ImagesConfig, config: ComparisonConfig, channels: int) -> None:
    """Labelled, with a train and a test split, and images enough for the smallest share."""
    train = place.source(channels=channels)
    counts = np.bincount(train.required_labels())
    place.source("test", classes=train.classes, channels=channels).required_labels()
    most = counts.max() * min(1, config.limit_train / len(train) if config.limit_train else 1)
    few = [fraction for fraction in config.fractions if round(most * fraction) < 2]
    shares = " ".join(f"{fraction:g}" for fraction in few)
    text = f"of {train.name}, whose largest class has {most:.0f} images to learn from, --fractions {shares} leave"
    if len(few) == len(config.fractions):
        raise ValueError(f"{text} less than the two images of a class that a linear probe needs")
    if few:
        print(f"note: {text} one image of a class at most: no linear probe, and more is fine-tuned than they say")


@cache
def sets(config: ComparisonConfig) -> dict[str, ImagesConfig]:
    """What is learned, by name. Pretraining sees the first."""
    given = ImagesConfig(**{one.name: getattr(config, one.name) for one in fields(ImagesConfig)})
    found = {OWN: given}
    if config.held_out:
        labels = set(config.source(channels=config.channels).required_labels().tolist())
        held, seen = set(config.held_out), sorted(labels - set(config.held_out))
        said = f"--held_out {' '.join(map(str, config.held_out))}"
        if held - labels:
            raise ValueError(f"{said}: there are the classes {' '.join(map(str, sorted(labels)))}")
        if len(held) < 2 or len(seen) < 2:
            raise ValueError(f"{said} of {len(labels)} classes: hold out two of them or more, and leave two or more")
        found = {OWN: replace(given, only_classes=tuple(seen)), HELD_OUT: replace(given, only_classes=config.held_out)}
    others = [ImagesConfig(data, image_size=config.image_size, eval_crop=config.eval_crop) for data in config.transfer]
    return dict(zip(places(config), [*found.values(), *others], strict=True))


def places(config: ComparisonConfig) -> list[str]:
    """The names of what is learned."""
    transfers = [f"transfer {number}" for number, _ in enumerate(config.transfer, 1)]
    return [OWN, *([HELD_OUT] if config.held_out else []), *transfers]


def pretraining(
    config: ComparisonConfig, method: Method, start: Path, out: Path, epochs: float, seed: int
) -> tuple[str, ...]:
    """The words of its recipe's command line."""
    words = (*reading(sets(config)[OWN]), *flags(threads=1, init_from=start, seed=seed, out=out))
    words += flags(channels=config.channels) if config.channels else ()
    long = flags(epochs=f"{epochs:g}", warmup_epochs=f"{epochs / 10:g}", evaluate_every=f"{epochs / 2:g}")
    return (*words, "--resume", "--preset", "small", *long, *flags(batch_size=config.batch_size), *method.words)


def passes(config: ComparisonConfig, start: Path, recipes: Path, devices: int) -> dict[str, float]:
    """How long each method is trained, by the budget."""
    methods = [Method(text) for text in config.methods]
    if config.budget == "images":
        return {method.folder: config.epochs for method in methods}
    measures = []
    for method in methods:
        out = config.out / "measured" / method.folder
        words = (*pretraining(config, method, start, out, config.epochs, 0), "--dry_run")
        product = out.with_name(f"{out.name}-dry_run") / MEASURED
        measures.append(Job(f"measure/{method.folder}", method.recipe, words, product))
    work_on(measures, config.out, recipes, jobs=1, devices=devices)
    key = {"flops": "flops_per_image", "seconds": "seconds_per_image"}[config.budget]
    each = {m.folder: measured(part.product, key) for m, part in zip(methods, measures, strict=True)}
    counted = {name: one for name, one in each.items() if one is not None}
    if len(counted) < len(each):
        raise ValueError(f"operations could not be counted: {each}. Take --budget images or seconds")
    return {name: config.epochs * counted[methods[0].folder] / one for name, one in counted.items()}


def measured(file: Path, key: str) -> float | None:
    with made_again(file):
        found = sealed.read(file)
        sealed.check(found, **{key: NUMBER | None})
        return found[key]


def plan(config: ComparisonConfig, starts: dict[str, Path], epochs: dict[str, float]) -> list[Job]:
    """Everything that is to be done."""
    parts = [baseline(config, place, images) for place, images in sets(config).items()]
    for name, start in starts.items():
        parts += evaluations(config, name, start, ())
    for seed in range(config.seeds):
        for method in map(Method, config.methods):
            name, run = f"{method.folder}-{seed}", config.out / "runs" / f"{method.folder}-{seed}"
            start = starts[f"{SCRATCH['mean']}-{seed}"]
            words = pretraining(config, method, start, run, epochs[method.folder], seed)
            work = WORK.get(method.recipe, 1.0) * epochs[method.folder] / config.epochs
            parts.append(Job(f"pretrain/{name}", method.recipe, words, run / "report.md", work=work, run=run))
            parts += evaluations(config, name, run, (f"pretrain/{name}",))
    return parts


def limits(config: ComparisonConfig) -> tuple[str, ...]:
    """The words of what reads frozen features."""
    return flags(limit_train=config.limit_train, limit_test=config.limit_test, fractions=config.fractions)


def baseline(config: ComparisonConfig, place: str, images: ImagesConfig) -> Job:
    """What no model gives. Channels are those that the models see."""
    out, channels = config.out / BASELINES / place, config.source(channels=config.channels).channels
    words = (*reading(images), *flags(threads=1), *(flags(channels=channels) if channels in (1, 3) else ()))
    return Job(f"{BASELINES}/{place}", "baselines", (*words, *limits(config), *flags(out=out)), out / "numbers.json")


def evaluations(config: ComparisonConfig, name: str, model: Path, needs: tuple[str, ...]) -> list[Job]:
    """name: a method and a seed."""
    same, seed = flags(threads=1, model=model), name.rpartition("-")[2]
    parts = []
    for place, images in sets(config).items():
        data = reading(images)
        out = config.out / "probes" / name / place
        words = (
            *same,
            *data,
            *limits(config),
            "--no-random",
            "--declared",
            *flags(out=out, cache=config.out / "features"),
        )
        parts.append(Job(f"probe/{name}/{place}", "probe", words, out / "numbers.json", needs, work=0.3))
        tuned = config.finetune_steps and (place == OWN or config.finetune_everywhere)
        for fraction in config.fractions if tuned else ():
            out = config.out / "finetuned" / name / place / f"{fraction:g}"
            words = (*same, *data, *flags(fraction=fraction, seed=seed, out=out), "--resume")
            words += flags(steps=config.finetune_steps, batch_size=config.batch_size, rates=config.finetune_rates)
            words += flags(smallest_crop=config.finetune_crop)
            part = f"finetune/{name}/{place}/{fraction:g}"
            work = 0.2 * len(config.finetune_rates)
            parts.append(Job(part, "finetune", words, out / "test.json", needs, work=work, run=out))
    return parts


def room(config: ComparisonConfig, parts: list[Job], start: Path, jobs: int) -> int:
    """Bytes of disk that it still needs."""
    weights, width = (start / WEIGHTS).stat().st_size, ViT.variant(config.model, image_size=config.image_size).width
    channels, read, predicted = config.source(channels=config.channels).channels, 0, 0
    for place in sets(config).values():  # the largest of them
        train = place.source(channels=channels)
        test = place.source("test", classes=train.classes, channels=channels)
        seen = [min(len(s), most or len(s)) for s, most in ((train, config.limit_train), (test, config.limit_test))]
        row = 3 * 8 + 4 * (1 + int(train.required_labels().max()))  # of predictions
        read = max(read, 4 * width * sum(seen) + len(config.fractions) * seen[1] * row)
        predicted = max(predicted, len(test) * row)
    tries = len(config.finetune_rates) if len(config.finetune_rates) > 1 else 0
    return needed(parts, jobs, weights=weights, read=read, predicted=predicted, tries=tries)


def starts(config: ComparisonConfig) -> dict[str, Path]:
    """The weights that everything starts from, one set a seed, in a model to be read in each of the two ways."""
    channels = config.source(channels=config.channels).channels
    made = {}
    for seed in range(config.seeds):
        for readout, method in SCRATCH.items():
            made[f"{method}-{seed}"] = folder = config.out / "starts" / f"{method}-{seed}"
            if not folder.exists():
                size = config.image_size
                backbone = ViT.variant(config.model, image_size=size, channels=channels, seed=seed, init="jax")
                save_backbone(backbone, folder, {"objective": "random start", "readout": readout, "data": "nothing"})
    return made
