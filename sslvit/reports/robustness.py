"""The report of recipes/robustness.py: a table for a terminal, and sections of a page."""

from typing import Any

from sslvit.evaluate.robustness.corruptions import NAMES, STRENGTHS
from sslvit.evaluate.robustness.measure import CLEAN, DROPS, SHARES
from sslvit.evaluate.robustness.summary import MEAN
from sslvit.evaluate.statistics import Difference
from sslvit.reports import page
from sslvit.reports.charts import Line, line_chart

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


def points(gap: list[float]) -> str:
    mean, low, high = gap
    return Difference(mean, low, high, seeds=1).points


def curve(numbers: dict[str, Any], places: dict[float, str], x: str, *, ticks: list[float], log: bool = False) -> str:
    """Accuracies with intervals. places: the condition of each value of x."""
    lines = []
    for name in numbers["accuracy"][CLEAN]:
        found = {at: one for at, place in places.items() if (one := numbers["accuracy"][place].get(name))}
        if len(found) > 1:
            middles = [50 * (low + high) for _, low, high in found.values()]
            spread = [50 * (high - low) for _, low, high in found.values()]
            lines.append(Line(name, list(found), middles, spread))
    return line_chart(lines, x=x, y="accuracy, %", ticks=ticks, logarithmic=log, from_zero=True)


def charts(numbers: dict[str, Any]) -> list[str]:
    accuracy, errors, levels = numbers["accuracy"], numbers["calibration error"], [0, *STRENGTHS]
    strengths = [float(level) for level in levels]
    calibration = [Line(name, strengths, [100 * errors[str(one)][name] for one in levels]) for name in accuracy[CLEAN]]
    corrupted = {float(one): f"strength {one}" if one else CLEAN for one in levels}
    drops = {
        kind: {0.0: CLEAN} | {100 * share: f"{kind} drop {share:g}" for share in SHARES}
        for kind in DROPS
        if f"{kind} drop {HALF:g}" in accuracy
    }
    shuffled = {1.0: CLEAN} | {float(name.split()[1]): name for name in accuracy if name.startswith("shuffle ")}
    error = line_chart(calibration, x="strength", y="calibration error, %", ticks=strengths, from_zero=True)
    tenths = [0.0, 20.0, 40.0, 60.0, 80.0]
    return [
        page.chart(curve(numbers, corrupted, "strength", ticks=strengths), "Corrupted, the mean over corruptions."),
        page.chart(error, "Calibration error, the mean over corruptions."),
        *(
            page.chart(curve(numbers, one, "% of patches dropped", ticks=tenths), f"Dropped patches: {kind}.")
            for kind, one in drops.items()
        ),
        page.chart(curve(numbers, shuffled, "k of a grid k x k", ticks=list(shuffled), log=True), "Shuffled patches."),
    ]


def sections(numbers: dict[str, Any]) -> list[str]:
    """Of a page."""
    return [
        page.table(*overview(numbers, intervals=True)),
        page.paragraph("Brackets and bars are 95% intervals over the test images.", "faint"),
        page.columns(*charts(numbers)),
        page.bullets(notes(numbers)),
        page.folded("Differences from the first model", page.bullets(differences(numbers))),
        page.folded("Each corruption, the mean of its strengths", page.table(*by_corruption(numbers))),
    ]


def as_page(numbers: dict[str, Any]) -> str:
    return page.page(f"Robustness: {numbers['data']}", sections(numbers))
