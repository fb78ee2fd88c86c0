"""Charts as SVG text: readable on paper, on a phone and in the dark, with nothing but this file.

Lines are told apart by colour, by marker and by a label at their end; text and axes take the page's colour.
"""

import math
from html import escape
from itertools import pairwise
from typing import NamedTuple

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888", "#994f00")  # Tol's bright
MARKERS = ("circle", "square", "diamond", "triangle")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 260, 50, 148, 12, 42


class Line(NamedTuple):
    name: str
    x: list[float]
    y: list[float]
    spread: list[float] | None = None  # to either side of y


def line_chart(
    lines: list[Line], *, x: str, y: str, logarithmic: bool = False, ticks: list[float] | None = None
) -> str:
    """x, y: what the axes are. logarithmic: the x axis. ticks: where the x axis is labelled, if not where it fits."""
    lines = [clean(line) for line in lines]
    lines = [line for line in lines if line.x]
    if not lines:
        return ""
    xs, spreads = [v for line in lines for v in line.x], [line.spread or [0.0] * len(line.y) for line in lines]
    lows = [v - s for line, spread in zip(lines, spreads, strict=True) for v, s in zip(line.y, spread, strict=True)]
    highs = [v + s for line, spread in zip(lines, spreads, strict=True) for v, s in zip(line.y, spread, strict=True)]
    y_ticks = nice_ticks(min(lows), max(highs))
    x_ticks = ticks or nice_ticks(min(xs), max(xs))
    across = Scale(min([*xs, *(ticks or [])]), max([*xs, *(ticks or [])]), LEFT, WIDTH - RIGHT, logarithmic)
    up = Scale(min(y_ticks[0], *lows), max(y_ticks[-1], *highs), HEIGHT - BOTTOM, TOP)
    parts = [axes(across, up, x_ticks, y_ticks, x, y)]
    for number, line in enumerate(lines):
        colour, marker = look(number)
        points = [(across(a), up(b)) for a, b in zip(line.x, line.y, strict=True)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(points) <= 20:
            parts += [mark(marker, a, b, colour) for a, b in points]
        for a, b, s in zip(line.x, line.y, line.spread or [], strict=bool(line.spread)):
            ends = f'y1="{up(b - s):.1f}" y2="{up(b + s):.1f}"'
            parts.append(f'<line x1="{across(a):.1f}" x2="{across(a):.1f}" {ends} stroke="{colour}"/>')
    for place, number in zip(apart([up(line.y[-1]) for line in lines]), range(len(lines)), strict=True):
        (colour, marker), name = look(number), escape(lines[number].name)
        parts.append(mark(marker, WIDTH - RIGHT + 12, place, colour))
        parts.append(f'<text x="{WIDTH - RIGHT + 20}" y="{place + 4:.1f}">{name}</text>')
    width = WIDTH - RIGHT + max(RIGHT, 26 + 7 * max(len(line.name) for line in lines))
    label = escape(f"{y} over {x}: {', '.join(line.name for line in lines)}")
    return f'<svg viewBox="0 0 {width} {HEIGHT}" class="chart" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def column_chart(series: dict[str, list[list[float]]], *, x: str, y: str, level: tuple[str, float]) -> str:
    """A dot per value, in numbered columns: series -> columns -> values, the series side by side. level: the name and
    height of a dashed line that the dots are read against."""
    columns = max(len(values) for values in series.values())
    ticks = nice_ticks(0.0, max(level[1], *(value for each in series.values() for values in each for value in values)))
    across = Scale(0.5, columns + 0.5, LEFT, WIDTH - RIGHT)
    up = Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    numbered = [float(column) for column in range(1, columns + 1, math.ceil(columns / 12))]
    parts = [axes(across, up, numbered, ticks, x, y)]
    dashes = f'y1="{up(level[1]):.1f}" y2="{up(level[1]):.1f}" stroke="currentColor" stroke-dasharray="6 4"'
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" {dashes}/>')
    for i, each in enumerate(series.values()):
        (colour, marker), aside = look(i), 0.5 * (i - (len(series) - 1) / 2) / len(series)
        for column, values in enumerate(each, start=1):
            parts += [mark(marker, across(column + aside), up(value), colour) for value in values]
    for i, name in enumerate((*series, level[0])):
        place = TOP + 8 + 18 * i
        if i < len(series):
            colour, marker = look(i)
            parts.append(mark(marker, WIDTH - RIGHT + 12, place, colour))
        words = escape(name if i < len(series) else f"- - {name}")
        parts.append(f'<text x="{WIDTH - RIGHT + 20}" y="{place + 4}">{words}</text>')
    width = WIDTH - RIGHT + max(RIGHT, 46 + 7 * max(len(name) for name in (*series, level[0])))
    label = escape(f"{y} over {x}: {', '.join(series)}")
    return f'<svg viewBox="0 0 {width} {HEIGHT}" class="chart" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def look(number: int) -> tuple[str, str]:
    """Colour and marker of a line: no two of 32 are the same."""
    return COLORS[number % len(COLORS)], MARKERS[(number + number // len(COLORS)) % len(MARKERS)]


class Dot(NamedTuple):
    """A row: its name, its value, and from where to where the value may be."""

    name: str
    value: float
    low: float
    high: float


def dot_chart(rows: list[Dot], *, x: str, origin: float | None = None) -> str:
    """origin: a value that is always shown, as a line that the others are read against."""
    if not rows:
        return ""
    left, height = max(90, 12 + 7 * max(len(name) for name, *_ in rows)), TOP + 24 * len(rows) + BOTTOM
    width = max(WIDTH, WIDTH - 190 + left)
    shown = [] if origin is None else [origin]
    ticks = nice_ticks(min([*shown, *(dot.low for dot in rows)]), max([*shown, *(dot.high for dot in rows)]))
    across, bottom = Scale(ticks[0], ticks[-1], left, width - 20), height - BOTTOM
    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{across(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    if origin is not None:
        parts.append(
            f'<line class="axis" x1="{across(origin):.1f}" x2="{across(origin):.1f}" y1="{TOP}" y2="{bottom}"/>'
        )
    for row, (name, value, low, high) in enumerate(rows):
        y, ends = TOP + 24 * row + 12, f'x1="{across(low):.1f}" x2="{across(high):.1f}"'
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<line {ends} y1="{y}" y2="{y}" stroke="{COLORS[0]}"/>')
        parts.append(mark("circle", across(value), y, COLORS[0]))
    parts.append(f'<text x="{(left + width - 20) / 2}" y="{height - 8}" text-anchor="middle">{escape(x)}</text>')
    label = escape(f"{x}: " + ", ".join(f"{dot.name} {number(dot.value)}" for dot in rows))
    return f'<svg viewBox="0 0 {width} {height}" class="chart" role="img" aria-label="{label}">{"".join(parts)}</svg>'


class Scale:
    """From values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float, logarithmic: bool = False):
        self.of = math.log if logarithmic else float
        self.low, self.high = self.of(low), self.of(high)
        if self.high == self.low:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (self.of(value) - self.low) / (self.high - self.low) * (self.end - self.start)


def clean(line: Line) -> Line:
    """Without what cannot be drawn."""
    kept = [i for i, (a, b) in enumerate(zip(line.x, line.y, strict=True)) if math.isfinite(a) and math.isfinite(b)]
    spread = [line.spread[i] for i in kept] if line.spread else None
    return Line(line.name, [line.x[i] for i in kept], [line.y[i] for i in kept], spread)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers that cover the range."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= min((f for f in (1, 2, 5, 10) if span / (step * f) <= count), default=10)
    first = math.floor(low / step + 1e-9)
    return [round(i * step, 12) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def axes(across: Scale, up: Scale, x_ticks: list[float], y_ticks: list[float], x: str, y: str) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    parts += [
        f'<text x="{across(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>'
        for tick in x_ticks
        if LEFT - 1 <= across(tick) <= right + 1
    ]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>')
    upright = f'transform="rotate(-90)" x="{-(TOP + bottom) / 2}" y="12" text-anchor="middle"'
    return "".join([*parts, f"<text {upright}>{escape(y)}</text>"])


def mark(shape: str, x: float, y: float, colour: str) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    shapes: dict[str, list[tuple[float, float]]] = {
        "square": [(-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5)],
        "diamond": [(0, -5), (5, 0), (0, 5), (-5, 0)],
        "triangle": [(0, -5), (4.5, 4), (-4.5, 4)],
    }
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in shapes[shape])}" fill="{colour}"/>'


def apart(places: list[float], gap: float = 16) -> list[float]:
    """The places of labels, moved so that none covers another."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    over = max(0.0, max(moved) - (HEIGHT - BOTTOM)) if moved else 0.0
    return [place - over for place in moved]


def number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:,.3f}".rstrip("0").rstrip(".")
