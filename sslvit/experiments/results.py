"""The results of a comparison: every number of its jobs, and the differences between methods."""

import re
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sslvit.errors import DataError
from sslvit.evaluate.balance import balanced_accuracy, collapsed, unbalanced
from sslvit.evaluate.baselines import COMMONEST, PIXELS
from sslvit.evaluate.predictions import load_predictions
from sslvit.evaluate.statistics import difference
from sslvit.experiments.jobs import made_again
from sslvit.storage import sealed
from sslvit.storage.sealed import NUMBER
from sslvit.training.cost import COST
from sslvit.weights.folder import described

SCRATCH = {"mean": "scratch", "cls": "scratch-cls"}  # folders of the random start, by readout
OWN = "own"  # the labels of the images that pretraining saw
TUNED = "fine-tuned"  # the beginning of such columns' names
LINEAR = re.compile(r"linear \S+ %")
NEAREST = re.compile(r"\d+-nn")
COLUMN = re.compile(rf"{NEAREST.pattern}|\d+-shot|{LINEAR.pattern}")
BASELINES = "baselines"  # a folder


class Judged(NamedTuple):
    """A classifier's predictions of the test images: which are right, in the order of ids, and what they are worth."""

    right: Tensor
    balanced: float  # accuracy
    one_class: bool  # predicted for nearly all images
    unbalanced: bool  # the test images
    classes: int  # of the test images


Columns = dict[str, dict[str, list[Any]]]  # by column and method, one entry per seed


def put(columns: Columns, column: str, name: str, entry: Any) -> None:
    columns.setdefault(column, {}).setdefault(name, []).append(entry)


def collect(
    out: Path, methods: dict[str, str], seeds: list[int], places: list[str], models: dict[str, Path]
) -> dict[str, Any]:
    """methods: names by folder, besides scratch. places: names of the sets of labels. models: the model of a method and
    seed, by "method-seed". Accuracies are lists, one per seed; differences are of which test images were right."""
    values: Columns = {}
    judged: Columns = {}
    nearest: Columns = {}  # balanced accuracies of nearest neighbours, of probes that report them
    curves: Columns = {}  # accuracy after so many steps of fine-tuning
    rates: Columns = {}
    readouts: dict[str, str] = {}
    columns: dict[str, set[str]] = {}  # of each place, the same for all
    named_methods = {folder: scratch(readout) for readout, folder in SCRATCH.items()} | methods
    for method, name in named_methods.items():
        for seed, place in ((seed, place) for seed in seeds for place in places):
            readouts[name] = readout = described(models[f"{method}-{seed}"])["readout"]
            where, file = prefix(place), out / "probes" / f"{method}-{seed}" / place / "numbers.json"
            with made_again(file):
                probe = sealed.read(file)
                sealed.check(probe, **{f"pretrained/{readout}": dict})
                numbers = accuracies(probe[f"pretrained/{readout}"])
                if set(numbers) != columns.setdefault(place, set(numbers)):
                    raise ValueError(f"its numbers are {list(numbers)}, others' {sorted(columns[place])}")
                add_nearest(nearest, where, name, probe[f"pretrained/{readout}"])
            for column, accuracy in numbers.items():
                put(values, where + column, name, accuracy)
                if LINEAR.fullmatch(column):
                    predictions = file.with_name(f"pretrained-{readout}-{share_of(column):g}.parquet")
                    put(judged, where + column, name, judge(predictions))
            folder = out / "finetuned" / f"{method}-{seed}" / place
            for file in sorted(folder.glob("*/test.json"), key=lambda file: float(file.parent.name)):
                column = f"{where}{TUNED} {100 * float(file.parent.name):g} %"
                with made_again(file):
                    tested = sealed.read(file, top1=NUMBER)
                put(values, column, name, tested["top1"])
                if "held out" in tested and tested["held out"]:
                    put(rates, column, name, tested["lr"])
                if "curve" in tested:
                    put(curves, column, name, tested["curve"])
                put(judged, column, name, judge(file.with_name("predictions.parquet")))
    for column, by_method in values.items():
        if short := [name for name in readouts if len(by_method.get(name, ())) < len(seeds)]:
            raise DataError(f"{out}: {column} of {', '.join(short)} is missing; the comparison's command adds it")
    costs: dict[str, list[dict[str, Any]]] = {name: [] for name in readouts}
    for method, name in methods.items():
        for file in (models[f"{method}-{seed}"] / "cost.json" for seed in seeds):
            with made_again(file):
                costs[name].append(sealed.read(file, **COST))
    results = {"methods": list(readouts), "readouts": readouts, "seeds": seeds, "values": values, "costs": costs}
    results |= {"differences": differences(judged), "curves": curves, "rates": rates}
    results |= {"pixels": {place: add_baselines(out, place, values, judged, nearest) for place in places}}
    return results | balanced_and_one_class(judged, nearest)


def accuracies(numbers: dict[str, Any]) -> dict[str, float]:
    """The columns of a table, of a probe's numbers."""
    columns = {name: value for name, value in numbers.items() if COLUMN.fullmatch(name)}
    sealed.check(columns, **dict.fromkeys(columns, NUMBER))
    return columns


def share_of(column: str) -> float:
    """0.1 of linear 10 %."""
    return float(column.split()[1]) / 100


def add_nearest(nearest: Columns, where: str, name: str, numbers: dict[str, Any]) -> None:
    for column, value in numbers.get("balanced accuracy", {}).items():
        if NEAREST.fullmatch(column):
            put(nearest, where + column, name, value)


def judge(file: Path) -> Judged:
    with made_again(file):
        predictions = load_predictions(file)
    predicted, labels = predictions.probabilities.argmax(-1), predictions.labels
    return Judged(
        right=(predicted == labels)[predictions.ids.argsort()],
        balanced=balanced_accuracy(predicted, labels),
        one_class=collapsed(predicted, labels) is not None,
        unbalanced=unbalanced(labels),
        classes=len(labels.unique()),
    )


def differences(judged: Columns) -> list[dict[str, Any]]:
    """Of each column all pairs of methods."""
    gaps = []
    for column, by_method in judged.items():
        right = {name: [one.right for one in each] for name, each in by_method.items()}
        for second, first in combinations(right, 2):
            gap = difference(right[first], right[second])._asdict()
            gaps.append({"column": column, "first": first, "second": second} | gap)
    return gaps


def balanced_and_one_class(judged: Columns, nearest: Columns) -> dict[str, Any]:
    """Of each column the balanced accuracies, where its test classes are unbalanced, and the seeds whose classifiers
    predict one class."""
    balanced, one_class = {}, {}
    for column, by_method in nearest.items():
        place = column.rpartition(": ")[0]
        linear = [each for name, each in judged.items() if name.rpartition(": ")[0] == place and TUNED not in name]
        if not linear:
            continue
        (first, *_), *_ = linear[0].values()  # of the same test images
        if first.unbalanced and all(len(by_method.get(name, ())) == len(each) for name, each in linear[0].items()):
            balanced[column] = by_method | {COMMONEST: [1 / first.classes]}
    for column, classifiers in judged.items():
        (first, *_), *_ = classifiers.values()
        if first.unbalanced:
            balanced[column] = {name: [one.balanced for one in each] for name, each in classifiers.items()}
            balanced[column][COMMONEST] = [1 / first.classes]
        seeds = {name: [seed for seed, one in enumerate(each) if one.one_class] for name, each in classifiers.items()}
        one_class[column] = {name: some for name, some in seeds.items() if some}
    return {"balanced": balanced, "one_class": one_class}


def add_baselines(out: Path, place: str, values: Columns, judged: Columns, nearest: Columns) -> int | None:
    """Adds the rows of the baselines without a model; returns the side of the raw pixels, or None for an earlier
    comparison, which has no baselines."""
    file = out / BASELINES / place / "numbers.json"
    if not file.exists():
        return None
    where = prefix(place)
    with made_again(file):
        baseline = sealed.read(file)
        sealed.check(baseline, **{PIXELS: dict, COMMONEST: NUMBER})
        for column in (column for column in values if column.rpartition(": ")[0] == where.removesuffix(": ")):
            tuned = column.startswith(f"{where}{TUNED}")  # on all images, whatever the limits of the probes
            values[column][COMMONEST] = [baseline[f"{COMMONEST} of all" if tuned else COMMONEST]]
        add_nearest(nearest, where, PIXELS, baseline[PIXELS])
        for column, accuracy in accuracies(baseline[PIXELS]).items():
            values[where + column][PIXELS] = [accuracy]
            if LINEAR.fullmatch(column):
                judged[where + column][PIXELS] = [judge(file.with_name(f"pixels-{share_of(column):g}.parquet"))]
        return baseline["side"]


def prefix(place: str) -> str:
    """The beginning of the names of this place's columns."""
    return "" if place == OWN else f"{place}: "


def scratch(readout: str) -> str:
    return f"scratch ({readout})"
