"""A comparison's report, as a page and in Markdown."""

import json
from pathlib import Path
from statistics import stdev
from typing import Any

from sslvit.experiments import learning
from sslvit.experiments.claims import ahead_of, in_words, notes, sentences, warnings
from sslvit.experiments.records import TUNED
from sslvit.experiments.results import ROBUSTNESS
from sslvit.experiments.tables import (
    FROZEN,
    accuracy_table,
    ahead_tables,
    balanced_table,
    cost_table,
    groups,
    interval_tables,
    rows_of,
)
from sslvit.reports import page, robustness
from sslvit.reports.charts import Dot, Line, dot_chart, line_chart
from sslvit.reports.run import RunFolder, curves, markdown_table, pictures, records
from sslvit.runs.public import markdown


def by_share(results: dict[str, Any]) -> list[str]:
    """Accuracy over the share of the labels, a figure per way to learn and set of labels."""
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
        caption = "Fine-tuning" if how == TUNED else "Logistic regression on frozen features"
        caption += (f", {place}" if place else "") + ("; bars are deviations over seeds." if several else ".")
        svg = line_chart(lines, x="% of the labels", y="accuracy, %", logarithmic=True, ticks=shares)
        figures.append(page.chart(svg, caption))
    return figures


def fine_tuning(results: dict[str, Any]) -> list[str]:
    """Accuracy over steps, on each share of the labels."""
    columns = learning.columns_of(results)
    if not columns:
        return []
    return [
        page.heading("While fine-tuning"),
        page.bullets([text for column in columns for text in learning.sentences(results, column)]),
        page.columns(*(page.chart(learning.chart(results, column), f"{capitalized(column)}.") for column in columns)),
        page.folded("Accuracy after so many steps", *(page.table(*learning.table(results, one)) for one in columns)),
    ]


def figure(results: dict[str, Any]) -> str:
    """The picture to show: accuracy over steps of fine-tuning, on the last set and largest share of the labels."""
    columns = learning.columns_of(results)
    return page.alone(learning.chart(results, columns[-1])) if columns else ""


def ahead_chart(results: dict[str, Any], column: str) -> str:
    dots = [Dot(name, *gap[:3]) for name, gap in ahead_of(results, "scratch", column).items()]
    return dot_chart(dots, x="points ahead of scratch (95% CI)", origin=0.0)


def every_difference(results: dict[str, Any], column: str) -> str:
    return page.folded(capitalized(column), page.bullets(claims(results, column)))


def claims(results: dict[str, Any], column: str) -> list[str]:
    return [*warnings(results, [column]), *sentences(results, column)]


def capitalized(column: str) -> str:
    return in_words(column).capitalize()


def one_run(name: str, run: RunFolder) -> str:
    return page.folded(name, page.bullets(run.summary()), curves(run), *pictures(run).values(), *records(run.folder))


def as_page(results: dict[str, Any], runs: dict[str, Path], commands: list[str]) -> str:
    """runs: of each method, the run of the first seed."""
    shown, compared = groups(results), dict.fromkeys(one["column"] for one in results["differences"])
    linear = [name for name in first_of(shown, FROZEN) if name in compared]
    lead = [*first_of(shown, TUNED)[:1], *linear[-1:]]
    blocks = [
        page.bullets(warnings(results)),
        page.bullets([text for name in lead[:1] for text in sentences(results, name, to_scratch=True)]),
        page.columns(*(page.chart(ahead_chart(results, name), capitalized(name)) for name in lead)),
    ]
    for title, columns in shown.items():
        blocks += [page.heading(title.capitalize()), page.table(*accuracy_table(results, title, columns))]
        if balanced := balanced_table(results, title, columns):
            blocks.append(page.table(*balanced))
    blocks += [
        page.columns(*by_share(results)),
        page.bullets([*notes(results), *learning.tried(results)]),
        *fine_tuning(results),
        page.heading("Gain from pretraining"),
        *([page.table(*one) for one in ahead_tables(results)] or [page.paragraph("No difference is reported.")]),
        *([page.heading("Robustness"), *robustness.sections(found)] if (found := results.get(ROBUSTNESS)) else []),
        page.heading("Cost"),
        page.table(*cost_table(results)),
        page.folded("All differences", *(every_difference(results, name) for name in compared)),
        page.folded("Means and their intervals", *(page.table(*one) for one in interval_tables(results))),
        page.heading("How each was trained") if runs else "",
        *(one_run(name, RunFolder(folder)) for name, folder in runs.items()),
        page.folded("Settings", page.code(json.dumps(results["settings"], indent=1))),
        page.folded("Commands", page.code("\n".join(commands)) if commands else ""),
    ]
    return page.page(heading_of(results), blocks)


def first_of(shown: dict[str, list[str]], kind: str) -> list[str]:
    """The columns of this kind on the first set of labels."""
    return next((columns for title, columns in shown.items() if title.rpartition(", ")[2] == kind), [])


def heading_of(results: dict[str, Any]) -> str:
    return f"Gain from pretraining: {results['data']}"


def as_markdown(results: dict[str, Any]) -> str:
    """Without times, so that a comparison that was stopped and continued has the same."""

    def bullets(texts: list[str]) -> list[str]:
        return [*(f"- {markdown(text)}" for text in texts), ""] if texts else []

    def table(head: list[str], rows: list[list[str]], *_: Any) -> list[str]:
        first, *rest = ([markdown(cell) for cell in row] for row in (head, *rows))
        return [*markdown_table(first, rest), ""]

    lines = [f"# {markdown(heading_of(results))}", "", *bullets(warnings(results))]
    for title, columns in groups(results).items():
        lines += table(*accuracy_table(results, title, columns, timed=False))
        if balanced := balanced_table(results, title, columns):
            lines += table(*balanced)
    lines += bullets([*notes(results), *learning.tried(results)])
    for column in learning.columns_of(results):
        lines += [*table(*learning.table(results, column)), *bullets(learning.sentences(results, column))]
    for one in [*ahead_tables(results), *interval_tables(results)]:
        lines += table(*one)
    if found := results.get(ROBUSTNESS):
        lines += ["## Robustness", "", *robustness.as_markdown(found), ""]
    for name in dict.fromkeys(one["column"] for one in results["differences"]):
        lines += [f"## {markdown(capitalized(name))}", "", *bullets(claims(results, name))]
    return "\n".join(lines)
