"""The columns of a Hugging Face dataset: which holds the images, which the labels, their values as Arrow has them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sslvit.data.labels import Labels, no_labels, to_class_numbers

LABEL_NAMES = ("label", "labels", "class", "cls", "target")
IMAGE_NAMES = (
    *("image", "image_path", "image_file", "image_name", "img", "img_path", "path", "filepath", "file_path"),
    *("file", "filename", "file_name"),
)

MASK_NAMES = ("mask", "masks", "annotation", "annotations", "label", "labels", "segmentation", "seg", "semantic_mask")


class ReadOptions(NamedTuple):
    """How to read lists, tables and tars."""

    split: str = "train"
    root: Path | None = None  # the folder of the files that lines or rows name
    image_column: str | None = None
    label_column: str | None = None
    classes: tuple[str, ...] | None = None  # of the training set, for a test set
    masks: tuple[str, ...] = ()  # names of columns that hold masks, and so are not the images


def _leaves(features: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every column and every field of a nested one, with its feature."""
    for name, feature in features.items():
        here = f"{path}.{name}" if path else name
        yield here, feature
        if isinstance(feature, dict):
            yield from _leaves(feature, here)


def _holds_images(feature: Any) -> bool:
    import datasets

    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)  # of a List
    if isinstance(inner, dict):
        return {"bytes", "path"} <= set(inner)
    return isinstance(inner, datasets.Image) or getattr(inner, "dtype", "") in ("binary", "large_binary")


def choose_image_column(features: Any, options: ReadOptions) -> str:
    """With a root, a column may name files instead of holding images."""
    leaves, column = dict(_leaves(features)), options.image_column
    if column is not None:
        if column not in leaves:
            raise ValueError(f"--image_column {column} must be one of {', '.join(leaves)}")
        return column
    images = [name for name, feature in leaves.items() if _holds_images(feature)]
    images = [name for name in images if name.rpartition(".")[0] not in images]  # the "bytes" of an image struct
    images = [name for name in images if name not in options.masks]
    if options.root and not images:
        text = ("string", "large_string")
        images = [n for n, f in leaves.items() if n.casefold() in IMAGE_NAMES and getattr(f, "dtype", "") in text]
    if len(images) != 1:
        several = f"several columns hold images, {', '.join(images)}" if images else "no column holds images"
        hint = "" if options.root or images else "; if one names files, set --root to their folder"
        raise ValueError(f"{several}: choose one of {', '.join(leaves)} with --image_column{hint}")
    return images[0]


def choose_mask_column(features: Any, column: str | None) -> str:
    """The column of this name, or the only one with a usual name."""
    if column is not None:
        if column not in dict(_leaves(features)):
            raise ValueError(f"--mask_column {column} must be one of {', '.join(dict(_leaves(features)))}")
        return column
    masks = [name for name, feature in features.items() if name in MASK_NAMES and _holds_images(feature)]
    if len(masks) != 1:
        several = (
            f"several columns may hold masks, {', '.join(masks)}" if masks else "no column of a usual name has masks"
        )
        raise ValueError(f"{several}: choose one of {', '.join(features)} with --mask_column")
    return masks[0]


def choose_label_column(features: Any, column: str | None) -> str | None:
    """The column of this name, the only ClassLabel, or one with a usual name."""
    import datasets

    if column is not None:
        if column not in features:
            raise ValueError(f"--label_column {column} must be one of {', '.join(features)}")
        return column
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    return next((name for name in LABEL_NAMES if name in features), None)


def read_labels(table: Any, rows: np.ndarray | None, options: ReadOptions) -> Labels:
    column = choose_label_column(table.features, options.label_column)
    if column is None or column in options.masks:
        names = ", ".join(table.features)
        return no_labels(f"none of the columns {names} has a usual name: choose one with --label_column")
    values = column_of(table.with_format("arrow"), column).to_pylist()
    classes = getattr(table.features[column], "names", None)
    known = tuple(classes) if classes else options.classes
    labels = to_class_numbers(values, column, known, indexed=classes is not None)
    return labels if rows is None or labels.numbers is None else labels._replace(numbers=labels.numbers[rows])


def column_of(table: Any, name: str) -> Any:
    """A column, or a field of a nested one, of a Dataset without an index: nothing is copied."""
    first, *fields = name.split(".")
    column = table.data.column(first)
    return pc.struct_field(column, fields) if fields else column


def flat(column: Any) -> Any:
    """The elements of a column of lists, the storage of an extension type, any other column unchanged."""
    column = pc.list_flatten(column) if is_list(column) else column
    return column.cast(column.type.storage_type) if isinstance(column.type, pa.ExtensionType) else column


def is_list(column: Any) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(kind(column.type) for kind in kinds)


def rows_of_lists(column: Any) -> np.ndarray | None:
    """The row of each element of a column of lists; None for another column, whose rows are its elements."""
    if not is_list(column):
        return None
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return np.repeat(np.arange(len(lengths)), lengths)
