"""A comparison's results for the eye: the page, and the same in Markdown."""

import json
from pathlib import Path
from statistics import stdev
from typing import Any

import torch

from sslvit import page
from sslvit.charts import Dot, Line, dot_chart, line_chart
from sslvit.claims import MARK, SUPERVISED, ahead_of, in_words, notes, one_class, sentences, warnings
from sslvit.evaluate.baselines import COMMONEST, PIXELS
from sslvit.records import duration
from sslvit.report import Run, curves, files, markdown_table, pictures
from sslvit.results import TUNED
from sslvit.statistics import over_seeds

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
    """The columns of each table, by its title: fine-tuned and frozen, of each set that is learned."""
    found: dict[tuple[str, bool], list[str]] = {}
    for name in results["values"]:
        place, _, column = name.rpartition(": ")
        found.setdefault((place, column.startswith(TUNED)), []).append(name)
    places = list(dict.fromkeys(place for place, _ in found))
    ordered = sorted(found, key=lambda one: (places.index(one[0]), not one[1]))
    kinds = {True: TUNED, False: FROZEN}
    return {f"{place}, {kinds[tuned]}" if place else kinds[tuned]: found[place, tuned] for place, tuned in ordered}


def rows_of(results: dict[str, Any], columns: list[str]) -> list[str]:
    """Whose numbers these columns hold: first what no model gives, where it was measured."""
    return [name for name in (COMMONEST, PIXELS, *results["methods"]) if name in results["values"][columns[0]]]


def best_of(values: list[list[list[float]]]) -> set[tuple[int, int]]:
    """The cells, by row and column of a table, of the highest accuracy as it is shown: all, where several are equal."""
    best = set()
    for j, column in enumerate(zip(*values, strict=True)):
        shown = [round(100 * sum(each) / len(each), 1) for each in column]
        best |= {(i, j + 1) for i, value in enumerate(shown) if value == max(shown)}
    return best


def named(title: str, columns: list[str]) -> list[str]:
    """The columns of a table, whose title says the rest."""
    first = "accuracy, %" if title == FROZEN else f"{title}, %"
    return [first, *(name.rpartition(": ")[2].removeprefix(TUNED).lstrip() for name in columns)]


def accuracy_table(
    results: dict[str, Any], title: str, columns: list[str], *, timed: bool = True
) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """timed: with seconds beside the numbers, which are never the same again, or with operations."""
    names = rows_of(results, columns)
    values = [[results["values"][column][name] for column in columns] for name in names]
    rows = []
    for name, each in zip(names, values, strict=True):
        marks = [f" {MARK}" if name in one_class(results, column) else "" for column in columns]
        cells = [cell(one) + mark for one, mark in zip(each, marks, strict=True)]
        rows.append([name, *cells, cost_in_short(results["costs"].get(name, []), timed=timed)])
    head = [*named(title, columns), f"images, {'time' if timed else 'operations'}"]
    return head, rows, best_of(values)


def balanced_table(
    results: dict[str, Any], title: str, columns: list[str]
) -> tuple[list[str], list[list[str]], set[tuple[int, int]]] | None:
    """Balanced accuracies, of columns whose predictions are kept, where the test classes are unbalanced."""
    kept = results.get("balanced", {})
    columns = [column for column in columns if column in kept]
    if not columns:
        return None
    names = [name for name in rows_of(results, columns) if name in kept[columns[-1]]]
    values = [[kept[column][name] for column in columns] for name in names]
    rows = [[name, *map(cell, each)] for name, each in zip(names, values, strict=True)]
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
    return ["pretraining", "images", "time", "images/s", "operations", "peak memory", "device"], rows


def by_share(results: dict[str, Any]) -> list[str]:
    """Accuracy over the share of the labels, a figure for each way to learn and each set that is learned."""
    kinds: dict[str, list[str]] = {}
    for column in (column for column in results["values"] if column.endswith("%")):
        kinds.setdefault(column.rsplit(" ", 2)[0], []).append(column)
    several, figures = len(results["seeds"]) > 1, []
    for kind, columns in kinds.items():
        shares = [float(column.split()[-2]) for column in columns]
        if len(shares) < 2:
            continue
        lines, rows = [], rows_of(results, columns)
        for name in sorted(
            rows, key=lambda name: name not in results["methods"]
        ):  # a method's colour is always the same
            values = [results["values"][column][name] for column in columns]
            spread = [100 * stdev(v) for v in values] if several and name in results["methods"] else None
            lines.append(Line(name, shares, [100 * sum(v) / len(v) for v in values], spread))
        place, _, how = kind.rpartition(": ")
        caption = "All weights trained" if how == TUNED else "Logistic regression on frozen features"
        caption += (f", {place}" if place else "") + ("; bars are deviations over seeds." if several else ".")
        svg = line_chart(lines, x="% of the labels", y="accuracy, %", logarithmic=True, ticks=shares)
        figures.append(page.chart(svg, caption))
    return figures


def header(first: str, columns: list[str]) -> list[str]:
    """Of columns that are all of one set, which is said once."""
    place = columns[0].rpartition(": ")[0]
    return [f"{first}, {place}" if place else first, *(column.rpartition(": ")[2] for column in columns)]


def ahead_table(results: dict[str, Any], base: str, columns: list[str]) -> tuple[list[str], list[list[str]]]:
    """Without a number where either classifier answers one class."""
    by_column, rows = [ahead_of(results, base, column) for column in columns], []
    for name in results["methods"]:
        found = [each.get(name) for each in by_column]
        if any(found):
            rows.append([name, *(f"{x.mean:+.1f} [{x.low:.1f}, {x.high:.1f}]" if x else NONE for x in found)])
    return header(f"points ahead of {base}", columns), rows


def ahead_chart(results: dict[str, Any], column: str) -> str:
    dots = [Dot(name, *found[:3]) for name, found in ahead_of(results, "scratch", column).items()]
    return dot_chart(dots, x="points ahead of scratch (95 %)", origin=0.0)


def interval_table(results: dict[str, Any], columns: list[str]) -> tuple[list[str], list[list[str]]]:
    """Means and Student's intervals for them over seeds."""
    rows = []
    for name in results["methods"]:
        found = [over_seeds(results["values"][column][name]) for column in columns]
        cells = [f"{100 * x.mean:.1f} [{100 * x.low:.1f}, {100 * x.high:.1f}]" for x in found]
        rows.append([name, *cells])
    return header("%, over seeds alone", columns), rows


def interval_tables(results: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """None for one seed, of which there is no spread."""
    several = len(results["seeds"]) > 1
    return [interval_table(results, columns) for columns in groups(results).values()] if several else []


def every_difference(results: dict[str, Any], column: str) -> str:
    told = [*warnings(results, [column]), *sentences(results, column)]
    return page.folded(in_words(column).capitalize(), page.bullets(told))


def one_run(name: str, run: Run) -> str:
    return page.folded(name, page.bullets(run.summary()), curves(run), *pictures(run).values(), *files(run))


def ahead_tables(results: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Against scratch, and against supervised training where it took part."""
    told = {one["column"] for one in results["differences"]}
    bases = ["scratch", *(name for name in results["methods"] if name.startswith(SUPERVISED))]
    by_group = [[name for name in columns if name in told] for columns in groups(results).values()]
    tables = [ahead_table(results, base, columns) for base in bases for columns in by_group if columns]
    return [(head, rows) for head, rows in tables if rows]


def as_page(results: dict[str, Any], runs: dict[str, Path], commands: list[str]) -> str:
    """runs: of each method, the run of the first seed."""
    shown, told = groups(results), dict.fromkeys(one["column"] for one in results["differences"])
    linear = [name for name in shown[FROZEN] if name in told]
    lead = [*shown.get(TUNED, [])[:1], *linear[-1:]]
    parts = [
        page.bullets(warnings(results)),
        page.bullets([text for name in lead[:1] for text in sentences(results, name, to_scratch=True)]),
        page.columns(*(page.chart(ahead_chart(results, name), in_words(name).capitalize()) for name in lead)),
    ]
    for title, columns in shown.items():
        parts += [page.heading(title.capitalize()), page.table(*accuracy_table(results, title, columns))]
        if balanced := balanced_table(results, title, columns):
            parts.append(page.table(*balanced))
    parts += [
        page.columns(*by_share(results)),
        page.bullets(notes(results)),
        page.heading("What pretraining was worth"),
        *([page.table(*one) for one in ahead_tables(results)] or [page.paragraph("No difference is reported.")]),
        page.heading("Cost"),
        page.table(*cost_table(results)),
        page.folded("What every difference supports", *(every_difference(results, name) for name in told)),
        page.folded("Means and their intervals", *(page.table(*one) for one in interval_tables(results))),
        page.heading("How each was trained") if runs else "",
        *(one_run(name, Run(folder)) for name, folder in runs.items()),
        page.folded("Settings", page.code(json.dumps(results["settings"], indent=1))),
        page.folded("Commands", page.code("\n".join(commands)) if commands else ""),
    ]
    return page.page(heading_of(results), parts)


def heading_of(results: dict[str, Any]) -> str:
    return f"What pretraining bought: {results['data']}"


def as_markdown(results: dict[str, Any]) -> str:
    """Without times, so that it is the same for a comparison that was stopped and went on."""

    def bullets(texts: list[str]) -> list[str]:
        return [*(f"- {page.markdown(text)}" for text in texts), ""] if texts else []

    def table(head: list[str], rows: list[list[str]], *_: Any) -> list[str]:
        first, *rest = ([page.markdown(cell) for cell in row] for row in (head, *rows))
        return [*markdown_table(first, rest), ""]

    parts = [f"# {page.markdown(heading_of(results))}", "", *bullets(warnings(results))]
    for title, columns in groups(results).items():
        parts += table(*accuracy_table(results, title, columns, timed=False))
        if balanced := balanced_table(results, title, columns):
            parts += table(*balanced)
    parts += bullets(notes(results))
    for one in [*ahead_tables(results), *interval_tables(results)]:
        parts += table(*one)
    for name in dict.fromkeys(one["column"] for one in results["differences"]):
        told = [*warnings(results, [name]), *sentences(results, name)]
        parts += [f"## {page.markdown(in_words(name).capitalize())}", "", *bullets(told)]
    return "\n".join(parts)
