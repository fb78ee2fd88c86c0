"""The results of a comparison: every number of its parts, and in words what the differences support."""

from pathlib import Path
from typing import Any

from torch import Tensor

from sslvit import sealed
from sslvit.cost import COST
from sslvit.evaluate.predictions import load_predictions
from sslvit.model_folder import described
from sslvit.parts import made_again
from sslvit.sealed import NUMBER
from sslvit.statistics import Difference, difference, sentence

SCRATCH = {"mean": "scratch", "cls": "scratch-cls"}  # folders of the random start, by how it is read
OWN = "own"  # the labels of the images that pretraining saw
SUPERVISED = "supervised"
BUDGETS = {
    "images": "as many images",
    "operations": "about as many operations as the first one needs for its passes",
    "seconds": "about as many seconds as the first one needs for its passes",
}


def collect(
    out: Path, methods: dict[str, str], seeds: list[int], places: list[str], models: dict[str, Path]
) -> dict[str, Any]:
    """methods: names by folder, besides scratch. places: what was learned. models: the model of a method and seed, by
    "method-seed". Accuracies are lists, one for each seed; differences are of which test images were right."""
    values: dict[str, dict[str, list[float]]] = {}
    right: dict[str, dict[str, list[Tensor]]] = {}
    readouts: dict[str, str] = {}
    columns: dict[str, list[str]] = {}  # of each place, the same for all
    for method, name in ({folder: scratch(readout) for readout, folder in SCRATCH.items()} | methods).items():
        for seed, place in ((seed, place) for seed in seeds for place in places):
            readouts[name] = readout = described(models[f"{method}-{seed}"])["readout"]
            where = "" if place == OWN else f"{place}: "
            file = out / "probes" / f"{method}-{seed}" / place / "numbers.json"
            with made_again(file):
                numbers = sealed.read(file, **{f"pretrained/{readout}": dict})[f"pretrained/{readout}"]
                read = [c for c in numbers if "-nn" in c or c.startswith("linear ") or c.endswith("-shot")]
                sealed.check(numbers, **dict.fromkeys(read, NUMBER))
                if set(read) != set(columns.setdefault(place, read)):
                    raise ValueError(f"its numbers are {read}, others' {columns[place]}")
                shares = {c: float(c.split()[1]) / 100 for c in read if c.startswith("linear ")}
            for column in read:
                values.setdefault(where + column, {}).setdefault(name, []).append(numbers[column])
            for column, share in shares.items():
                hit = hits(file.with_name(f"pretrained-{readout}-{share:g}.parquet"))
                right.setdefault(where + column, {}).setdefault(name, []).append(hit)
            folder = out / "finetuned" / f"{method}-{seed}" / place
            for file in sorted(folder.glob("*/test.json"), key=lambda file: float(file.parent.name)):
                column = f"{where}fine-tuned {100 * float(file.parent.name):g} %"
                with made_again(file):
                    top1 = sealed.read(file, top1=NUMBER)["top1"]
                values.setdefault(column, {}).setdefault(name, []).append(top1)
                right.setdefault(column, {}).setdefault(name, []).append(hits(file.with_name("predictions.parquet")))
    costs = {name: [] for name in readouts}
    for method, name in methods.items():
        for file in (models[f"{method}-{seed}"] / "cost.json" for seed in seeds):
            with made_again(file):
                costs[name].append(sealed.read(file, **COST))
    found = [
        {"column": column, "first": a, "second": b} | difference(by_method[a], by_method[b])._asdict()
        for column, by_method in right.items()
        for i, b in enumerate(by_method)
        for a in list(by_method)[i + 1 :]
    ]
    about = {"methods": list(readouts), "readouts": readouts, "seeds": seeds}
    return about | {"values": values, "costs": costs, "differences": found}


def scratch(readout: str) -> str:
    return f"scratch ({readout})"


def hits(predictions: Path) -> Tensor:
    """Whether each image was right, in the order of their ids."""
    with made_again(predictions):
        found = load_predictions(predictions)
    return (found.probabilities.argmax(-1) == found.labels)[found.ids.argsort()]


def kept(one: dict[str, Any]) -> Difference:
    return Difference(*(one[name] for name in Difference._fields))


def in_words(column: str) -> str:
    """The linear 100 % of classes held out: by a linear probe with 100 % of the labels of classes held out."""
    place, _, column_there = column.rpartition(": ")
    how, _, share = column_there.partition(" ")
    how = "when fine-tuned" if how == "fine-tuned" else "by a linear probe"
    return f"{how} with {share} of the labels" + (f" of {place}" if place else "")


def sentences(results: dict[str, Any], column: str, *, to_scratch: bool = False) -> list[str]:
    """What the differences of a column support, first (or only) those of a method to scratch read in the same way."""

    def like_with_like(one: dict[str, Any]) -> bool:
        return one["second"] == scratch(results["readouts"][one["first"]])

    mine = [one for one in results["differences"] if one["column"] == column]
    mine.sort(
        key=lambda one: results["methods"].index(one["first"]) if like_with_like(one) else len(results["methods"])
    )
    return [
        sentence(one["first"], one["second"], kept(one), in_words(column)) + "."
        for one in mine
        if like_with_like(one) or not to_scratch
    ]


def ahead_of(results: dict[str, Any], base: str, column: str) -> dict[str, Difference]:
    """Each method against this one, in points; against "scratch", that which is read as the method is."""
    found = {}
    for one in (one for one in results["differences"] if one["column"] == column):
        gap = kept(one)
        for name, other, sign in ((one["first"], one["second"], 100), (one["second"], one["first"], -100)):
            if other == (scratch(results["readouts"][name]) if base == "scratch" else base):
                low, high = sorted((sign * gap.low, sign * gap.high))
                found[name] = Difference(sign * gap.mean, low, high, gap.seeds)
    return {name: found[name] for name in results["methods"] if name in found}


def notes(results: dict[str, Any]) -> list[str]:
    """What must be known to read the numbers."""
    seeds, settings = len(results["seeds"]), results["settings"]
    read = {way: [n for n, r in results["readouts"].items() if r == way] for way in results["readouts"].values()}
    ways = "; ".join(f"{way} of {', '.join(names)}" for way, names in read.items())
    texts = [
        f"Every method started from scratch's weights, and was given {BUDGETS[settings.get('budget', 'images')]}.",
        f"What is read of a model is what its objective declares: {ways}. A method is held against scratch that is "
        "read in the same way.",
    ]
    if seeds == 1:
        texts.append("One seed: what another seed would give was not measured; intervals are over test images alone.")
    else:
        texts.append(
            f"Mean ± deviation of {seeds} seeds; intervals are of 95 %, over test images and seeds. Linear probes "
            "learn from the same labelled images at every seed, fine-tuning from others."
        )
    if held := settings.get("held_out"):
        texts.append(
            f"Pretraining, supervised too, saw no image of the classes {', '.join(map(str, held))}. These are the "
            "classes held out; whatever does not say so is of the other classes alone."
        )
    for number, data in enumerate(settings.get("transfer") or (), 1):
        texts.append(f"Transfer {number} is {data}.")
    for name, kind in {"limit_train": "training", "limit_test": "test"}.items():
        if limit := settings.get(name):
            texts.append(f"Frozen features are of at most {limit:,} {kind} images, fine-tuning's of all.")
    if settings.get("limit_train"):
        texts.append("Shares of the labels are shares of these.")
    return [*texts, "Intervals are not widened for the number of pairs that are compared."]
