"""Image files that a CSV file names, with their labels in another column.

    csv:/labels.csv[,/root]    csv:/dir    a folder with train.csv and perhaps test.csv or val.csv

The file is UTF-8, with commas, semicolons or tabs. Its first row is a header unless one of its cells is an image file,
or ends like one. Columns are chosen by name, or counted from 1 (--image_column, --label_column); otherwise by usual
names, and then by which cells look like image files. Labels are class numbers if all of them are whole numbers; others
are sorted. A column called `split` divides the rows into train and test.

Paths are checked as those of a list (lists.py). `list:` reads a .csv file so too, and a .tsv file that has a header.
"""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sslvit.data.labels import Labels, no_labels, to_class_numbers
from sslvit.data.readers.columns import IMAGE_NAMES, LABEL_NAMES, ReadOptions
from sslvit.data.readers.folders import ENDINGS, SPLITS, FileStore, files_of_split, nearest
from sslvit.data.readers.lists import named_files
from sslvit.errors import DataError, NoInput

SPLIT_NAMES = ("split", "subset", "partition")
MORE_LABEL_NAMES = (*LABEL_NAMES, "class_name", "category")
WHOLE = re.compile(r"-?[0-9]{1,18}")


class Row(NamedTuple):
    line: int  # the last of it in the file
    cells: list[str]


class Columns(NamedTuple):
    image: int
    label: int | None
    split: int | None
    unlabelled: str  # why there is no column of labels


def open_csv(place: Path, options: ReadOptions) -> FileStore:
    """place: the file, or a folder of one file per split."""
    file, chosen_by_name = _of_folder(place, options.split) if place.is_dir() else (place, False)
    if not file.is_file():
        raise NoInput(f"{file} is not a CSV file: {nearest(file)}")
    root = options.root or file.parent
    header, rows = read_rows(file, root, options)
    if not rows:
        raise NoInput(f"{file} has no rows" + (" below its header" if header else ""))
    columns = choose_columns(file, root, header, rows[0].cells, options)
    if columns.split is not None and not chosen_by_name:
        rows = _rows_of_split(file, rows, columns.split, options.split)
    elif options.split == "test" and not chosen_by_name:
        raise NoInput(f"{file} has no test split: no column is called split (csv:FOLDER takes train.csv and test.csv)")
    if nameless := next((row for row in rows if not row.cells[columns.image]), None):
        raise DataError(f"{file}, line {nameless.line}: the column of images is empty")
    names = [row.cells[columns.image].encode("utf-8", "surrogateescape") for row in rows]
    labels = _labels(file, rows, columns, options.classes)
    remedy = f"use csv:{place},/that/folder or --root /that/folder"
    return named_files(names, root, labels, file=str(file), elsewhere=remedy)


def has_header(file: Path, root: Path) -> bool:
    """Of a list, whose entries may end with zero bytes instead of lines."""
    with open(file, "rb") as stream:
        if b"\0" in stream.readline():
            return False
    first = next(_rows(file), None)
    return first is not None and not _names_image(first.cells, root)


def _of_folder(folder: Path, split: str) -> tuple[Path, bool]:
    """The file of a split, and whether its name says so."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".csv", ".tsv") and file.is_file())
    if not files:
        raise NoInput(f"csv:{folder} holds no .csv file; paths in one are taken from its own folder, or from --root")
    by_name = files_of_split(files, "train") != files
    chosen = files_of_split(files, split) if by_name else files
    if not chosen:
        raise NoInput(f"csv:{folder} has no {split} split: no file is named {' or '.join(SPLITS[split])}.csv")
    if len(chosen) > 1:
        raise ValueError(f"csv:{folder} has several files for {split}, {', '.join(f.name for f in chosen)}: name one")
    return chosen[0], by_name


def read_rows(file: Path, root: Path, options: ReadOptions) -> tuple[list[str] | None, list[Row]]:
    """The header, if there is one, and the rows below it, all as long as the first."""
    rows = list(_rows(file))
    if not rows:
        return None, []
    first = rows[0].cells
    if options.image_column in first or options.label_column in first or not _names_image(first, root):
        return [cell.strip() for cell in first], rows[1:]
    return None, rows


def _rows(file: Path) -> Iterator[Row]:
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        text = next((line for line in stream if line.strip()), "")
        if "\0" in text:
            raise DataError(f"{file} is not text in UTF-8: its first line has zero bytes")
        marks = "\t,;" if file.suffix == ".tsv" else ",\t;"
        mark = next((mark for mark in marks if len(next(csv.reader([text], delimiter=mark), ())) > 1), marks[0])
        stream.seek(0)
        reader = csv.reader(stream, delimiter=mark, skipinitialspace=True, strict=True)
        width = 0
        try:
            for cells in reader:
                if not any(map(str.strip, cells)):
                    continue
                width = width or len(cells)
                if len(cells) != width:
                    hint = f": quote a cell that contains a {'tab' if mark == chr(9) else mark!r}"
                    counts = f"{len(cells)} columns, the first row has {width}{hint * (len(cells) > width)}"
                    raise DataError(f"{file}, line {reader.line_num} has {counts}")
                yield Row(reader.line_num, cells)
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num}: {error}; is a quote left open?") from error


def _is_image(cell: str, root: Path) -> bool:
    """By its ending, or because there is such a file."""
    if os.path.splitext(cell)[1].lower().encode("utf-8", "surrogateescape") in ENDINGS:
        return True
    return bool(cell) and "\0" not in cell and os.path.isfile(os.path.join(root, cell))


def _names_image(cells: list[str], root: Path) -> bool:
    return any(_is_image(cell, root) for cell in cells)


def choose_columns(file: Path, root: Path, header: list[str] | None, first: list[str], options: ReadOptions) -> Columns:
    """first: the first row below the header."""
    usual = [re.sub(r"[ -]", "_", name.casefold()) for name in header or ()]
    listed = ", ".join(header) if header else f"1 to {len(first)}, and no header"

    def index_of(name: str, flag: str) -> int:
        if header and name in header:
            return header.index(name)
        if name.isascii() and name.isdecimal() and 1 <= int(name) <= len(first):
            return int(name) - 1
        raise ValueError(f"--{flag} {name}: {file} has the columns {listed}")

    def index_of_images() -> int:
        if options.image_column is not None:
            return index_of(options.image_column, "image_column")
        candidates = [index for index, name in enumerate(usual) if name in IMAGE_NAMES]
        if len(candidates) != 1:
            candidates = [index for index in candidates or range(len(first)) if _is_image(first[index], root)]
        if len(candidates) != 1 and len(first) > 1:
            several = "several columns may hold" if candidates else "no column looks like"
            raise ValueError(f"{several} paths of images in {file}: choose one of {listed} with --image_column")
        return candidates[0] if candidates else 0

    images = index_of_images()
    split = next((usual.index(name) for name in SPLIT_NAMES if name in usual), None)
    if options.label_column is not None:
        return Columns(images, index_of(options.label_column, "label_column"), split, "")
    named = [usual.index(name) for name in MORE_LABEL_NAMES if name in usual]
    others = [index for index in range(len(first)) if index not in (images, split)]
    if named or len(others) == 1:
        return Columns(images, (named or others)[0], split, "")
    return Columns(
        images, None, split, f"none of the columns {listed} has a usual name: choose one with --label_column"
    )


def _rows_of_split(file: Path, rows: list[Row], column: int, split: str) -> list[Row]:
    values = [row.cells[column].strip().casefold() for row in rows]
    for word in SPLITS[split]:
        if chosen := [row for row, value in zip(rows, values, strict=True) if value.startswith(word)]:
            return chosen
    raise NoInput(f"{file} has no {split} split: its column of splits holds {', '.join(sorted(set(values))[:5])}")


def _labels(file: Path, rows: list[Row], columns: Columns, classes: tuple[str, ...] | None) -> Labels:
    if columns.label is None:
        return no_labels(columns.unlabelled)
    texts = [row.cells[columns.label].strip() for row in rows]
    if "" in texts:
        return no_labels(f"{file}, line {rows[texts.index('')].line} has no label")
    # Beside words a number is a word too, also in a test set that happens to hold only such.
    numbered = classes is None or classes == tuple(map(str, range(len(classes))))
    if numbered and all(map(WHOLE.fullmatch, texts)):
        return to_class_numbers([int(text) for text in texts], "label", None)
    shown = [text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for text in texts]
    return to_class_numbers(shown, "label", classes)
