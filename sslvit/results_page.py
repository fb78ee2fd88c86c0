"""A comparison's results for the eye: the page, and the same in Markdown."""

import json
from pathlib import Path
from statistics import stdev
from typing import Any

from sslvit import page
from sslvit.charts import Dot, Line, dot_chart, line_chart
from sslvit.claims import ahead_of, in_words, notes, sentences, warnings
from sslvit.public import markdown
from sslvit.report import Run, curves, files, markdown_table, pictures
from sslvit.results import TUNED
from sslvit.results_tables import (
    FROZEN,
    accuracy_table,
    ahead_tables,
    balanced_table,
    cost_table,
    groups,
    interval_tables,
    rows_of,
)


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
        for name in sorted(rows, key=lambda name: name not in results["methods"]):  # so that methods keep their colours
            values = [results["values"][column][name] for column in columns]
            spread = [100 * stdev(v) for v in values] if several and name in results["methods"] else None
            lines.append(Line(name, shares, [100 * sum(v) / len(v) for v in values], spread))
        place, _, how = kind.rpartition(": ")
        caption = "All weights trained" if how == TUNED else "Logistic regression on frozen features"
        caption += (f", {place}" if place else "") + ("; bars are deviations over seeds." if several else ".")
        svg = line_chart(lines, x="% of the labels", y="accuracy, %", logarithmic=True, ticks=shares)
        figures.append(page.chart(svg, caption))
    return figures


def ahead_chart(results: dict[str, Any], column: str) -> str:
    dots = [Dot(name, *found[:3]) for name, found in ahead_of(results, "scratch", column).items()]
    return dot_chart(dots, x="points ahead of scratch (95 %)", origin=0.0)


def every_difference(results: dict[str, Any], column: str) -> str:
    told = [*warnings(results, [column]), *sentences(results, column)]
    return page.folded(in_words(column).capitalize(), page.bullets(told))


def one_run(name: str, run: Run) -> str:
    return page.folded(name, page.bullets(run.summary()), curves(run), *pictures(run).values(), *files(run))


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
        return [*(f"- {markdown(text)}" for text in texts), ""] if texts else []

    def table(head: list[str], rows: list[list[str]], *_: Any) -> list[str]:
        first, *rest = ([markdown(cell) for cell in row] for row in (head, *rows))
        return [*markdown_table(first, rest), ""]

    parts = [f"# {markdown(heading_of(results))}", "", *bullets(warnings(results))]
    for title, columns in groups(results).items():
        parts += table(*accuracy_table(results, title, columns, timed=False))
        if balanced := balanced_table(results, title, columns):
            parts += table(*balanced)
    parts += bullets(notes(results))
    for one in [*ahead_tables(results), *interval_tables(results)]:
        parts += table(*one)
    for name in dict.fromkeys(one["column"] for one in results["differences"]):
        told = [*warnings(results, [name]), *sentences(results, name)]
        parts += [f"## {markdown(in_words(name).capitalize())}", "", *bullets(told)]
    return "\n".join(parts)
