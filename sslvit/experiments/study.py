"""The ViT paper's studies: their settings, the points of each, and the table and the plot of the results."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from sslvit.config import ImagesConfig, check_bounds, option
from sslvit.evaluate.baselines import COMMONEST, PIXELS
from sslvit.experiments.claims import EARLIER
from sslvit.experiments.jobs import Job, check_words, flags, made_again, reading
from sslvit.experiments.tables import NONE, cell
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.reports import page
from sslvit.reports.charts import Dot, Line, dot_chart, line_chart
from sslvit.reports.run import markdown_table
from sslvit.storage import durable, sealed
from sslvit.storage.jsonl import read_lines
from sslvit.storage.sealed import NUMBER
from sslvit.training.cost import COST
from sslvit.views.batching import Size
from sslvit.weights.folder import described

SHOTS, SHOWN = 10, "10-shot"


@dataclass(frozen=True)
class StudyConfig(ImagesConfig):
    """Repeat one of the ViT paper's studies on labelled images."""

    study: Literal["amounts", "costs", "positions", "readouts", "targets"] = "targets"
    """Which of the studies. Numbers of images, FLOPs of models, kinds of positions, readouts and rates, or targets of
    MPP."""
    out: Path = Path("runs/study")
    """A folder for everything; each study has one of its own in it."""
    image_size: Size = 32
    channels: Literal[1, 3] | None = None
    """Image files: 1 reads them as grey; by default 3. Arrays have their own."""
    model: str = "XS/8"
    """Width and patch size: XS/4, S/16, B/16, ... Widths are XS, mu, Ti, S, M, B, L, H and others."""
    resnet: str = "R20x0.5"
    """The BiT ResNet in the study of amounts."""
    stem: str = "R"
    """The hybrid's stem."""
    sizes: tuple[str, ...] = ("XS/8", "XS/4", "R+XS/8", "R+XS/4", "R20x0.5", "R20x1")
    """ViTs, hybrids and BiT ResNets in the study of costs."""
    shares: tuple[float, ...] = option((0.03, 0.1, 0.3, 1.0), above=0, most=1)
    """Shares of the images, in the study of amounts."""
    rates: tuple[float, ...] = option((3e-4, 1e-3, 3e-3, 1e-2), above=0)
    """Learning rates in the study of readouts."""
    epochs: float = option(3, above=0)
    """Passes over all images; over fewer images there are more passes, so that every run sees as many in all."""
    batch_size: int = option(64, above=0)
    """Images per step."""
    seeds: int = option(1, above=0)
    """Number of seeds, from 0."""
    jobs: int = option(0, least=0)
    """Jobs at a time: by default one per GPU, or per core."""


class Point(NamedTuple):
    series: str
    x: float | None  # on an axis; None where points only have names
    recipe: str
    words: tuple[str, ...]


def amounts(config: StudyConfig) -> Iterator[Point]:
    images = len(config.source(channels=config.channels))
    models = {"ViT": config.model, "hybrid": f"{config.stem}+{config.model}", "BiT ResNet": config.resnet}
    for model in models.values():  # so that one that cannot be built is refused now, and not after hours
        (BiT if model == config.resnet else ViT).variant(model, image_size=config.image_size)
    for name, model in models.items():
        for share in sorted(config.shares):
            count = round(share * images)
            if not count:
                raise ValueError(f"--shares {share:g}: of {images} images it leaves none")
            words = flags(model=model, images=count, epochs=f"{config.epochs * images / count:g}")
            yield Point(name, count, "supervised", words)


def costs(config: StudyConfig) -> Iterator[Point]:
    """Their place on the axis is known when they are trained: see results_of."""
    for model in config.sizes:
        kind = "hybrid" if "+" in model else "ViT" if "/" in model else "BiT ResNet"
        (BiT if kind == "BiT ResNet" else ViT).variant(model, image_size=config.image_size)
        yield Point(kind, None, "supervised", flags(model=model, epochs=f"{config.epochs:g}"))


def positions(config: StudyConfig) -> Iterator[Point]:
    learned = ("stem", "every_layer", "every_layer_shared")
    kinds: dict[str, tuple[str, ...]] = {"none": ("stem",), "relative": ("every_layer",)}  # which is inside attention
    kinds |= {"learned_1d": learned, "learned_2d": learned}
    for kind, places in kinds.items():
        for place in places:
            name = kind if len(places) == 1 else f"{kind}, {place}".replace("_", " ")
            words = flags(model=config.model, position=kind, position_at=place, epochs=config.epochs)
            yield Point(name, None, "supervised", (*words, "--class_token"))


def readouts(config: StudyConfig) -> Iterator[Point]:
    for name, token in {"class token": "--class_token", "mean patch": "--no-class_token"}.items():
        for rate in sorted(config.rates):
            words = flags(model=config.model, position="learned_1d", lr=f"{rate:g}", epochs=config.epochs)
            yield Point(name, rate, "supervised", (*words, token))


def targets(config: StudyConfig) -> Iterator[Point]:
    for target, name in {"mean": "mean colour", "downsized": "4x4 downsized", "pixels": "pixels"}.items():
        for share in (0.15, 0.5):
            words = flags(model=config.model, target=target, corrupt=share, epochs=config.epochs)
            yield Point(f"{name}, {100 * share:g} %", None, "mpp", words)


STUDIES = {"amounts": amounts, "costs": costs, "positions": positions, "readouts": readouts, "targets": targets}
AXES = {"amounts": "training images", "costs": "FLOPs of training", "readouts": "learning rate"}


def runs_of(config: StudyConfig, points: list[Point], out: Path) -> list[list[Job]]:
    """Of each point, one run per seed."""
    jobs = []
    for number, point in enumerate(points):
        epochs = float(point.words[point.words.index("--epochs") + 1])
        same = (*reading(config, config.channels), "--resume", "--preset", "small", *point.words)
        same += flags(threads=1, batch_size=config.batch_size, warmup_epochs=f"{epochs / 10:g}")
        runs = {seed: out / "runs" / f"{number}-{seed}" for seed in range(config.seeds)}
        words = {seed: (*same, *flags(seed=seed, out=run)) for seed, run in runs.items()}
        jobs.append([Job(run.name, point.recipe, words[s], run / "report.md", run=run) for s, run in runs.items()])
    return jobs


def check(config: StudyConfig) -> None:
    """Refuses what cannot work before anything is trained or written."""
    check_bounds(config)
    config.source(channels=config.channels).required_labels()
    ViT.variant(config.model, image_size=config.image_size)
    points = list(STUDIES[config.study](config))
    if any(point.recipe == "supervised" for point in points):  # which holds out no training image to evaluate on
        config.source("test", channels=config.channels).required_labels()
    for first, *_ in runs_of(config, points, config.out):
        check_words(first.recipe, first.words, f"--study {config.study}")


def baselines_of(config: StudyConfig, points: list[Point], out: Path) -> dict[int | None, Job]:
    """Accuracies without a model, by the number of training images where points differ in it."""
    jobs = {}
    for count in dict.fromkeys(images_of(point) for point in points):
        folder = out / "baselines" / str(count or "all")
        words = reading(config, config.channels) + flags(threads=1) + (flags(images=count) if count else ())
        words += flags(shots=[SHOTS], fractions=[], out=folder)
        jobs[count] = Job(f"baselines/{count or 'all'}", "baselines", words, folder / "numbers.json")
    return jobs


def images_of(point: Point) -> int | None:
    return int(point.words[point.words.index("--images") + 1]) if "--images" in point.words else None


def accuracies(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """At the start and at the end, by the readout that the objective declares."""
    prefix = f"eval/{described(run)['readout']}/"
    lines = read_lines(run / "metrics.jsonl")
    of_lines = [{k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)} for line in lines]
    evaluated = [one for one in of_lines if one]
    return evaluated[0], evaluated[-1]


def results_of(points: list[Point], jobs: list[list[Job]], *, costly: bool = False) -> list[dict]:
    """The accuracies of each point and of its random start, in the order of seeds, and the command of its first run.
    costly: points are placed by the FLOPs of their training."""
    results = []
    for point, runs in zip(points, jobs, strict=True):
        by_run = []
        for run in runs:
            with made_again(run.product.parent / "metrics.jsonl"):
                by_run.append(accuracies(run.product.parent))
        starts, ends = zip(*by_run, strict=True)
        by_seed = {"start": starts, "values": ends}
        columns = {kind: {column: [one[column] for one in all] for column in all[0]} for kind, all in by_seed.items()}
        x = flops_of(runs[0]) if costly else point.x
        results.append({"series": point.series, "x": x, **columns, "command": runs[0].command()})
    return results


def flops_of(run: Job) -> float | None:
    file = run.product.parent / "cost.json"
    with made_again(file):
        return sealed.read(file, **COST)["flops"]


def baseline_rows(jobs: dict[int | None, Job], columns: list[str]) -> list[dict]:
    """As points that have no start."""
    rows = []
    for count, job in jobs.items():
        with made_again(job.product):
            numbers = sealed.read(job.product)
            sealed.check(numbers, **{COMMONEST: NUMBER, PIXELS: dict, "side": int})
            same = {column: [numbers[COMMONEST]] for column in columns}
            pixels = {column: [numbers[PIXELS][column]] for column in columns}
        rows += [{"series": COMMONEST, "x": count, "values": same}]
        rows += [{"series": PIXELS, "x": count, "values": pixels, "side": numbers["side"]}]
    return sorted(rows, key=lambda row: row["series"])


def percent(values: list[float]) -> tuple[float, float]:
    """The mean, and the deviation over seeds if there are several."""
    tensor = 100 * torch.tensor(values, dtype=torch.float64)
    return tensor.mean().item(), tensor.std().item() if len(values) > 1 else 0.0


def table(results: dict) -> list[str]:
    columns, axis, rows = list(results["points"][0]["values"]), AXES.get(results["study"]), []
    for point in [*results.get("baselines", []), *results["points"]]:
        cells = [point["series"], *([place(point["x"])] if axis else [])]
        for column in columns:
            start = f"{percent(point['start'][column])[0]:.1f}" if "start" in point else NONE
            cells += [start, cell(point["values"][column])]
        rows.append(cells)
    titles = [f"{column}: {when}" for column in columns for when in ("random start", "trained")]
    return markdown_table(["accuracy, %", *([axis] if axis else []), *titles], rows)


def place(x: float | None) -> str:
    """On the axis: a rate, a number of images, or FLOPs."""
    return NONE if x is None else f"{x:.1e}".replace("e+", "e") if x >= 1e9 else f"{x:,g}"


def notes(results: dict) -> list[str]:
    """An explanation of the first rows."""
    sides = {one["side"] for one in results.get("baselines", []) if "side" in one}
    if not sides:
        return [f"- {EARLIER} rows of the {COMMONEST} and of {PIXELS}."]
    shown = " or ".join(f"{side} x {side}" for side in sorted(sides))
    return [
        f"- {COMMONEST.capitalize()}: always the class that is most frequent among the training labels.",
        f"- {PIXELS.capitalize()}: the images themselves, {shown} pixels, instead of frozen features.",
    ]


def plot(results: dict) -> str:
    """One column. A start that all points share is shown beside them. On an axis, an accuracy without a model is a
    level line where it is the same for all."""
    points, axis = results["points"], AXES.get(results["study"])
    places = sorted({point["x"] for point in points}) if axis else [None]
    level = [
        one | {"x": x} for one in results.get("baselines", []) for x in (places if one["x"] is None else [one["x"]])
    ]
    drawn = [(point["series"], point["x"], *percent(point["values"][SHOWN])) for point in [*points, *level]]
    if axis:
        drawn = sorted((one for one in drawn if one[1] is not None), key=lambda one: one[1])
        series = {
            name: [one for one in drawn if one[0] == name]
            for name in dict.fromkeys(one["series"] for one in [*points, *level])
        }
        lines = [Line(n, [x for _, x, _, _ in s], [y for *_, y, _ in s], [d for *_, d in s]) for n, s in series.items()]
        return line_chart(
            lines, x=axis, y=f"{SHOWN}, %", logarithmic=True, ticks=ticks_of(sorted({x for _, x, _, _ in drawn}))
        )
    starts = [point["start"][SHOWN] for point in points]
    if all(start == starts[0] for start in starts):
        drawn.insert(0, ("random start", None, *percent(starts[0])))
    return dot_chart([Dot(name, y, y - spread, y + spread) for name, _, y, spread in drawn], x=f"{SHOWN}, %")


def ticks_of(places: list[float]) -> list[float]:
    """The places themselves, or of FLOPs, which come close to each other, round ones."""
    if places[0] < 1e9:
        return places
    first, last = math.floor(math.log10(places[0])), math.ceil(math.log10(places[-1]))
    return [10.0**power for power in range(first, last + 1)]


def write(results: dict, out: Path) -> None:
    """The table in the terminal and in results.md, the numbers in results.json, the plot in study.svg."""
    text = "\n".join([*table(results), "", *notes(results), ""])
    sealed.write(out / "results.json", results)
    durable.replace_text(out / "results.md", text)
    durable.replace_text(out / "study.svg", page.alone(plot(results)))
    print(f"{text}\nIn {out}: results.json, results.md, study.svg")
