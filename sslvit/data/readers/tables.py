"""Hugging Face datasets as stores of encoded images: a hub name, a save_to_disk folder, parquet files.

    hf:name, hf:org/name, hf:org/name:configuration      disk:/dir      parquet:/dir/*.parquet

Rows are read as Arrow values and never decoded by `datasets`, whose Image feature opens any local path or URL in a row.
Here a row's image is its bytes, or else a path inside the data's own folder; anything else is a bad image. With a root,
all rows name files, and all of these lie inside it, as those of a list must (lists.py).
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sslvit.data.image import ImageError, read_file
from sslvit.data.readers.columns import ReadOptions, choose_image_column, column_of, flat, read_labels, rows_of_lists
from sslvit.data.readers.folders import (
    SPLITS,
    FileStore,
    Skipped,
    lies_inside,
    nearest,
    printable,
    real_paths,
    split_files,
    stamp,
)
from sslvit.data.readers.lists import named_files
from sslvit.data.source import digest
from sslvit.errors import DataError, NoInput

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class TableStore:
    """The images of one column. A column of lists counts every image of every list."""

    def __init__(self, table: Any, roots: list[Path], options: ReadOptions):
        """table: a datasets.Dataset"""
        if table._indices is not None:  # of select() or shuffle(), unknown to the columns below
            table = table.flatten_indices()
        self.table = table.with_format("arrow")
        self.roots = real_paths(roots)
        self.image_column = choose_image_column(table.features, options)
        self._values, self.skipped = None, Skipped()
        rows = rows_of_lists(column_of(self.table, self.image_column))
        self.labels, self.classes, self.unlabelled = read_labels(table, rows, options)
        self.sizes = self._sizes()
        if not len(self.sizes):
            raise NoInput(f"the dataset has no images in column {self.image_column!r}: it has {len(table):,} rows")
        self.fingerprint = digest(self.sizes.data, b"" if self.labels is None else self.labels.data)
        # The hash of `datasets` for a table depends on its files' names and times alone.
        files = [(file["filename"], stamp(os.stat(file["filename"]))) for file in table.cache_files]
        self.version = f"{self.fingerprint}:{table._fingerprint}:{files}"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_values": None}  # Arrow would write out all images; the Dataset goes by file name

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def values(self) -> Any:  # pyarrow.ChunkedArray
        if self._values is None:
            self._values = flat(column_of(self.table, self.image_column))
        return self._values

    def _sizes(self) -> np.ndarray:
        """Bytes of each image, 0 where the row has none, from Arrow's offsets alone."""
        data = pc.struct_field(self.values, "bytes") if pa.types.is_struct(self.values.type) else self.values
        if pa.types.is_null(data.type):
            return np.zeros(len(data), np.int64)
        return pc.fill_null(pc.binary_length(data), 0).to_numpy().astype(np.int64)

    def where(self, id: int) -> str:
        value = self.values[id].as_py()
        path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
        return f"row {id}" + (f" ({printable(os.fsencode(path))})" if path else "")

    def read(self, id: int, max_pixels: int) -> bytes:
        return encoded_bytes(self.values[id].as_py(), self.roots, max_pixels)


def encoded_bytes(value: Any, roots: list[bytes], max_pixels: int) -> bytes:
    """An image cell's bytes: itself, its "bytes", or the file at its "path", which must lie inside the roots."""
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, str):
        value, path = None, value
    if value is not None:
        return value
    if not path:
        raise ImageError("the row holds no image")
    if "://" in path or "\0" in path:
        raise ImageError("the row points at a URL, which is not fetched")
    for root in roots:
        real = os.path.realpath(os.path.join(root, os.fsencode(path)))
        if lies_inside(real, roots):
            if not os.path.lexists(real):
                raise ImageError("no such file in the data's own folder; --root names another one")
            return read_file(real, max_pixels)
    raise ImageError("the row points outside the data's own folder, which is not read; --root names another one")


def open_table(table: Any, own: list[Path], name: str, options: ReadOptions) -> TableStore | FileStore:
    """own: the data's own folders."""
    return TableStore(table, own, options) if options.root is None else _files_of(table, options.root, name, options)


def _files_of(table: Any, root: Path, name: str, options: ReadOptions) -> FileStore:
    """The files that a table's rows name, inside the root."""
    table = table.with_format("arrow")
    chosen = choose_image_column(table.features, options)
    column = column_of(table, chosen)
    rows, values = rows_of_lists(column), flat(column)
    if pa.types.is_struct(values.type):
        contents, values = pc.struct_field(values, "bytes"), pc.struct_field(values, "path")
        if contents.null_count < len(contents):
            raise ValueError(f"--root {root}: rows of {name} contain images in {chosen!r}, they do not name files")
    elif not pa.types.is_string(values.type) and not pa.types.is_large_string(values.type):
        raise ValueError(f"--root {root}: column {chosen!r} of {name} is {values.type}, it does not name files")
    if not len(values):
        raise NoInput(f"the dataset has no images in column {chosen!r}: it has {len(table):,} rows")
    if values.null_count:
        raise DataError(f"{name}, row {values.is_null().index(True).as_py()}: column {chosen!r} names no file")
    names = [os.fsencode(path) for path in values.to_pylist()]
    labels = read_labels(table, rows, options)
    return named_files(names, root, labels, file=name, elsewhere="--root must be that folder")


def load_hub(name: str, *, streaming: bool) -> Any:
    """A dataset of the hub, by name alone: `datasets` would also open local folders and URLs."""
    import datasets

    name, colon, configuration = name.partition(":")
    if os.path.exists(name):
        raise DataError(f"hf:{name} is a local folder: use folder:{name}, disk:{name} or parquet:{name}")
    if not HUB_NAME.fullmatch(name) or (colon and not HUB_NAME.fullmatch(configuration)):
        raise ValueError(f"hf:{name}{colon}{configuration} must be like hf:organisation/name:configuration")
    try:
        return datasets.load_dataset(name, configuration or None, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise NoInput(f"hf:{name} cannot be loaded: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]


def open_hub(name: str, options: ReadOptions) -> TableStore | FileStore:
    table = load_hub(name, streaming=False)
    return open_table(choose_split(table, options.split, f"hf:{name}"), hub_caches(), f"hf:{name}", options)


def hub_caches() -> list[Path]:
    """Where rows of the hub's sets may name files. Sets of plain files keep them in the hub's cache; nothing else under
    ~/.cache is theirs."""
    import datasets
    import huggingface_hub.constants

    return [Path(datasets.config.HF_DATASETS_CACHE), Path(huggingface_hub.constants.HF_HUB_CACHE)]


def open_disk(folder: Path, options: ReadOptions) -> TableStore | FileStore:
    import datasets

    if not folder.is_dir():
        raise NoInput(f"disk:{folder} is not a folder: {nearest(folder)}")
    try:
        check_saved(folder)
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        what = f"disk:{folder} is not a folder that Dataset.save_to_disk wrote images to"
        raise NoInput(f"{what}: {first_line(error)}") from error
    return open_table(choose_split(table, options.split, f"disk:{folder}"), [folder], f"disk:{folder}", options)


def check_saved(folder: Path) -> None:
    """That all that load_from_disk opens lies in the folder: no name of a split or file, and no link, leads out."""
    one = (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    splits = [""] if one else _json_inside(folder, "dataset_dict.json")["splits"]
    for split in splits:
        if not one and (not re.fullmatch(r"[^/:]+", split) or split in (".", "..")):
            raise ValueError(f"its dataset_dict.json names the split {split!r}, which is not a folder's name")
        _inside(folder, os.path.join(split, "dataset_info.json"))
        for file in _json_inside(folder, os.path.join(split, "state.json"))["_data_files"]:
            if os.path.basename(file["filename"]) != file["filename"]:
                raise ValueError(f"it names a file elsewhere, {file['filename']!r}, which is not read")
            _inside(folder, os.path.join(split, file["filename"]))


def _inside(folder: Path, name: str) -> Path:
    real = os.path.realpath(folder / name)
    if not lies_inside(os.fsencode(real), [os.fsencode(os.path.realpath(folder))]):
        raise ValueError(f"its {name} is a link to {real}, which is not read. cp -rL copies the targets of links")
    if os.path.exists(real) and not os.path.isfile(real):  # to open a pipe would wait forever
        raise ValueError(f"its {name} is not a file")
    return Path(real)


def _json_inside(folder: Path, name: str) -> Any:
    return json.loads(_inside(folder, name).read_bytes())


def open_parquet(pattern: str, options: ReadOptions) -> TableStore | FileStore:
    """A file, a folder or a glob. If files are named train-... and test-..., as on the hub, these are the splits."""
    table, folders = load_parquet(pattern, options.split, streaming=False)
    return open_table(table, folders, f"parquet:{pattern}", options)


def load_parquet(pattern: str, split: str, *, streaming: bool) -> tuple[Any, list[Path]]:
    """The rows, and the folders of the files."""
    import datasets

    files = split_files("parquet", pattern, split)
    # As Arrow, `datasets` caches them by their names and times, by which it would take other files for these.
    stamps = digest(repr([stamp(file.stat()) for file in files]).encode(), size=8)
    cache = None if streaming else os.path.join(datasets.config.HF_DATASETS_CACHE, f"parquet-{stamps}")
    names = [str(file) for file in files]
    try:
        table = datasets.load_dataset("parquet", data_files=names, split="train", cache_dir=cache, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"parquet:{pattern} cannot be read: {first_line(error)}") from error
    return table, sorted({file.parent for file in files})


def choose_split(table: Any, split: str, what: str) -> Any:
    if not isinstance(table, dict):  # one Dataset, saved without splits
        if split == "train":
            return table
        raise NoInput(f"{what} has no splits, so all of it is the train split")
    name = next((name for name in SPLITS[split] if name in table), None)
    if name is None:
        raise NoInput(f"{what} has no {split} split: it has {', '.join(table)}")
    return table[name]
