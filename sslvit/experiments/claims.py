"""What a comparison's results support, in words: warnings, differences, and what must be known to read them."""

from typing import Any

from sslvit.evaluate.balance import NEARLY_ALL, UNEQUAL
from sslvit.evaluate.baselines import COMMONEST, PIXELS
from sslvit.evaluate.statistics import LEVEL, Difference, no_difference, over_seeds, sentence, t_quantile
from sslvit.experiments.results import OWN, scratch

SUPERVISED, MARK = "supervised", "†"  # of an accuracy by classifiers that answer one class
BUDGETS = {
    "images": "as many images",
    "flops": "about as many FLOPs as the first one needs for its passes",
    "operations": "about as many FLOPs as the first one needs for its passes",  # as version 0.1 called it
    "seconds": "about as many seconds as the first one needs for its passes",
}


def kept(one: dict[str, Any]) -> Difference:
    """Within -1 and 1, which an earlier version's intervals could leave."""
    found = Difference(*(one[name] for name in Difference._fields))
    return found._replace(low=max(found.low, -1.0), high=min(found.high, 1.0))


def in_words(column: str) -> str:
    """The linear 100 % of classes held out: by a linear probe with 100 % of the labels of classes held out."""
    place, _, column_there = column.rpartition(": ")
    how, _, share = column_there.partition(" ")
    how = "when fine-tuned" if how == "fine-tuned" else "by a linear probe"
    return f"{how} with {share} of the labels" + (f" of {place}" if place else "")


def one_class(results: dict[str, Any], column: str) -> dict[str, list[int]]:
    """The methods whose classifiers answer one class for nearly all images, at these seeds."""
    return results.get("one_class", {}).get(column, {})


def pairs(results: dict[str, Any], column: str) -> list[dict[str, Any]]:
    """The differences of a column between classifiers that answer more than one class."""
    left_out = one_class(results, column)
    mine = [one for one in results["differences"] if one["column"] == column]
    return [one for one in mine if one["first"] not in left_out and one["second"] not in left_out]


def sentences(results: dict[str, Any], column: str, *, to_scratch: bool = False) -> list[str]:
    """What the differences of a column support, first (or only) those of a method to scratch read in the same way; all
    pairs without a significant difference are in the last sentence."""

    def like_with_like(one: dict[str, Any]) -> bool:
        return one["second"] == scratch(results["readouts"][one["first"]])

    order = results["methods"]
    mine = [one for one in pairs(results, column) if like_with_like(one) or not to_scratch]
    mine.sort(key=lambda one: order.index(one["first"]) if like_with_like(one) else len(order))
    told, where = [(one["first"], one["second"], kept(one)) for one in mine], in_words(column)
    texts = [sentence(*one, where) for one in told if one[-1].significant]
    if level := [one for one in told if not one[-1].significant]:
        texts.append(no_difference(level, where))
    return [f"{text}." for text in texts]


def warnings(results: dict[str, Any], columns: list[str] | None = None) -> list[str]:
    """A sentence for each of these columns (all by default) in which classifiers answer one class."""
    seeds, texts = len(results["seeds"]), []
    for column in columns or results.get("one_class", {}):
        found = one_class(results, column)
        named = [
            name + (f" (with {len(some)} of {seeds} seeds)" if name in results["methods"] and len(some) < seeds else "")
            for name, some in found.items()
        ]
        if named:
            texts.append(
                f"Warning: {in_words(column)} these give nearly all test images (more than {100 * NEARLY_ALL:g} %) the "
                f"same class: {', '.join(named)}. No difference to them is reported."
            )
    return texts


def ahead_of(results: dict[str, Any], base: str, column: str) -> dict[str, Difference]:
    """Each method against this one, in points; against "scratch", that which is read as the method is."""
    found = {}
    for one in pairs(results, column):
        gap = kept(one)
        for name, other, sign in ((one["first"], one["second"], 100), (one["second"], one["first"], -100)):
            if other == (scratch(results["readouts"][name]) if base == "scratch" else base):
                low, high = sorted((sign * gap.low, sign * gap.high))
                found[name] = Difference(sign * gap.mean, low, high, gap.seeds)
    return {name: found[name] for name in results["methods"] if name in found}


def notes(results: dict[str, Any]) -> list[str]:
    """What must be known to read the numbers."""
    seeds, settings = len(results["seeds"]), results["settings"]
    read = {way: [n for n, r in results["readouts"].items() if r == way] for way in results["readouts"].values()}
    ways = "; ".join(f"{way} of {', '.join(names)}" for way, names in read.items())
    texts = [
        f"Every method started from scratch's weights, and was given {BUDGETS[settings.get('budget', 'images')]}.",
        f"What is read of a model is what its objective declares: {ways}. A method is held against scratch that is "
        "read in the same way.",
        *baselines_in_words(results),
    ]
    if seeds == 1:
        texts.append("One seed: what another seed would give was not measured; intervals are over test images alone.")
    else:
        texts.append(
            f"Mean ± deviation of {seeds} seeds; intervals are of 95 %, over test images and seeds. Linear probes "
            "learn from the same labelled images at every seed, fine-tuning from others."
        )
        texts.append(width_in_words(results))
    if held := settings.get("held_out"):
        texts.append(
            f"Pretraining, supervised too, saw no image of the classes {', '.join(map(str, held))}. These are the "
            "classes held out; whatever does not say so is of the other classes alone."
        )
    for number, data in enumerate(settings.get("transfer") or (), 1):
        texts.append(f"Transfer {number} is {data}.")
    for name, kind in {"limit_train": "training", "limit_test": "test"}.items():
        if limit := settings.get(name):
            texts.append(f"Frozen features are of at most {limit:,} {kind} images, fine-tuning's of all.")
    if settings.get("limit_train"):
        texts.append("Shares of the labels are shares of these.")
    return [*texts, "Intervals are not widened for the number of pairs that are compared."]


def baselines_in_words(results: dict[str, Any]) -> list[str]:
    """What the first rows of the tables are, and what a mark and balanced accuracy say."""
    sides, texts = {place: side for place, side in results.get("pixels", {}).items() if side}, []
    read = ", ".join(f"{side} x {side}" + ("" if place == OWN else f" ({place})") for place, side in sides.items())
    if sides:
        texts.append(
            f"{COMMONEST.capitalize()}: always the class that is most frequent among the training labels. "
            f"{PIXELS.capitalize()}: the images themselves, {read} pixels, in the place of frozen features; they are "
            "not fine-tuned."
        )
    else:
        texts.append(f"An earlier version made these results: they have no rows of the {COMMONEST} and of {PIXELS}.")
    if "one_class" not in results:
        texts.append(
            "An earlier version made these results: they have no balanced accuracy, and do not say whether a "
            "classifier gives all images the same class."
        )
    elif any(results["one_class"].values()):
        texts.append(
            f"{MARK}: with one seed or more, nearly all test images (more than {100 * NEARLY_ALL:g} %) are given the "
            "same class; such an accuracy says little more than how common that class is."
        )
    if results.get("balanced"):
        texts.append(
            "Balanced accuracy, the mean of the accuracies of the classes, is shown where the largest class of the "
            f"test images has more than {UNEQUAL:g} times the images of the smallest. Differences are of accuracy."
        )
    return texts


def width_in_words(results: dict[str, Any]) -> str:
    """How much so few seeds say of their mean."""
    seeds = len(results["seeds"])
    values = [by_method[name] for by_method in results["values"].values() for name in results["methods"]]
    found = [one for one in map(over_seeds, values) if one is not None]
    widest = max(100 * (one.high - one.low) for one in found)
    alike = " One without width only says that all seeds gave the same accuracy." * any(x.low == x.high for x in found)
    return (
        f"Intervals of means over seeds alone are Student's: with {seeds} seeds {t_quantile(LEVEL, seeds - 1):.1f} "
        f"standard errors to either side, and the widest here spans {widest:.0f} points. All intervals end where an "
        f"accuracy (0 to 100) or a difference (-100 to 100) must.{alike}"
    )
