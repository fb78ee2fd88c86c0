"""The report of recipes/robustness.py: a table for a terminal, and sections of a page."""

from typing import Any

from sslvit.evaluate.robustness.corruptions import NAMES, STRENGTHS
from sslvit.evaluate.robustness.measure import CLEAN, DROPS, SHARES
from sslvit.evaluate.robustness.summary import MEAN
from sslvit.reports import page
from sslvit.reports.charts import Line, line_chart

HALF = 0.5  # of the patches, whose loss the table shows
NONE = "-"


def percent(value: float | list[float] | None) -> str:
    """A value, or a mean and its interval."""
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{100 * value:.1f}"
    mean, low, high = (100 * one for one in value)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def overview(numbers: dict[str, Any], *, intervals: bool) -> tuple[list[str], list[list[str]]]:
    """A row for each model."""
    accuracy, conflicts = numbers["accuracy"], numbers["outline against colour"]
    sides = [int(name.split()[1]) for name in accuracy if name.startswith("shuffle ")]
    shown = {CLEAN: CLEAN, MEAN: "corrupted"}
    shown |= {f"{kind} drop {HALF:g}": f"{kind} half dropped" for kind in DROPS}
    shown |= {f"shuffle {k}": f"shuffled {k} x {k}" for k in [k for k in sides if k <= 4][-1:]}
    shown = {condition: title for condition, title in shown.items() if condition in accuracy}
    head = ["accuracy, %", *shown.values(), "mCE", "ECE clean", f"ECE strength {STRENGTHS[-1]}"]
    rows, errors = [], numbers["calibration error"]
    for name in accuracy[CLEAN]:
        cells = [accuracy[condition].get(name) for condition in shown]
        cells += [numbers["mean corruption error"][name]]
        texts = [percent(cell if intervals or cell is None else cell[0]) for cell in cells]
        texts += [percent(errors[strength][name]) for strength in ("0", str(STRENGTHS[-1]))]
        rows.append([name, *texts, *([percent_of(conflicts[name]["share"], intervals)] if conflicts else [])])
    return [*head, *(["outline's share"] if conflicts else [])], rows


def percent_of(value: list[float] | None, interval: bool) -> str:
    return percent(value if interval or value is None else value[0])


def lines_of(numbers: dict[str, Any]) -> list[str]:
    """The table and what its columns are, for a terminal."""
    head, rows = overview(numbers, intervals=False)
    widths = [max(map(len, column)) + 2 for column in zip(head, *rows, strict=True)]
    table = [
        first.ljust(widths[0]) + "".join(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        for first, *rest in (head, *rows)
    ]
    return [*table, *notes(numbers)]


def notes(numbers: dict[str, Any]) -> list[str]:
    first, *others = numbers["accuracy"][CLEAN]
    rows, columns = numbers["grid"]
    texts = [
        f"{numbers['images']:,} test images of {numbers['data']}, {numbers['size'][0]} x {numbers['size'][1]}. "
        + ", ".join(f"{name}: {how}" for name, how in numbers["read by"].items())
        + ".",
        f"corrupted: the mean of {len(NAMES)} of ImageNet-C's 15 corruptions (frost, which needs photographs, is left "
        f"out) in five strengths, with the parameters of {numbers['parameters']}. mCE: the mean over corruptions of "
        f"the error as a share of that of {first}. ECE: expected calibration error.",
        f"Dropped: black patches of a grid {rows} x {columns}; salient by the attention of each model itself.",
    ]
    if numbers["outline against colour"]:
        texts.append(
            "outline's share: of objects in the colour of another shape, how many are named by their outline, of those "
            "named by outline or colour."
        )
    for condition, title in ((CLEAN, "clean images"), (MEAN, "corrupted images")):
        for name in others:
            mean, low, high = (100 * one for one in numbers["ahead of the first"][condition][name])
            texts.append(f"{name} against {first}, {title}: {mean:+.1f} points, 95% CI [{low:.1f}, {high:.1f}].")
    return texts


def curve(numbers: dict[str, Any], places: dict[float, str], x: str, *, ticks: list[float], log: bool = False) -> str:
    """Accuracies with intervals. places: the condition of each value of x."""
    lines = []
    for name in numbers["accuracy"][CLEAN]:
        found = {at: numbers["accuracy"][place].get(name) for at, place in places.items()}
        drawn = {at: one for at, one in found.items() if one}
        if len(drawn) > 1:
            y, spread = zip(*(around(one) for one in drawn.values()), strict=True)
            lines.append(Line(name, list(drawn), list(y), list(spread)))
    return line_chart(lines, x=x, y="accuracy, %", ticks=ticks, logarithmic=log, from_zero=True)


def around(one: list[float]) -> tuple[float, float]:
    """The middle of an interval, and how far it reaches, in %."""
    _, low, high = one
    return 50 * (low + high), 50 * (high - low)


def sections(numbers: dict[str, Any]) -> list[str]:
    """Of a page."""
    strengths = {0.0: CLEAN, **{float(one): f"strength {one}" for one in STRENGTHS}}
    levels = [float(one) for one in (0, *STRENGTHS)]
    errors = [
        Line(name, levels, [100 * numbers["calibration error"][str(one)][name] for one in (0, *STRENGTHS)])
        for name in numbers["accuracy"][CLEAN]
    ]
    sides = [1, *(int(name.split()[1]) for name in numbers["accuracy"] if name.startswith("shuffle "))]
    shuffles = {float(k): f"shuffle {k}" if k > 1 else CLEAN for k in sides}
    tenths = [0.0, 20.0, 40.0, 60.0, 80.0]
    drops = {
        kind: {0.0: CLEAN, **{100 * share: f"{kind} drop {share:g}" for share in SHARES}}
        for kind in DROPS
        if f"{kind} drop {HALF:g}" in numbers["accuracy"]
    }
    charts = [
        page.chart(curve(numbers, strengths, "strength", ticks=levels), "Corrupted: the mean over corruptions."),
        page.chart(
            line_chart(errors, x="strength", y="calibration error, %", ticks=levels, from_zero=True),
            "Expected calibration error: the mean over corruptions.",
        ),
        *(
            page.chart(curve(numbers, places, "% of patches dropped", ticks=tenths), f"Dropped: {kind} patches.")
            for kind, places in drops.items()
        ),
        page.chart(curve(numbers, shuffles, "k of a grid k x k", ticks=list(shuffles), log=True), "Patches shuffled."),
    ]
    return [
        page.table(*overview(numbers, intervals=True)),
        page.bullets(notes(numbers)),
        page.columns(*charts),
        page.paragraph("Bars and brackets are 95% intervals over the test images.", "faint"),
        page.heading("By corruption"),
        page.table(*by_corruption(numbers)),
    ]


def as_page(numbers: dict[str, Any]) -> str:
    return page.page(f"Robustness: {numbers['data']}", sections(numbers))


def by_corruption(numbers: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    models = list(numbers["accuracy"][CLEAN])
    rows = [
        [name.replace("_", " "), *(percent(numbers["accuracy"][f"{name} mean"][model][0]) for model in models)]
        for name in NAMES
    ]
    return ["accuracy, %, mean of strengths", *models], rows
