"""Accuracy as fine-tuning goes on: which method starts faster, which ends higher, when each is where scratch ends."""

import math
from itertools import pairwise
from typing import Any

from sslvit.experiments.claims import in_words
from sslvit.experiments.records import TUNED
from sslvit.experiments.results import scratch
from sslvit.reports.charts import Line, line_chart

Curve = list[tuple[int, float]]  # after so many steps, this share of the test images is right


def curves_of(results: dict[str, Any], column: str) -> dict[str, Curve]:
    """Of each method, the mean over seeds."""
    curves = {}
    for name, by_seed in results.get("curves", {}).get(column, {}).items():
        steps = [step for step, _ in by_seed[0]]
        means = [sum(values) / len(values) for values in zip(*([y for _, y in one] for one in by_seed), strict=True)]
        curves[name] = list(zip(steps, means, strict=True))
    return {name: curves[name] for name in results["methods"] if name in curves}


def columns_of(results: dict[str, Any]) -> list[str]:
    return [column for column, by_method in results.get("curves", {}).items() if by_method]


def reaches(curve: Curve, accuracy: float) -> float | None:
    """After how many steps: between two measurements, on the line that joins them where steps are logarithmic."""
    if curve[0][1] >= accuracy:
        return curve[0][0]
    for (before, low), (after, high) in pairwise(curve):
        if high >= accuracy:
            share = (accuracy - low) / (high - low)
            return math.exp(math.log(before) + share * math.log(after / before))
    return None


def sentences(results: dict[str, Any], column: str) -> list[str]:
    """One for each readout of scratch: where it ends, and after how many steps each method is there."""
    curves, texts = curves_of(results, column), []
    for readout in dict.fromkeys(results["readouts"][name] for name in curves):
        base = scratch(readout)
        others = [name for name in curves if name != base and results["readouts"][name] == readout]
        if base not in curves or not others:
            continue
        steps, end = curves[base][-1]
        found = {name: reaches(curves[name], end) for name in others}
        each = {name: by_seed(results["curves"][column], name, base) for name in others}
        about = {name: "at most" if at == curves[name][0][0] else "about" for name, at in found.items()}
        parts = [
            f"{name} is as high after {about[name]} {rounded(at)} steps{each[name]}"
            for name, at in found.items()
            if at is not None
        ]
        never = [name for name, at in found.items() if at is None]
        where = f"{in_words(column).capitalize()}, {base}"
        texts.append(f"{where} ends at {100 * end:.1f}%, after {steps:,} steps.")
        texts[-1] += f" {'; '.join(parts)}." if parts else ""
        texts[-1] += f" Never as high: {', '.join(never)}." if never else ""
    return texts


def by_seed(curves: dict[str, list[Curve]], name: str, base: str) -> str:
    """The same of each seed, where there are several."""
    found = [reaches(mine, of_base[-1][1]) for mine, of_base in zip(curves[name], curves[base], strict=True)]
    told = ["never" if at is None else rounded(at) for at in found]
    return f" (by seed {', '.join(told)})" if len(told) > 1 else ""


def rounded(steps: float) -> str:
    """To two digits, which is more than a few measurements tell."""
    digits = max(0, math.floor(math.log10(max(steps, 1))) - 1)
    return f"{round(steps, -digits):,.0f}"


def table(results: dict[str, Any], column: str) -> tuple[list[str], list[list[str]]]:
    curves = curves_of(results, column)
    steps = [step for step, _ in next(iter(curves.values()))]
    rows = [[name, *(f"{100 * accuracy:.1f}" for _, accuracy in curve)] for name, curve in curves.items()]
    return [f"{column.replace(' %', '%')}, % after steps", *(f"{step:,}" for step in steps)], rows


def chart(results: dict[str, Any], column: str) -> str:
    lines = [
        Line(name, [float(step) for step, _ in curve], [100 * accuracy for _, accuracy in curve])
        for name, curve in curves_of(results, column).items()
    ]
    ticks = lines[0].x[::-2][::-1]
    return line_chart(lines, x="steps of fine-tuning", y="test accuracy, %", logarithmic=True, ticks=ticks)


def tried(results: dict[str, Any]) -> list[str]:
    """Which learning rate each method chose, in a sentence per column."""
    texts = []
    for column, by_method in results.get("rates", {}).items():
        shown = {name: dict.fromkeys(f"{rate:g}" for rate in by_method.get(name, ())) for name in results["methods"]}
        parts = [f"{name} {' and '.join(rates)}" for name, rates in shown.items() if rates]
        place, _, share = column.rpartition(": ")
        where = share.removeprefix(TUNED).strip().replace(" %", "%") + (f" of {place}" if place else "")
        texts.append(f"{where}: {', '.join(parts)}")
    if not texts:
        return []
    told = f"Learning rates of fine-tuning, chosen on held-out training labels. {'; '.join(texts)}."
    candidates = results["settings"]["finetune_rates"]
    ends = {min(candidates), max(candidates)}
    edge = {
        name: None
        for by_method in results["rates"].values()
        for name, rates in by_method.items()
        if len(candidates) > 2 and ends & set(rates)
    }
    if edge:
        told += f" The lowest or the highest candidate was the best at least once for {', '.join(edge)}."
    return [told]
