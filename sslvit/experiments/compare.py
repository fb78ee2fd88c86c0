"""A comparison: its settings, and the jobs that they make.

Pretraining, one job per method and seed, and then of each model and of scratch the probes and the fine-tuning, on every
set of labels: the classes that pretraining saw, held-out classes, other datasets. The random weights are made here;
with a budget of FLOPs or seconds, a step of each method is measured first.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sslvit.config import ImagesConfig, LabelledConfig, check_bounds, option
from sslvit.errors import NoInput
from sslvit.evaluate.labelled import open_labelled
from sslvit.experiments.disk import needed
from sslvit.experiments.jobs import Job, check_words, flags, is_recipe, made_again, reading, recipes
from sslvit.experiments.results import BASELINES, OWN, ROBUSTNESS, SCRATCH, scratch
from sslvit.experiments.work import work_on
from sslvit.finetuning import ENOUGH
from sslvit.models.vit import ViT
from sslvit.objectives import OBJECTIVES
from sslvit.reports.dry_run import MEASURED
from sslvit.runs.settings import RENAMED
from sslvit.storage import sealed
from sslvit.storage.sealed import NUMBER
from sslvit.views.batching import Size
from sslvit.weights.folder import WEIGHTS, save_backbone

CHANGED = 1000  # test images that are changed in each of a hundred ways, unless --limit_test says how many
HELD_OUT, TRANSFER = "classes held out", "transfer "
INIT, INITS = "init", ("jax", "timm")  # a method's random weights
SAME_FOR_ALL = (
    "out", "data", "only_classes", "images", "image_size", "model", "init_from", "seed", "epochs", "resume",
    "overwrite", "dry_run", "show_views",
)  # fmt: skip
OF_COMPARISON = (  # of fine-tuning's options
    "out", "data", "test_data", "only_classes", "image_size", "model", "seed", "fraction", "shots", "steps", "epochs",
    "warmup_epochs", "rates", "lr", "base_lr", "folds", "choice_steps", "curve", "scratch", "resume", "overwrite",
    "dry_run", "show_views",
)  # fmt: skip


def plain(flag: str) -> str:
    """The name of its option."""
    name = flag.replace("-", "_").removeprefix("no_")
    return RENAMED.get(name, name)


def in_full(options: list[tuple[str, str]]) -> tuple[str, ...]:
    """As words of a command line."""
    return tuple(word for flag, value in options for word in (f"--{flag}", *value.split()))


def pairs_of(texts: tuple[str, ...]) -> list[tuple[str, str]]:
    """Flags and values of flag=value, or flag alone."""
    return [(flag, value) for flag, _, value in (text.partition("=") for text in texts if text)]


@dataclass(frozen=True)
class Method:
    """E.g. mpp, or mpp:target=pixels,corrupt=0.15 with flags of its recipe; init=timm is the comparison's own."""

    text: str

    @property
    def recipe(self) -> str:
        return self.text.partition(":")[0]

    @property
    def options(self) -> list[tuple[str, str]]:
        """The flags, and their values as text."""
        return pairs_of(tuple(self.text.partition(":")[2].split(",")))

    @property
    def init(self) -> str:
        """Which of the random weights of ViT.variant it starts with."""
        return dict(self.options).get(INIT, INITS[0])

    @property
    def words(self) -> tuple[str, ...]:
        return in_full([(flag, value) for flag, value in self.options if flag != INIT])

    @property
    def name(self) -> str:
        """For people: MPP (pixels, corrupt 0.15). Numbers need the name of their flag."""
        values = [value if value[:1].isalpha() else f"{flag} {value}".strip() for flag, value in self.options]
        title = OBJECTIVES[self.recipe].title if self.recipe in OBJECTIVES else self.recipe
        return title + (f" ({', '.join(values)})" if values else "")

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() or c in "._" else "-" for c in self.text)


def names_of(methods: tuple[str, ...]) -> dict[str, str]:
    """Names for people, by folder: the text of each of two that would have the same."""
    chosen = [Method(text) for text in methods]
    names = [method.name for method in chosen]
    return {m.folder: name if names.count(name) == 1 else m.text for m, name in zip(chosen, names, strict=True)}


def check_methods(methods: tuple[str, ...]) -> None:
    chosen = [Method(text) for text in methods]
    if not chosen or len({method.folder for method in chosen}) < len(chosen):
        raise ValueError(f"--methods {' '.join(methods)}: name one or more, and each once")
    if missing := [method.text for method in chosen if not is_recipe(method.recipe)]:
        how = f"choose one of {', '.join(recipes())}; options follow a colon, as in mpp:target=pixels"
        raise ValueError(f"--methods {missing[0]}: there is no such recipe; {how}")


@dataclass(frozen=True)
class ComparisonConfig(ImagesConfig):
    """Compare ways to pretrain, on labelled images with a train and a test split."""

    out: Path = Path("runs/compare")
    """A folder for everything. A comparison that is there continues, if its settings are the same."""
    image_size: Size = 32
    channels: Literal[1, 3] | None = None
    """Image files: 1 reads them as grey; by default 3. Arrays have their own."""
    model: str = "XS/8"
    """Width and patch size: XS/4, S/16, B/16, ... Widths are XS, mu, Ti, S, M, B, L, H and others."""
    methods: tuple[str, ...] = ("supervised", "mpp")
    """Recipes, each with options of its own if need be, as in mpp:target=pixels,lr=1e-3. Scratch, with random weights,
    is always there."""
    seeds: int = option(1, above=0)
    """Number of seeds, from 0."""
    epochs: float = option(2, above=0)
    """Passes over the images, of the first method. Of pretraining; the others have the same budget."""
    budget: Literal["images", "flops", "seconds"] = "images"
    """What is the same for all methods. The images of these passes, or the FLOPs or the seconds that the first method
    needs for them. Seconds are measured beforehand, one method at a time."""
    batch_size: int = option(64, above=0)
    """Images per step, in pretraining and in fine-tuning."""
    fractions: tuple[float, ...] = option((0.01, 0.1, 1.0), above=0, most=1)
    """Shares of the labels that linear probes learn from."""
    finetune_fractions: tuple[float, ...] = option((0.01,), above=0, most=1)
    """Shares of the labels to fine-tune with."""
    finetune_steps: tuple[int, ...] = (300,)
    """Steps of fine-tuning, or one number for each of these shares; 0 leaves it out. Take so many that scratch gains
    little by more."""
    finetune_rates: tuple[float, ...] = option((0.03, 0.1), above=0)
    """Fine-tuning's learning rates, the same for all; of several each method takes the best on held-out training
    labels, for each share of the labels."""
    choice_steps: float = option(0.15, above=0, most=1)
    """The length of the runs that choose the rate, as a share of the final one's."""
    finetune_flags: tuple[str, ...] = ()
    """More flags of fine-tuning, the same for all, e.g. randaugment mixup=0.8."""
    scratch_flags: tuple[str, ...] = ()
    """The same for scratch alone: what makes it as strong as it can be."""
    finetune_everywhere: bool = True
    """Fine-tune on held-out classes and on other datasets too, not only on the classes that pretraining saw."""
    finetune_crop: float = option(0.5, above=0, most=1)
    """The smallest crop in fine-tuning, as a share of the image."""
    held_out: tuple[int, ...] = ()
    """Classes, by number, of which pretraining sees no image. Models are evaluated on the classes that it saw and,
    separately, on these."""
    evaluate_seen: bool = True
    """With held-out classes: evaluate on the classes that pretraining saw, too."""
    transfer: tuple[str, ...] = ()
    """Other labelled datasets to evaluate on, in the form of --data."""
    limit_train: int = option(0, least=0)
    """Probe frozen features with at most this many training images, of which shares of the labels are then taken; 0
    takes all."""
    limit_test: int = option(0, least=0)
    """The same for the test images."""
    robustness: bool = False
    """Also test the first seed's models, and scratch, on corrupted images and with patches lost or shuffled, each by
    logistic regression on its frozen features; on 1,000 test images, or --limit_test."""
    records: Path | None = None
    """Also keep the numbers of each finished method and seed in this folder, one small file each. What has a file there
    is not done again, so a comparison can go on on another machine."""
    jobs: int = option(0, least=0)
    """Jobs at a time: by default one per GPU, or per core."""


def check(config: ComparisonConfig) -> None:
    """Refuses what cannot work before anything is trained or written."""
    check_methods(config.methods)
    check_bounds(config)
    if min(config.finetune_steps) < 0:
        raise ValueError(f"--finetune_steps is {min(config.finetune_steps)}; it must be at least 0")
    if len(config.finetune_steps) not in (1, len(config.finetune_fractions)):
        raise ValueError(
            f"--finetune_steps {' '.join(map(str, config.finetune_steps))}: give one number, or one for each of the "
            f"{len(config.finetune_fractions)} --finetune_fractions"
        )
    for flag in ("finetune_flags", "scratch_flags"):
        if own := [name for name, _ in pairs_of(getattr(config, flag)) if plain(name) in OF_COMPARISON]:
            raise ValueError(f"--{flag} {' '.join(getattr(config, flag))}: --{own[0]} is the comparison's own")
        words = ("--model", "start", *in_full(pairs_of(getattr(config, flag))))
        check_words("finetune", words, f"--{flag} {' '.join(getattr(config, flag))}")
    for method in map(Method, config.methods):
        flag = f"--methods {method.text}"
        for name, _ in method.options:
            if name == INIT and method.init not in INITS:
                raise ValueError(f"{flag}: init is one of {', '.join(INITS)}")
            if plain(name) in SAME_FOR_ALL:
                raise ValueError(f"{flag}: --{name} is the same for all methods, and the comparison's own")
        words = pretraining(config, method, Path("start"), config.out, config.epochs, 0)
        check_words(method.recipe, words, flag)
    if len({config.data, *config.transfer}) < 1 + len(config.transfer):
        raise ValueError(f"--transfer {' '.join(config.transfer)}: name each set once, and none that pretraining sees")
    check_together(config)
    ViT.variant(config.model, image_size=config.image_size)
    channels = config.source(channels=config.channels).channels
    for place in places(config):
        images = sets(config)[place]
        check_set(place, images, config, channels)


def check_together(config: ComparisonConfig) -> None:
    """Options that contradict each other."""
    if config.held_out and any(config.finetune_steps) and not (config.evaluate_seen or config.finetune_everywhere):
        raise ValueError("--no_evaluate_seen --no_finetune_everywhere: no class is left to fine-tune on")
    if config.budget == "seconds" and config.records:
        raise ValueError("--budget seconds differs between machines, so it has no --records: take flops or images")
    if config.robustness and config.records:
        raise ValueError("--robustness reads models, and --records may keep none of what is done: leave one out")


def facts_of(config: ComparisonConfig) -> dict[str, Any]:
    """What decides numbers beside the settings: how many images there are, and whose cost is the budget."""
    first = {} if config.budget == "images" else {"first method": config.methods[0]}
    return first | {"images": len(config.source(channels=config.channels))}


def check_first(config: ComparisonConfig, file: Path) -> None:
    """Methods may be added to a comparison, but the first one's cost is the budget of those that are done."""
    found = (sealed.intact(file) or {}) if file.exists() else {}
    before = found.get("methods")
    if config.budget != "images" and before and before[0] != config.methods[0] and found.get("budget") == config.budget:
        raise ValueError(
            f"{file.parent} was begun with --methods {before[0]} first, whose {config.budget} are the budget of all: "
            "name it first again, or give another --out"
        )


def check_set(place: str, images: LabelledConfig, config: ComparisonConfig, channels: int) -> None:
    """Labelled, with test images that no method was pretrained on, and images enough for the smallest share."""
    train, _, note = open_labelled(images, images.image_size, channels)
    if note and not place.startswith(TRANSFER):
        raise NoInput(
            f"--data {config.data} needs a test split, or every method would be pretrained on the images that it is "
            f"tested on, and supervised on their labels. {note}"
        )
    if note:
        print(f"note: {note}")
    counts = np.bincount(train.required_labels())
    most = counts.max() * min(1, config.limit_train / len(train) if config.limit_train else 1)
    few = [fraction for fraction in config.fractions if round(most * fraction) < 2]
    shares = " ".join(f"{fraction:g}" for fraction in few)
    text = f"--fractions {shares}: the largest class of {train.name} has {most:.0f} images to learn from, which leaves"
    if len(few) == len(config.fractions):
        raise ValueError(f"{text} fewer than two, which a linear probe needs")
    if few:
        print(f"note: {text} one at most: there is no linear probe")


@cache
def sets(config: ComparisonConfig) -> dict[str, LabelledConfig]:
    """The labelled sets that models are evaluated on, by name. Pretraining sees the first."""
    images = LabelledConfig(**{one.name: getattr(config, one.name) for one in fields(ImagesConfig)})
    own = [images]
    if config.held_out:
        labels = set(config.source(channels=config.channels).required_labels().tolist())
        held_out, seen = set(config.held_out), sorted(labels - set(config.held_out))
        flag = f"--held_out {' '.join(map(str, config.held_out))}"
        if held_out - labels:
            raise ValueError(f"{flag}: there are the classes {' '.join(map(str, sorted(labels)))}")
        if len(held_out) < 2 or len(seen) < 2:
            raise ValueError(f"{flag} of {len(labels)} classes: hold out two of them or more, and leave two or more")
        own = [replace(images, only_classes=tuple(seen)), replace(images, only_classes=config.held_out)]
    of_own: dict[str, Any] = {"image_column": None, "label_column": None, "root": None, "only_classes": ()}
    others = [replace(images, data=data, **of_own) for data in config.transfer]
    return dict(zip(places(replace(config, evaluate_seen=True)), [*own, *others], strict=True))


def places(config: ComparisonConfig) -> list[str]:
    """The names of those that are evaluated on."""
    transfers = [f"{TRANSFER}{number}" for number, _ in enumerate(config.transfer, 1)]
    seen = [OWN] if config.evaluate_seen or not config.held_out else []
    return [*seen, *([HELD_OUT] if config.held_out else []), *transfers]


def pretraining(
    config: ComparisonConfig, method: Method, start: Path, out: Path, epochs: float, seed: int
) -> tuple[str, ...]:
    """The words of its recipe's command line."""
    words = reading(sets(config)[OWN], config.channels) + flags(threads=1, init_from=start, seed=seed, out=out)
    long = flags(epochs=f"{epochs:g}", warmup_epochs=f"{epochs / 10:g}", evaluate_every=f"{epochs / 2:g}")
    return (*words, "--resume", "--preset", "small", *long, *flags(batch_size=config.batch_size), *method.words)


def passes(config: ComparisonConfig, start: Path) -> dict[str, float]:
    """The epochs of each method, by the budget."""
    methods = [Method(text) for text in config.methods]
    if config.budget == "images":
        return {method.folder: config.epochs for method in methods}
    measures = []
    for method in methods:
        out = config.out / "measured" / method.folder
        words = (*pretraining(config, method, start, out, config.epochs, 0), "--dry_run")
        product = out.with_name(f"{out.name}-dry_run") / MEASURED
        measures.append(Job(f"measure/{method.folder}", method.recipe, words, product))
    work_on(measures, config.out, at_a_time=1)
    key = {"flops": "flops_per_image", "seconds": "seconds_per_image"}[config.budget]
    each = {method.folder: measured(job.product, key) for method, job in zip(methods, measures, strict=True)}
    counted = {name: one for name, one in each.items() if one is not None}
    if len(counted) < len(each):
        raise ValueError(f"--budget flops: FLOPs could not be counted: {each}. Take --budget images or seconds")
    return {name: config.epochs * counted[methods[0].folder] / one for name, one in counted.items()}


def measured(file: Path, key: str) -> float | None:
    with made_again(file):
        numbers = sealed.read(file)
        sealed.check(numbers, **{key: NUMBER | None})
        return numbers[key]


def plan(
    config: ComparisonConfig, starts: dict[str, Path], epochs: dict[str, float], kept: Collection[str] = ()
) -> list[Job]:
    """All jobs, but for those that measure. kept: methods and seeds that have a record."""
    jobs = [baseline(config, place, sets(config)[place]) for place in places(config)]
    for name, start in starts.items():
        if name.rpartition("-")[0] in SCRATCH.values() and name not in kept:
            jobs += evaluations(config, name, start, ())
    for seed in range(config.seeds):
        for method in map(Method, config.methods):
            name, run = f"{method.folder}-{seed}", config.out / "runs" / f"{method.folder}-{seed}"
            if name in kept:
                continue
            start = starts[f"{SCRATCH['mean'] if method.init == INITS[0] else method.init}-{seed}"]
            words = pretraining(config, method, start, run, epochs[method.folder], seed)
            known = OBJECTIVES.get(method.recipe)
            work = (known.work if known else 1.0) * epochs[method.folder] / config.epochs
            jobs.append(Job(f"pretrain/{name}", method.recipe, words, run / "report.md", work=work, run=run))
            jobs += evaluations(config, name, run, (f"pretrain/{name}",))
    return [*jobs, *([robustness(config, starts)] if config.robustness else [])]


def robustness(config: ComparisonConfig, starts: dict[str, Path]) -> Job:
    """Of the first seed's models, on the images that pretraining saw the like of."""
    models = {scratch(readout): starts[f"{name}-0"] for readout, name in SCRATCH.items()}
    named = names_of(config.methods)
    models |= {name: config.out / "runs" / f"{folder}-0" for folder, name in named.items()}
    (own, images), *_ = sets(config).items()
    out = config.out / ROBUSTNESS
    words = (*reading(images), "--no_random", "--no_heads", *flags(model=[*models.values()], names=[*models]))
    words += flags(threads=1, out=out, cache=config.out / "features")
    words += flags(limit_train=config.limit_train, limit_test=config.limit_test or CHANGED)
    needs = tuple(f"pretrain/{folder}-0" for folder in named)
    return Job(f"{ROBUSTNESS}/{own}", "robustness", words, out / "numbers.json", needs, work=0.3 * len(models))


def limits(config: ComparisonConfig) -> tuple[str, ...]:
    """The words of recipes that read frozen features."""
    return flags(limit_train=config.limit_train, limit_test=config.limit_test, fractions=config.fractions)


def baseline(config: ComparisonConfig, place: str, images: ImagesConfig) -> Job:
    """Accuracies without a model, of images with the channels that the models see."""
    out, channels = config.out / BASELINES / place, config.source(channels=config.channels).channels
    words = reading(images, channels) + limits(config) + flags(threads=1, out=out)
    return Job(f"{BASELINES}/{place}", "baselines", words, out / "numbers.json")


def evaluations(config: ComparisonConfig, name: str, model: Path, needs: tuple[str, ...]) -> list[Job]:
    """name: a method and a seed."""
    same, seed = flags(threads=1, model=model), name.rpartition("-")[2]
    jobs = []
    for place in places(config):
        data = reading(sets(config)[place])
        out = config.out / "probes" / name / place
        words = (*same, *data, *limits(config), "--no-random", "--declared")
        words += flags(out=out, cache=config.out / "features")
        jobs.append(Job(f"probe/{name}/{place}", "probe", words, out / "numbers.json", needs, work=0.3))
        tuned = place == OWN or config.finetune_everywhere
        for fraction, steps in lengths(config).items() if tuned else ():
            out = config.out / "finetuned" / name / place / f"{fraction:g}"
            words = (*same, *data, *flags(fraction=fraction, seed=seed, out=out), "--resume", "--curve")
            words += flags(steps=steps, batch_size=config.batch_size, rates=config.finetune_rates, folds=0)
            words += flags(choice_steps=max(1, round(config.choice_steps * steps)), smallest_crop=config.finetune_crop)
            words += in_full(pairs_of(config.finetune_flags))
            words += in_full(pairs_of(config.scratch_flags)) if not needs else ()
            title, work = f"finetune/{name}/{place}/{fraction:g}", 0.2 * len(config.finetune_rates)
            jobs.append(Job(title, "finetune", words, out / "test.json", needs, work=work, run=out))
    return jobs


def lengths(config: ComparisonConfig) -> dict[float, int]:
    """Steps of fine-tuning for each share of the labels."""
    shares, steps = config.finetune_fractions, config.finetune_steps
    steps = steps * (len(shares) if len(steps) == 1 else 1)
    return {share: count for share, count in zip(shares, steps, strict=True) if count}


def room(config: ComparisonConfig, jobs: list[Job], start: Path, at_a_time: int) -> int:
    """Bytes of disk that the comparison still needs."""
    weights, width = (start / WEIGHTS).stat().st_size, ViT.variant(config.model, image_size=config.image_size).width
    channels, read, predicted = config.source(channels=config.channels).channels, 0, 0
    smallest = math.inf
    for images in sets(config).values():  # the largest of them
        train, test, _ = open_labelled(images, images.image_size, channels)
        seen = [min(len(s), most or len(s)) for s, most in ((train, config.limit_train), (test, config.limit_test))]
        row = 3 * 8 + 4 * (1 + int(train.required_labels().max()))  # of predictions
        read = max(read, 4 * width * sum(seen) + len(config.fractions) * seen[1] * row)
        predicted = max(predicted, len(test) * row)
        smallest = min(smallest, min(config.finetune_fractions) * len(train))
    folds = 5 if smallest < 10 * ENOUGH else 1
    tries = len(config.finetune_rates) * folds if len(config.finetune_rates) > 1 else 0
    return needed(jobs, at_a_time, weights=weights, read=read, predicted=predicted, tries=tries)


def starts(config: ComparisonConfig) -> dict[str, Path]:
    """The weights that everything starts from, one set per seed and kind; scratch's is in a model for each of the two
    readouts."""
    channels = config.source(channels=config.channels).channels
    made = {}
    for seed in range(config.seeds):
        for init in dict.fromkeys([INITS[0], *(Method(text).init for text in config.methods)]):
            size = config.image_size
            backbone = ViT.variant(config.model, image_size=size, channels=channels, seed=seed, init=init)
            for readout, name in (SCRATCH if init == INITS[0] else {"mean": init}).items():
                made[f"{name}-{seed}"] = folder = config.out / "starts" / f"{name}-{seed}"
                if not folder.exists():
                    about = {"objective": "random start", "readout": readout, "data": "nothing"}
                    save_backbone(backbone, folder, about)
    return made
