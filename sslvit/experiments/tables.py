"""A comparison's tables: headers and rows of text, for the page and for Markdown."""

from typing import Any

import torch

from sslvit.evaluate.baselines import COMMONEST, PIXELS
from sslvit.evaluate.statistics import over_seeds
from sslvit.experiments.claims import MARK, SUPERVISED, ahead_of, one_class, without_space
from sslvit.experiments.records import TUNED
from sslvit.runs.log import duration

FROZEN, NONE = "frozen features", "—"


def cell(values: list[float]) -> str:
    """The mean, and the deviation over seeds if there are several."""
    tensor = 100 * torch.tensor(values, dtype=torch.float64)
    return f"{tensor.mean():.1f}" + (f" ± {tensor.std():.1f}" if len(values) > 1 else "")


def cost_in_short(costs: list[dict[str, Any]], *, timed: bool) -> str:
    if not costs:
        return "none"
    flops, seconds = costs[0]["flops"], sum(cost["seconds"] for cost in costs) / len(costs)
    counted = "-" if flops is None else f"{flops:.1e}".replace("e+", "e")
    return f"{costs[0]['images']:,}, {duration(seconds) if timed else counted}"


def groups(results: dict[str, Any]) -> dict[str, list[str]]:
    """The columns of each table, by its title: fine-tuned and frozen, on each set of labels."""
    places: dict[str, dict[str, list[str]]] = {}
    for name in results["values"]:
        place, _, column = name.rpartition(": ")
        places.setdefault(place, {TUNED: [], FROZEN: []})[TUNED if column.startswith(TUNED) else FROZEN].append(name)
    return {
        f"{place}, {kind}" if place else kind: columns
        for place, kinds in places.items()
        for kind, columns in kinds.items()
        if columns
    }


def rows_of(results: dict[str, Any], columns: list[str]) -> list[str]:
    """The names of the rows of these columns: first the baselines without a model, where they were measured."""
    return [name for name in (COMMONEST, PIXELS, *results["methods"]) if name in results["values"][columns[0]]]


def best_of(values: list[list[list[float]]]) -> set[tuple[int, int]]:
    """The cells, by row and column of a table, of the highest accuracy as it is rounded; of equals all."""
    best = set()
    for j, column in enumerate(zip(*values, strict=True)):
        shown = [round(100 * sum(each) / len(each), 1) for each in column]
        best |= {(i, j + 1) for i, value in enumerate(shown) if value == max(shown)}
    return best


def named(title: str, columns: list[str]) -> list[str]:
    """The header of a table."""
    first = "accuracy, %" if title == FROZEN else f"{title}, %"
    return [first, *(without_space(name.rpartition(": ")[2].removeprefix(TUNED).lstrip()) for name in columns)]


def row_name(title: str, name: str) -> str:
    """Of frozen features, nothing is trained from scratch: scratch (cls) is random start (cls)."""
    return name.replace("scratch", "random start", 1) if FROZEN in title and name.startswith("scratch (") else name


def accuracy_table(
    results: dict[str, Any], title: str, columns: list[str], *, timed: bool = True
) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """timed: with seconds beside the accuracies, which no other run repeats, instead of FLOPs."""
    names = rows_of(results, columns)
    values = [[results["values"][column][name] for column in columns] for name in names]
    rows = []
    for name, each in zip(names, values, strict=True):
        marks = [f" {MARK}" if name in one_class(results, column) else "" for column in columns]
        cells = [cell(one) + mark for one, mark in zip(each, marks, strict=True)]
        rows.append([row_name(title, name), *cells, cost_in_short(results["costs"].get(name, []), timed=timed)])
    head = [*named(title, columns), f"images, {'time' if timed else 'FLOPs'}"]
    return head, rows, best_of(values)


def balanced_table(
    results: dict[str, Any], title: str, columns: list[str]
) -> tuple[list[str], list[list[str]], set[tuple[int, int]]] | None:
    """Balanced accuracies where the test classes are unbalanced, of columns that have them."""
    balanced = results.get("balanced", {})
    columns = [column for column in columns if column in balanced]
    if not columns:
        return None
    names = [name for name in rows_of(results, columns) if name in balanced[columns[-1]]]
    values = [[balanced[column][name] for column in columns] for name in names]
    rows = [[row_name(title, name), *map(cell, each)] for name, each in zip(names, values, strict=True)]
    _, *rest = named(title, columns)
    return [f"{title}, balanced accuracy, %", *rest], rows, best_of(values)


def cost_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, costs in results["costs"].items():
        if not costs:
            rows.append([name, "0", "-", "-", "-", "-", "-"])
            continue
        first, seconds = costs[0], [cost["seconds"] for cost in costs]
        memory, devices = max(cost["peak_memory_bytes"] for cost in costs), dict.fromkeys(c["device"] for c in costs)
        mean = sum(seconds) / len(seconds)
        rows.append(
            [
                name,
                f"{first['images']:,}",
                duration(mean),
                f"{first['images'] / mean:,.0f}",
                "-" if first["flops"] is None else f"{first['flops']:.2e}",
                f"{memory / 2**20:,.0f} MiB",
                ", ".join(devices),
            ]
        )
    return ["pretraining", "images", "time", "images/s", "FLOPs", "peak memory", "device"], rows


def header(first: str, columns: list[str]) -> list[str]:
    """With the set of labels, which is the same for all columns, in the first cell."""
    place = columns[0].rpartition(": ")[0]
    names = [without_space(column.rpartition(": ")[2]) for column in columns]
    return [f"{first}, {place}" if place else first, *names]


def ahead_table(results: dict[str, Any], base: str, columns: list[str]) -> tuple[list[str], list[list[str]]]:
    """Without a number where either classifier predicts one class."""
    by_column, rows = [ahead_of(results, base, column) for column in columns], []
    for name in results["methods"]:
        gaps = [each.get(name) for each in by_column]
        if any(gaps):
            rows.append([name, *(f"{x.mean:+.1f} [{x.low:.1f}, {x.high:.1f}]" if x else NONE for x in gaps)])
    return header(f"points ahead of {base}", columns), rows


def ahead_tables(results: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Against scratch, and against supervised training where it took part."""
    compared = {one["column"] for one in results["differences"]}
    bases = ["scratch", *(name for name in results["methods"] if name.startswith(SUPERVISED))]
    by_group = [[name for name in columns if name in compared] for columns in groups(results).values()]
    tables = [ahead_table(results, base, columns) for base in bases for columns in by_group if columns]
    return [(head, rows) for head, rows in tables if rows]


def interval_table(results: dict[str, Any], columns: list[str]) -> tuple[list[str], list[list[str]]]:
    """Means and Student's intervals for them over seeds."""
    rows = []
    for name in results["methods"]:
        intervals = [over_seeds(results["values"][column][name]) for column in columns]
        cells = [f"{100 * x.mean:.1f} [{100 * x.low:.1f}, {100 * x.high:.1f}]" for x in intervals if x is not None]
        rows.append([name, *cells])
    return header("%, over seeds alone", columns), rows


def interval_tables(results: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """None with one seed, which has no spread."""
    several = len(results["seeds"]) > 1
    return [interval_table(results, columns) for columns in groups(results).values()] if several else []
