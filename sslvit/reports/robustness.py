"""The report of recipes/robustness.py: a table for a terminal, and sections of a page."""

from typing import Any

from sslvit.evaluate.robustness.corruptions import NAMES, STRENGTHS
from sslvit.evaluate.robustness.measure import CLEAN, DROPS, SHARES
from sslvit.evaluate.robustness.summary import MEAN
from sslvit.evaluate.statistics import Difference
from sslvit.reports import page
from sslvit.reports.charts import Line, line_chart
from sslvit.reports.run import markdown_table
from sslvit.runs.public import markdown

HALF = 0.5  # of the patches, whose loss the table shows
NONE = "-"


def percent(one: list[float] | float | None, intervals: bool) -> str:
    """A value, or a mean and its interval."""
    if one is None:
        return NONE
    if isinstance(one, float):
        return f"{100 * one:.1f}"
    mean, low, high = (100 * value for value in one)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]" if intervals else f"{mean:.1f}"


def overview(numbers: dict[str, Any], *, intervals: bool) -> tuple[list[str], list[list[str]]]:
    """A column for each model."""
    accuracy, errors, conflicts = (
        numbers[name] for name in ("accuracy", "calibration error", "outline against colour")
    )
    shown = {CLEAN: "unchanged", MEAN: "corrupted"}
    shown |= {f"{kind} drop {HALF:g}": f"half dropped, {kind}" for kind in DROPS}
    shown |= {f"shuffle {k}": f"shuffled {k} x {k}" for k in (2, 4)}
    table = {title: accuracy[condition] for condition, title in shown.items() if condition in accuracy}
    table["mean corruption error"] = numbers["mean corruption error"]
    table["calibration error"] = errors["0"]
    table[f"calibration error, strength {STRENGTHS[-1]}"] = errors[str(STRENGTHS[-1])]
    if conflicts:
        table["outline against colour"] = {name: one["share"] for name, one in conflicts.items()}
    models = list(accuracy[CLEAN])
    rows = [[title, *(percent(row.get(name), intervals) for name in models)] for title, row in table.items()]
    return ["accuracy, %", *models], rows


def by_corruption(numbers: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    models, accuracy = list(numbers["accuracy"][CLEAN]), numbers["accuracy"]
    rows = [
        [one.replace("_", " "), *(percent(accuracy[f"{one} mean"][name], False) for name in models)] for one in NAMES
    ]
    return ["accuracy, %", *models], rows


def lines_of(numbers: dict[str, Any]) -> list[str]:
    """The table and what its rows are, for a terminal."""
    head, rows = overview(numbers, intervals=False)
    first, *widths = [max(map(len, column)) + 2 for column in zip(head, *rows, strict=True)]
    table = [
        title.ljust(first) + "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        for title, *cells in (head, *rows)
    ]
    return [*table, *notes(numbers), *differences(numbers)]


def notes(numbers: dict[str, Any]) -> list[str]:
    first, *_ = numbers["accuracy"][CLEAN]
    (height, width), (rows, columns) = numbers["size"], numbers["grid"]
    texts = [
        f"{numbers['images']:,} test images of {numbers['data']}, {height} x {width}. Answers by "
        + ", ".join(f"{how} ({name})" for name, how in numbers["read by"].items())
        + ".",
        f"Corrupted: the mean of {len(NAMES)} of ImageNet-C's 15 corruptions, without frost, which needs photographs, "
        f"in five strengths, with the parameters of {numbers['parameters']}. Mean corruption error: over corruptions, "
        f"the error as a share of that of {first}. Calibration error: the expected one, in 15 bins.",
        f"Dropped: black patches of a grid {rows} x {columns}, salient by each model's own attention.",
    ]
    if numbers["outline against colour"]:
        texts.append(
            "Outline against colour: objects have the colour that another shape tends to. Of the answers that name "
            "either shape, the share of those that name the object's."
        )
    return texts


def differences(numbers: dict[str, Any]) -> list[str]:
    """From the first model, on the same images."""
    first, *others = numbers["accuracy"][CLEAN]
    texts = []
    for name in others:
        clean, corrupted = (numbers["ahead of the first"][condition][name] for condition in (CLEAN, MEAN))
        texts.append(f"{name} against {first}: {points(clean)}; corrupted {points(corrupted)}")
    return texts


def as_markdown(numbers: dict[str, Any]) -> list[str]:
    """Lines of the tables, the notes and the differences."""
    head, rows = overview(numbers, intervals=True)
    head, *rows = ([markdown(cell) for cell in row] for row in (head, *rows))
    texts = [*notes(numbers), *differences(numbers)]
    return [*markdown_table(head, rows), "", *(f"- {markdown(text)}" for text in texts)]


def points(gap: list[float]) -> str:
    mean, low, high = gap
    return Difference(mean, low, high, seeds=1).points


def curve(numbers: dict[str, Any], places: dict[float, str], x: str, *, ticks: list[float], log: bool = False) -> str:
    """Accuracies with intervals. places: the condition of each value of x."""
    lines = []
    for name in numbers["accuracy"][CLEAN]:
        found = {at: one for at, place in places.items() if (one := numbers["accuracy"][place].get(name))}
        if len(found) > 1:
            means = [100 * mean for mean, _, _ in found.values()]
            spread = [50 * (high - low) for _, low, high in found.values()]
            lines.append(Line(name, list(found), means, spread))
    return line_chart(lines, x=x, y="accuracy, %", ticks=ticks, logarithmic=log, from_zero=True)


def charts(numbers: dict[str, Any]) -> dict[str, str]:
    """By caption."""
    accuracy, errors, levels = numbers["accuracy"], numbers["calibration error"], [0, *STRENGTHS]
    strengths, tenths = [float(level) for level in levels], [0.0, 20.0, 40.0, 60.0, 80.0]
    calibration = [Line(name, strengths, [100 * errors[str(one)][name] for one in levels]) for name in accuracy[CLEAN]]
    corrupted = {float(one): f"strength {one}" if one else CLEAN for one in levels}
    shuffled = {1.0: CLEAN} | {float(name.split()[1]): name for name in accuracy if name.startswith("shuffle ")}
    found = {
        "Corrupted, the mean over corruptions.": curve(numbers, corrupted, "strength", ticks=strengths),
        "Calibration error, the mean over corruptions.": line_chart(
            calibration, x="strength", y="calibration error, %", ticks=strengths, from_zero=True
        ),
    }
    for kind in DROPS:
        if f"{kind} drop {HALF:g}" in accuracy:
            places = {0.0: CLEAN} | {100 * share: f"{kind} drop {share:g}" for share in SHARES}
            found[f"Dropped patches: {kind}."] = curve(numbers, places, "% of patches dropped", ticks=tenths)
    return found | {"Shuffled patches.": curve(numbers, shuffled, "k of a grid k x k", ticks=list(shuffled), log=True)}


def sections(numbers: dict[str, Any]) -> list[str]:
    """Of a page."""
    return [
        page.table(*overview(numbers, intervals=True)),
        page.paragraph("Brackets and bars are 95% intervals over the test images.", "faint"),
        page.columns(*(page.chart(svg, caption) for caption, svg in charts(numbers).items())),
        page.bullets(notes(numbers)),
        page.folded("Differences from the first model", page.bullets(differences(numbers))),
        page.folded("Each corruption, the mean of its strengths", page.table(*by_corruption(numbers))),
    ]


def as_page(numbers: dict[str, Any]) -> str:
    return page.page(f"Robustness: {numbers['data']}", sections(numbers))
