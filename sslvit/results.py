"""The results of a comparison: every number of its parts, and the differences between methods."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sslvit import sealed
from sslvit.cost import COST
from sslvit.errors import DataError
from sslvit.evaluate.balance import balanced_accuracy, collapsed, unbalanced
from sslvit.evaluate.baselines import COMMONEST, PIXELS
from sslvit.evaluate.predictions import load_predictions
from sslvit.model_folder import described
from sslvit.parts import made_again
from sslvit.sealed import NUMBER
from sslvit.statistics import difference

SCRATCH = {"mean": "scratch", "cls": "scratch-cls"}  # folders of the random start, by how it is read
OWN = "own"  # the labels of the images that pretraining saw
TUNED = "fine-tuned"  # what names of such columns begin with
LINEAR = re.compile(r"linear \S+ %")
NEAREST = re.compile(r"\d+-nn")
COLUMN = re.compile(rf"{NEAREST.pattern}|\d+-shot|{LINEAR.pattern}")
BASELINES = "baselines"  # a folder


class Judged(NamedTuple):
    """A classifier's predictions of the test images: which are right, in the order of ids, and what they are worth."""

    right: Tensor
    balanced: float  # accuracy
    one_class: bool  # nearly all images are given the same
    unbalanced: bool  # the test images
    classes: int  # that they are of


def collect(
    out: Path, methods: dict[str, str], seeds: list[int], places: list[str], models: dict[str, Path]
) -> dict[str, Any]:
    """methods: names by folder, besides scratch. places: what was learned. models: the model of a method and seed, by
    "method-seed". Accuracies are lists, one for each seed; differences are of which test images were right."""
    values: dict[str, dict[str, list[float]]] = {}
    judged: dict[str, dict[str, list[Judged]]] = {}
    nearest: dict[str, dict[str, list[float]]] = {}  # balanced accuracies of nearest neighbours, where they were kept
    readouts: dict[str, str] = {}
    columns: dict[str, list[str]] = {}  # of each place, the same for all
    for method, name in ({folder: scratch(readout) for readout, folder in SCRATCH.items()} | methods).items():
        for seed, place in ((seed, place) for seed in seeds for place in places):
            readouts[name] = readout = described(models[f"{method}-{seed}"])["readout"]
            where = named(place)
            file = out / "probes" / f"{method}-{seed}" / place / "numbers.json"
            with made_again(file):
                numbers = sealed.read(file, **{f"pretrained/{readout}": dict})[f"pretrained/{readout}"]
                read = [column for column in numbers if COLUMN.fullmatch(column)]
                sealed.check(numbers, **dict.fromkeys(read, NUMBER))
                if set(read) != set(columns.setdefault(place, read)):
                    raise ValueError(f"its numbers are {read}, others' {columns[place]}")
                add_nearest(nearest, where, name, numbers)
            for column in read:
                values.setdefault(where + column, {}).setdefault(name, []).append(numbers[column])
            for column in (column for column in read if LINEAR.fullmatch(column)):
                share = float(column.split()[1]) / 100
                one = judge(file.with_name(f"pretrained-{readout}-{share:g}.parquet"))
                judged.setdefault(where + column, {}).setdefault(name, []).append(one)
            folder = out / "finetuned" / f"{method}-{seed}" / place
            for file in sorted(folder.glob("*/test.json"), key=lambda file: float(file.parent.name)):
                column = f"{where}{TUNED} {100 * float(file.parent.name):g} %"
                with made_again(file):
                    top1 = sealed.read(file, top1=NUMBER)["top1"]
                values.setdefault(column, {}).setdefault(name, []).append(top1)
                one = judge(file.with_name("predictions.parquet"))
                judged.setdefault(column, {}).setdefault(name, []).append(one)
    for column, by_method in values.items():
        if short := [name for name in readouts if len(by_method.get(name, ())) < len(seeds)]:
            raise DataError(
                f"{out}: {column} is not there of {', '.join(short)}; the comparison's command makes the rest"
            )
    costs = {name: [] for name in readouts}
    for method, name in methods.items():
        for file in (models[f"{method}-{seed}"] / "cost.json" for seed in seeds):
            with made_again(file):
                costs[name].append(sealed.read(file, **COST))
    told = {"methods": list(readouts), "readouts": readouts, "seeds": seeds, "values": values, "costs": costs}
    told |= {"differences": differences(judged)}
    told |= {"pixels": {place: add_baselines(out, place, values, judged, nearest) for place in places}}
    return told | whole(judged, nearest)


def add_nearest(nearest: dict[str, dict[str, list[float]]], where: str, name: str, numbers: dict[str, Any]) -> None:
    for column, value in numbers.get("balanced accuracy", {}).items():
        if NEAREST.fullmatch(column):
            nearest.setdefault(where + column, {}).setdefault(name, []).append(value)


def judge(predictions: Path) -> Judged:
    with made_again(predictions):
        found = load_predictions(predictions)
    predicted = found.probabilities.argmax(-1)
    right = (predicted == found.labels)[found.ids.argsort()]
    one_class = collapsed(predicted, found.labels) is not None
    balanced, classes = balanced_accuracy(predicted, found.labels), len(found.labels.unique())
    return Judged(right, balanced, one_class, unbalanced(found.labels), classes)


def differences(judged: dict[str, dict[str, list[Judged]]]) -> list[dict[str, Any]]:
    """Of each column all pairs of methods."""
    found = []
    for column, by_method in judged.items():
        right = {name: [one.right for one in each] for name, each in by_method.items()}
        for i, b in enumerate(right):
            for a in list(right)[i + 1 :]:
                gap = difference(right[a], right[b])._asdict()
                found.append({"column": column, "first": a, "second": b} | gap)
    return found


def whole(judged: dict[str, dict[str, list[Judged]]], nearest: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Of each column the balanced accuracies, where its test classes are unbalanced, and the seeds whose classifiers
    answer one class."""
    balanced, one_class = {}, {}
    for column, by_method in nearest.items():
        place = column.rpartition(": ")[0]
        linear = [each for name, each in judged.items() if name.rpartition(": ")[0] == place and TUNED not in name]
        (first, *_), *_ = linear[0].values() if linear else [[None]]  # of the same test images
        told = first and all(len(by_method.get(name, ())) == len(each) for name, each in linear[0].items())
        if told and first.unbalanced:
            balanced[column] = by_method | {COMMONEST: [1 / first.classes]}
    for column, by_method in judged.items():
        (first, *_), *_ = by_method.values()
        if first.unbalanced:
            balanced[column] = {name: [one.balanced for one in each] for name, each in by_method.items()}
            balanced[column][COMMONEST] = [1 / first.classes]
        seeds = {name: [seed for seed, one in enumerate(each) if one.one_class] for name, each in by_method.items()}
        one_class[column] = {name: some for name, some in seeds.items() if some}
    return {"balanced": balanced, "one_class": one_class}


def add_baselines(
    out: Path,
    place: str,
    values: dict[str, dict[str, list[float]]],
    judged: dict[str, dict[str, list[Judged]]],
    nearest: dict[str, dict[str, list[float]]],
) -> int | None:
    """The rows of what no model gives, and the side that raw pixels were read at; nothing of an earlier comparison,
    which has none."""
    file = out / BASELINES / place / "numbers.json"
    if not file.exists():
        return None
    where = named(place)
    with made_again(file):
        found = sealed.read(file, **{PIXELS: dict, COMMONEST: NUMBER})
        for column in (column for column in values if column.rpartition(": ")[0] == where.removesuffix(": ")):
            tuned = column.startswith(f"{where}{TUNED}")  # on all images, whatever the limits of the probes
            values[column][COMMONEST] = [found[f"{COMMONEST} of all" if tuned else COMMONEST]]
        add_nearest(nearest, where, PIXELS, found[PIXELS])
        for column in (column for column in found[PIXELS] if COLUMN.fullmatch(column)):
            values[where + column][PIXELS] = [found[PIXELS][column]]
            if LINEAR.fullmatch(column):
                one = judge(file.with_name(f"pixels-{float(column.split()[1]) / 100:g}.parquet"))
                judged[where + column][PIXELS] = [one]
        return found["side"]


def named(place: str) -> str:
    """What the names of this place's columns begin with."""
    return "" if place == OWN else f"{place}: "


def scratch(readout: str) -> str:
    return f"scratch ({readout})"
