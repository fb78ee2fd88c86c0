"""The results of a comparison: every number of its jobs, and the differences between methods."""

from itertools import combinations
from pathlib import Path
from typing import Any

from sslvit.errors import DataError
from sslvit.evaluate.baselines import COMMONEST, PIXELS
from sslvit.evaluate.statistics import difference
from sslvit.experiments.jobs import made_again
from sslvit.experiments.records import (
    LINEAR,
    NEAREST,
    TUNED,
    Judged,
    Records,
    accuracies,
    judge,
    record,
    share_of,
)
from sslvit.storage import sealed
from sslvit.storage.sealed import NUMBER

SCRATCH = {"mean": "scratch", "cls": "scratch-cls"}  # folders of the random start, by readout
OWN = "own"  # the labels of the images that pretraining saw
BASELINES, ROBUSTNESS = "baselines", "robustness"  # folders

Columns = dict[str, dict[str, list[Any]]]  # by column and method, one entry per seed


def put(columns: Columns, column: str, name: str, entry: Any) -> None:
    columns.setdefault(column, {}).setdefault(name, []).append(entry)


def collect(
    out: Path,
    methods: dict[str, str],
    seeds: list[int],
    places: list[str],
    models: dict[str, Path],
    records: Records | None = None,
) -> dict[str, Any]:
    """methods: names by folder, besides scratch. places: names of the sets of labels. models: the model of a method and
    seed, by "method-seed". records: of those whose files are elsewhere. Accuracies are lists, one per seed; differences
    are of which test images were right."""
    values: Columns = {}
    judged: Columns = {}
    nearest: Columns = {}  # balanced accuracies of nearest neighbours, of probes that report them
    curves: Columns = {}  # accuracy after so many steps of fine-tuning
    rates: Columns = {}  # learning rates that were chosen
    readouts: dict[str, str] = {}
    named_methods = {folder: scratch(readout) for readout, folder in SCRATCH.items()} | methods
    costs: dict[str, list[dict[str, Any]]] = {name: [] for name in named_methods.values()}
    for method, name in named_methods.items():
        for seed in seeds:
            known = records.read(f"{method}-{seed}") if records else None
            model = models[f"{method}-{seed}"]
            known = known or record(out, f"{method}-{seed}", places, model, trained=method in methods)
            readouts[name] = known["readout"]
            costs[name] += [known["cost"]] if known["cost"] else []
            for place, column, entry in ((p, *item) for p in places for item in known["places"][p].items()):
                column = prefix(place) + column
                put(values, column, name, entry["accuracy"])
                for columns, kind in ((nearest, "balanced"), (curves, "curve"), (rates, "rate")):
                    if kind in entry:
                        put(columns, column, name, entry[kind])
                if "judged" in entry:
                    put(judged, column, name, Judged.from_json(entry["judged"]))
    for column, by_method in values.items():
        if short := [name for name in readouts if len(by_method.get(name, ())) < len(seeds)]:
            raise DataError(f"{out}: {column} of {', '.join(short)} is missing; the comparison's command adds it")
    results = {"methods": list(readouts), "readouts": readouts, "seeds": seeds, "values": values, "costs": costs}
    results |= {"differences": differences(judged), "curves": curves, "rates": rates}
    results |= {"pixels": {place: add_baselines(out, place, values, judged, nearest) for place in places}}
    if (file := out / ROBUSTNESS / "numbers.json").exists():
        with made_again(file):
            results[ROBUSTNESS] = sealed.read(file)
    return results | balanced_and_one_class(judged, nearest)


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
        for column, value in baseline[PIXELS].get("balanced accuracy", {}).items():
            if NEAREST.fullmatch(column):
                put(nearest, where + column, PIXELS, value)
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
