"""Charts as SVG text, for paper, phones and dark mode, with no library.

Lines differ in color, in marker and in a label at their end; text and axes take the page's color.
"""

import math
from collections.abc import Callable
from html import escape
from itertools import pairwise
from typing import NamedTuple

# Tol's bright ones, yellow and cyan darker, so that all can be seen on white and on black.
COLORS = ("#4477aa", "#ee6677", "#228833", "#a07d00", "#0099bb", "#aa3377", "#888888", "#994f00")
MARKERS = ("circle", "square", "diamond", "triangle")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 478, 260, 68, 148, 12, 42
UNNAMED = 16  # to the right of a line without a label
Scale = Callable[[float], float]  # from values to pixels


class Line(NamedTuple):
    name: str
    x: list[float]
    y: list[float]
    spread: list[float] | None = None  # to either side of y
    connected: bool = True


def line_chart(
    lines: list[Line],
    *,
    x: str,
    y: str,
    logarithmic: bool = False,
    ticks: list[float] | None = None,
    from_zero: bool = False,
) -> str:
    """x, y: titles of the axes. logarithmic: the x axis. ticks: labels of the x axis, instead of round numbers.
    from_zero: the y axis. A line that is alone and has no name has no label."""
    lines = [clean(line) for line in lines]
    lines = [line for line in lines if line.x]
    if not lines:
        return ""
    xs = [*(value for line in lines for value in line.x), *(ticks or [])]
    bars = [bar for line in lines for bar in zip(line.y, line.spread or [0.0] * len(line.y), strict=True)]
    low, high = min(value - s for value, s in bars), max(value + s for value, s in bars)
    low, right = min(low, 0.0) if from_zero else low, WIDTH - (RIGHT if any(line.name for line in lines) else UNNAMED)
    y_ticks = nice_ticks(low, high)
    across = scale(min(xs), max(xs), LEFT, right, logarithmic)
    up = scale(min(y_ticks[0], low), max(y_ticks[-1], high), HEIGHT - BOTTOM, TOP)
    elements = [axes(across, up, ticks or nice_ticks(min(xs), max(xs)), y_ticks, x, y, right)]
    elements += [plot(line, across, up, *look(i)) for i, line in enumerate(lines)]
    if right == WIDTH - UNNAMED:
        return svg(WIDTH, HEIGHT, f"{y} over {x}", elements)
    for i, place in enumerate(apart([up(line.y[-1]) for line in lines])):
        color, marker = look(i)
        elements.append(mark(marker, WIDTH - RIGHT + 12, place, color))
        elements.append(f'<text x="{WIDTH - RIGHT + 20}" y="{place + 4:.1f}">{escape(lines[i].name)}</text>')
    width = WIDTH - RIGHT + max(RIGHT, 26 + 7 * max(len(line.name) for line in lines))
    return svg(width, HEIGHT, f"{y} over {x}: {', '.join(line.name for line in lines)}", elements)


def plot(line: Line, across: Scale, up: Scale, color: str, marker: str) -> str:
    """A line with its markers, unless there are too many, and its error bars."""
    points, elements = [(across(x), up(y)) for x, y in zip(line.x, line.y, strict=True)], []
    if line.connected:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        elements.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
    if len(points) <= 20 or not line.connected:
        elements += [mark(marker, x, y, color) for x, y in points]
    for x, y, s in zip(line.x, line.y, line.spread or [], strict=bool(line.spread)):
        ends = f'y1="{up(y - s):.1f}" y2="{up(y + s):.1f}"'
        elements.append(f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" {ends} stroke="{color}"/>')
    return "".join(elements)


def svg(width: float, height: float, label: str, elements: list[str]) -> str:
    box = f'viewBox="0 0 {width} {height}" class="chart" role="img" aria-label="{escape(label)}"'
    return f"<svg {box}>{''.join(elements)}</svg>"


def look(number: int) -> tuple[str, str]:
    """Color and marker of a line: no two of 32 are the same."""
    return COLORS[number % len(COLORS)], MARKERS[(number + number // len(COLORS)) % len(MARKERS)]


class Dot(NamedTuple):
    """A row: its name, its value, and the interval of the value."""

    name: str
    value: float
    low: float
    high: float


def dot_chart(rows: list[Dot], *, x: str, origin: float | None = None) -> str:
    """origin: a value that is always shown, as a line."""
    if not rows:
        return ""
    left, height = max(90, 12 + 7 * max(len(name) for name, *_ in rows)), TOP + 24 * len(rows) + BOTTOM
    width = max(WIDTH, WIDTH - 190 + left)
    shown = [] if origin is None else [origin]
    ticks = nice_ticks(min([*shown, *(dot.low for dot in rows)]), max([*shown, *(dot.high for dot in rows)]))
    across, bottom = scale(ticks[0], ticks[-1], left, width - 20), height - BOTTOM
    elements = []
    for kind, value in [*(("grid", tick) for tick in ticks), *(("axis", value) for value in shown)]:
        at = f"{across(value):.1f}"
        elements.append(f'<line class="{kind}" x1="{at}" x2="{at}" y1="{TOP}" y2="{bottom}"/>')
        if kind == "grid":
            elements.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{number(value)}</text>')
    for row, (name, value, low, high) in enumerate(rows):
        y, ends = TOP + 24 * row + 12, f'x1="{across(low):.1f}" x2="{across(high):.1f}"'
        elements.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        elements.append(f'<line {ends} y1="{y}" y2="{y}" stroke="{COLORS[0]}"/>')
        elements.append(mark("circle", across(value), y, COLORS[0]))
    elements.append(f'<text x="{(left + width - 20) / 2}" y="{height - 8}" text-anchor="middle">{escape(x)}</text>')
    return svg(width, height, f"{x}: " + ", ".join(f"{dot.name} {number(dot.value)}" for dot in rows), elements)


def scale(low: float, high: float, start: float, end: float, logarithmic: bool = False) -> Scale:
    to = math.log if logarithmic else float
    first, last = to(low), to(high)
    if first == last:
        first, last = first - 0.5, last + 0.5
    return lambda value: start + (to(value) - first) / (last - first) * (end - start)


def clean(line: Line) -> Line:
    """Without values that are not finite."""
    drawn = [i for i, point in enumerate(zip(line.x, line.y, strict=True)) if all(map(math.isfinite, point))]
    x, y, spread = ([values[i] for i in drawn] if values else [] for values in (line.x, line.y, line.spread))
    return line._replace(x=x, y=y, spread=spread or None)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover the range."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= min((f for f in (1, 2, 5, 10) if span / (step * f) <= count), default=10)
    first = math.floor(low / step + 1e-9)
    return [round(i * step, 12) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def axes(across: Scale, up: Scale, x_ticks: list[float], y_ticks: list[float], x: str, y: str, right: float) -> str:
    bottom = HEIGHT - BOTTOM
    elements = []
    for tick, text in zip(y_ticks, numbers(y_ticks), strict=True):
        elements.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        elements.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    elements += [
        f'<text x="{across(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>'
        for tick, text in zip(x_ticks, numbers(x_ticks), strict=True)
        if LEFT - 1 <= across(tick) <= right + 1
    ]
    elements.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + right) / 2
    elements.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>')
    upright = f'transform="rotate(-90)" x="{-(TOP + bottom) / 2}" y="12" text-anchor="middle"'
    return "".join([*elements, f"<text {upright}>{escape(y)}</text>"])


def mark(shape: str, x: float, y: float, color: str) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'
    shapes: dict[str, list[tuple[float, float]]] = {
        "square": [(-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5)],
        "diamond": [(0, -5), (5, 0), (0, 5), (-5, 0)],
        "triangle": [(0, -5), (4.5, 4), (-4.5, 4)],
    }
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in shapes[shape])}" fill="{color}"/>'


def apart(places: list[float], gap: float = 16) -> list[float]:
    """The places of labels, moved so that none covers another."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    lowest: float = HEIGHT - BOTTOM
    for i in reversed(order):  # up again, those alone that are below the axis and those in their way
        moved[i] = min(moved[i], lowest)
        lowest = moved[i] - gap
    return moved


def numbers(ticks: list[float]) -> list[str]:
    """All with an exponent if one needs it."""
    exponent = any(needs_exponent(tick) for tick in ticks)
    return [with_exponent(tick) if exponent and tick else number(tick) for tick in ticks]


def number(value: float) -> str:
    return with_exponent(value) if needs_exponent(value) else f"{value:,.3f}".rstrip("0").rstrip(".")


def needs_exponent(value: float) -> bool:
    return bool(value) and (abs(value) >= 1e5 or abs(value) < 1e-3)


def with_exponent(value: float) -> str:
    return f"{value:.1e}".replace(".0e", "e").replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
