"""Sentences about a comparison's results: warnings, differences that they support, and notes to read them by."""

import re
from typing import Any

from sslvit.evaluate.balance import NEARLY_ALL, UNEQUAL
from sslvit.evaluate.baselines import COMMONEST, PIXELS
from sslvit.evaluate.statistics import LEVEL, Difference, holm, no_difference, over_seeds, sentence, t_quantile
from sslvit.experiments.results import OWN, scratch

SUPERVISED, MARK = "supervised", "†"  # of an accuracy by classifiers that predict one class
NEARLY = f"nearly all test images (more than {NEARLY_ALL:.0%})"
EARLIER = "An earlier version made these results: they have no"
BUDGETS = {
    "images": "the same number of images",
    "flops": "about the FLOPs that the first one needs for its passes",
    "operations": "about the FLOPs that the first one needs for its passes",  # as version 0.1 called it
    "seconds": "about the seconds that the first one needs for its passes",
}


def gap_of(one: dict[str, Any]) -> Difference:
    """Within -1 and 1, which an earlier version's intervals could leave."""
    gap = Difference(one["mean"], one["low"], one["high"], one["seeds"], one.get("p"))
    return gap._replace(low=max(gap.low, -1.0), high=min(gap.high, 1.0))


def in_words(column: str) -> str:
    """The column "classes held out: linear 10 %" as "by a linear probe on 10% of the labels of classes held out"."""
    place, _, column_there = column.rpartition(": ")
    how, _, share = column_there.partition(" ")
    how = "fine-tuned" if how == "fine-tuned" else "by a linear probe"
    return f"{how} on {without_space(share)} of the labels" + (f" of {place}" if place else "")


def without_space(column: str) -> str:
    """As English writes percent; names of columns, which are in results.json, have a space."""
    return column.replace(" %", "%")


def one_class(results: dict[str, Any], column: str) -> dict[str, list[int]]:
    """The methods whose classifiers predict one class for nearly all images, at these seeds."""
    return results.get("one_class", {}).get(column, {})


def pairs(results: dict[str, Any], column: str) -> list[dict[str, Any]]:
    """The differences of a column between classifiers that predict more than one class, corrected for their number."""
    left_out = one_class(results, column)
    mine = [one for one in results["differences"] if one["column"] == column]
    mine = [one for one in mine if one["first"] not in left_out and one["second"] not in left_out]
    if any(one.get("p") is None for one in mine):  # of an earlier version
        return mine
    return [one | {"p": p} for one, p in zip(mine, holm([one["p"] for one in mine]), strict=True)]


def sentences(results: dict[str, Any], column: str, *, to_scratch: bool = False) -> list[str]:
    """What the differences of a column support, first (or only) those between a method and scratch read in the same
    way; all pairs without a significant difference are in the last sentence."""

    def like_with_like(one: dict[str, Any]) -> bool:
        return one["second"] == scratch(results["readouts"][one["first"]])

    order = results["methods"]
    mine = [one for one in pairs(results, column) if like_with_like(one) or not to_scratch]
    mine.sort(key=lambda one: order.index(one["first"]) if like_with_like(one) else len(order))
    gaps, where = [(one["first"], one["second"], gap_of(one)) for one in mine], in_words(column)
    texts = [sentence(*one, where) for one in gaps if one[-1].significant]
    if level := [one for one in gaps if not one[-1].significant]:
        texts.append(no_difference(level, where))
    return [f"{text}." for text in texts]


def warnings(results: dict[str, Any], columns: list[str] | None = None) -> list[str]:
    """A sentence for each of these columns (all by default) in which classifiers predict one class."""
    seeds, texts = len(results["seeds"]), []
    for column in columns or results.get("one_class", {}):
        named = [
            name + (f" (with {len(some)} of {seeds} seeds)" if name in results["methods"] and len(some) < seeds else "")
            for name, some in one_class(results, column).items()
        ]
        if named:
            texts.append(
                f"Warning: {in_words(column)}, these predict the same class for {NEARLY}: {', '.join(named)}. No "
                "difference from them is reported."
            )
    return texts


def ahead_of(results: dict[str, Any], base: str, column: str) -> dict[str, Difference]:
    """Each method against this one, in points; against "scratch", the one that is read as the method is."""
    ahead = {}
    for one in pairs(results, column):
        gap = gap_of(one)
        for name, other, sign in ((one["first"], one["second"], 100), (one["second"], one["first"], -100)):
            if other == (scratch(results["readouts"][name]) if base == "scratch" else base):
                low, high = sorted((sign * gap.low, sign * gap.high))
                ahead[name] = Difference(sign * gap.mean, low, high, gap.seeds, gap.p)
    return {name: ahead[name] for name in results["methods"] if name in ahead}


def notes(results: dict[str, Any]) -> list[str]:
    """How to read the numbers."""
    seeds, settings = len(results["seeds"]), results["settings"]
    names = {way: [n for n, r in results["readouts"].items() if r == way] for way in results["readouts"].values()}
    ways = "; ".join(f"{way} for {', '.join(some)}" for way, some in names.items())
    other = [method for method in settings.get("methods", ()) if re.search(r"[:,]init=(?!jax)", method)]
    except_for = f" (but {', '.join(other)}: from timm's)" if other else ""
    texts = [
        f"Every method started from scratch's weights{except_for}, and had "
        f"{BUDGETS[settings.get('budget', 'images')]}.",
        f"The readout is the one that a model's objective declares: {ways}. A method is compared with scratch of the "
        "same readout.",
        *baselines_in_words(results),
    ]
    if seeds == 1:
        texts.append("One seed: the variation between seeds was not measured; intervals are over test images alone.")
    else:
        texts.append(
            f"Mean ± standard deviation over {seeds} seeds; 95% confidence intervals (CI) are over test images and "
            "seeds. Linear probes learn from the same labelled images at every seed, fine-tuning from others."
        )
        texts.append(width_in_words(results))
    if extra := settings.get("scratch_flags"):
        texts.append(f"Scratch alone was fine-tuned with {' '.join(extra)} as well, which makes it stronger.")
    if held_out := settings.get("held_out"):
        texts.append(
            f"Pretraining, supervised too, saw no image of the classes {', '.join(map(str, held_out))}, which are the "
            "classes held out; all other columns are of the other classes alone."
        )
    for number, data in enumerate(settings.get("transfer") or (), 1):
        texts.append(f"Transfer {number} is {data}.")
    for name, kind in {"limit_train": "training", "limit_test": "test"}.items():
        if limit := settings.get(name):
            texts.append(f"Frozen features are of at most {limit:,} {kind} images, fine-tuning uses all.")
    if settings.get("limit_train"):
        texts.append("Shares of the labels are shares of these.")
    if any("p" in one for one in results["differences"]):
        return [
            *texts,
            "A method is said to be ahead where the difference survives Holm's correction over all pairs of its column "
            "(5%); each interval is of its own pair alone.",
        ]
    return [*texts, "Intervals are not corrected for the number of comparisons."]


def baselines_in_words(results: dict[str, Any]) -> list[str]:
    """The first rows of the tables, the mark, and balanced accuracy."""
    sides, texts = {place: side for place, side in results.get("pixels", {}).items() if side}, []
    read = ", ".join(f"{side} x {side}" + ("" if place == OWN else f" ({place})") for place, side in sides.items())
    if sides:
        texts.append(
            f"{COMMONEST.capitalize()}: always the class that is most frequent among the training labels. "
            f"{PIXELS.capitalize()}: the images themselves, {read} pixels, instead of frozen features; they are not "
            "fine-tuned."
        )
    else:
        texts.append(f"{EARLIER} rows of the {COMMONEST} and of {PIXELS}.")
    if "one_class" not in results:
        texts.append(
            f"{EARLIER} balanced accuracy, and do not say whether a classifier predicts the same class for all images."
        )
    elif any(results["one_class"].values()):
        texts.append(
            f"{MARK}: with one seed or more, the same class is predicted for {NEARLY}; such an accuracy says little "
            "more than how common that class is."
        )
    if results.get("balanced"):
        texts.append(
            "Balanced accuracy, the mean accuracy per class, is shown where the largest class of the test images has "
            f"more than {UNEQUAL:g} times the images of the smallest. Differences are of accuracy."
        )
    return texts


def width_in_words(results: dict[str, Any]) -> str:
    """The width of intervals over so few seeds."""
    seeds = len(results["seeds"])
    values = [by_method[name] for by_method in results["values"].values() for name in results["methods"]]
    intervals = [one for one in map(over_seeds, values) if one is not None]
    widest = max(100 * (one.high - one.low) for one in intervals)
    alike = any(one.low == one.high for one in intervals)
    return (
        f"Intervals of means over seeds alone are Student's: with {seeds} seeds {t_quantile(LEVEL, seeds - 1):.1f} "
        f"standard errors to either side, and the widest here spans {widest:.0f} points. All intervals are clipped to "
        f"the possible accuracies (0 to 100) and differences (-100 to 100)."
        f"{' One of width 0 only means that all seeds gave the same accuracy.' if alike else ''}"
    )
