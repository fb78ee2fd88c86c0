"""The results of a comparison: every number of its parts, and in words what the differences support."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from sslvit.evaluate.predictions import load_predictions
from sslvit.model_folder import described
from sslvit.statistics import Difference, difference, sentence

SCRATCH, SUPERVISED = "scratch", "supervised"


def collect(out: Path, methods: dict[str, str], seeds: list[int], models: dict[str, Path]) -> dict[str, Any]:
    """methods: names by folder. models: the model of a method and seed, by "method-seed". Accuracies are lists, one for
    each seed; differences are of which test images were right."""
    values: dict[str, dict[str, list[float]]] = {}
    right: dict[str, dict[str, list[Tensor]]] = {}
    for method, name in methods.items():
        for seed in seeds:
            readout = described(models[f"{method}-{seed}"])["readout"]
            for file in sorted((out / "probes" / f"{method}-{seed}").glob("*/numbers.json")):
                numbers = json.loads(file.read_text())[f"pretrained/{readout}"]
                where = "" if file.parent.name == "own" else f"{file.parent.name}: "
                for column, value in numbers.items():
                    if "-nn" in column or column.startswith("linear") or column.endswith("-shot"):
                        values.setdefault(where + column, {}).setdefault(name, []).append(value)
                for column in (column for column in numbers if column.startswith("linear")):
                    share = float(column.split()[1]) / 100
                    hit = hits(file.with_name(f"pretrained-{readout}-{share:g}.parquet"))
                    right.setdefault(where + column, {}).setdefault(name, []).append(hit)
            for file in sorted((out / "finetuned" / f"{method}-{seed}").glob("*/test.json"), key=fraction_of):
                column = f"fine-tuned {100 * fraction_of(file):g} %"
                values.setdefault(column, {}).setdefault(name, []).append(json.loads(file.read_text())["top1"])
                right.setdefault(column, {}).setdefault(name, []).append(hits(file.with_name("predictions.parquet")))
    costs = {name: cost_of(out, method, seeds) for method, name in methods.items()}
    found = [
        {"column": column, "first": a, "second": b} | difference(by_method[a], by_method[b])._asdict()
        for column, by_method in right.items()
        for i, b in enumerate(by_method)
        for a in list(by_method)[i + 1 :]
    ]
    return {"methods": list(methods.values()), "seeds": seeds, "values": values, "costs": costs, "differences": found}


def hits(predictions: Path) -> Tensor:
    """Whether each image was right, in the order of their ids."""
    found = load_predictions(predictions)
    return (found.probabilities.argmax(-1) == found.labels)[found.ids.argsort()]


def fraction_of(file: Path) -> float:
    return float(file.parent.name)


def cost_of(out: Path, method: str, seeds: list[int]) -> list[dict[str, Any]]:
    files = [out / "runs" / f"{method}-{seed}" / "cost.json" for seed in seeds]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def in_words(column: str) -> str:
    """The linear 100 % of classes held out: by a linear probe with 100 % of the labels of classes held out."""
    place, _, column_there = column.rpartition(": ")
    how, _, share = column_there.partition(" ")
    how = "when fine-tuned" if how == "fine-tuned" else "by a linear probe"
    return f"{how} with {share} of the labels" + (f" of {place}" if place else "")


def sentences(results: dict[str, Any], column: str) -> list[str]:
    """What the differences of a column support, those to scratch first."""
    where = in_words(column)
    mine = [one for one in results["differences"] if one["column"] == column]
    mine.sort(key=lambda one: SCRATCH not in (one["first"], one["second"]))
    return [
        sentence(one["first"], one["second"], Difference(one["mean"], one["low"], one["high"], one["seeds"]), where)
        + "."
        for one in mine
    ]


def ahead_of(results: dict[str, Any], base: str, column: str) -> dict[str, Difference]:
    """Every other method against this one, in points."""
    found = {}
    for one in results["differences"]:
        if one["column"] == column and base in (one["first"], one["second"]):
            sign = 100 if one["second"] == base else -100
            low, high = sorted((sign * one["low"], sign * one["high"]))
            other = one["first"] if one["second"] == base else one["second"]
            found[other] = Difference(sign * one["mean"], low, high, one["seeds"])
    return {name: found[name] for name in results["methods"] if name in found}


def notes(results: dict[str, Any]) -> list[str]:
    seeds = len(results["seeds"])
    texts = ["Every method started from scratch's weights and was read by the readout that its objective declares."]
    if seeds == 1:
        texts.append("One seed: what another seed would give was not measured; intervals are over test images alone.")
    else:
        texts.append(f"Mean ± deviation of {seeds} seeds; intervals are of 95 %, over test images and seeds.")
    if held := results["settings"].get("held_out"):
        texts.append(f"Pretraining, supervised too, saw no image of the classes {', '.join(map(str, held))}.")
    for number, data in enumerate(results["settings"].get("transfer") or (), 1):
        texts.append(f"Transfer {number} is {data}, of which pretraining saw nothing.")
    if limit := results["settings"].get("limit_train"):
        texts.append(f"Frozen features were read on at most {limit:,} training images; shares of labels are of these.")
    return [*texts, "Intervals are not widened for the number of pairs that are compared."]
