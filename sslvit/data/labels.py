"""Labels of any kind to class numbers. A bad label column stops only what needs labels, so not pretraining."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sslvit.errors import DataError

MOST_CLASSES = 1_000_000


class Labels(NamedTuple):
    numbers: np.ndarray | None  # int64, one per image
    classes: tuple[str, ...] | None
    problem: str  # why there are no numbers


def no_labels(problem: str) -> Labels:
    return Labels(None, None, problem)


def to_class_numbers(
    values: Sequence | np.ndarray, column: str, classes: tuple[str, ...] | None, indexed: bool = False
) -> Labels:
    """Class numbers are kept, booleans are 0 and 1, strings become their index in `classes`, or else among all of
    them sorted. `indexed`: numbers index `classes`, as in a ClassLabel column."""
    array = values if isinstance(values, np.ndarray) else np.array(values, dtype=object)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        return no_labels(f"column {column!r} has labels of shape {array.shape[1:]}, not one per row")
    if array.dtype.kind in "biu":
        return _numbers(array.astype(np.int64), column, classes if indexed else None)
    if array.dtype.kind in "SU":
        array = array.astype(object)
    if array.dtype.kind == "f":
        return no_labels(f"column {column!r}, row 0 is {array[0]}, a {array.dtype}: labels are integers or text")
    for row, value in enumerate(array):
        if value is None or (isinstance(value, str) and not value):
            return no_labels(f"column {column!r} has no label in row {row}")
    if all(isinstance(value, str) for value in array):
        return _texts(array.tolist(), column, classes)
    wrong = next((row for row, value in enumerate(array) if not isinstance(value, int | np.integer)), None)
    if wrong is not None:
        what = f"{str(array[wrong])[:40]}, a {type(array[wrong]).__name__}"
        return no_labels(f"column {column!r}, row {wrong} is {what}: labels are integers or text")
    if max(map(int, array)) > np.iinfo(np.int64).max:
        return no_labels(f"column {column!r} has labels up to {max(map(int, array))}: not class numbers")
    return _numbers(array.astype(np.int64), column, classes if indexed else None)


def _numbers(numbers: np.ndarray, column: str, classes: tuple[str, ...] | None) -> Labels:
    negative = np.flatnonzero(numbers < 0)
    if len(negative):
        hidden = " (a hidden label?)" if len(negative) == len(numbers) else ""
        row = negative[0]
        return no_labels(f"column {column!r}, row {row} is {numbers[row]}{hidden}: classes count from 0")
    most = MOST_CLASSES if classes is None else len(classes)
    beyond = np.flatnonzero(numbers >= most)
    if len(beyond):
        return no_labels(f"column {column!r}, row {beyond[0]} is {numbers[beyond[0]]}: not one of {most:,} classes")
    return Labels(numbers, classes or tuple(str(value) for value in range(numbers.max(initial=-1) + 1)), "")


def _texts(values: list[str], column: str, classes: tuple[str, ...] | None) -> Labels:
    numbers = {name: number for number, name in enumerate(classes or sorted(set(values)))}
    unknown = next((row for row, value in enumerate(values) if value not in numbers), None)
    if unknown is not None:
        return no_labels(f"column {column!r}, row {unknown} is {values[unknown]!r}: not one of {len(numbers)} classes")
    return Labels(np.array([numbers[value] for value in values], np.int64), tuple(numbers), "")


def match_classes(names: tuple[str, ...], known: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes of the training set, if any, so that equal numbers mean equal classes."""
    if known is not None and (unknown := [name for name in names if name not in known]):
        raise DataError(f"classes {', '.join(unknown[:5])} are not among the {len(known)} of the training set")
    return known or names
