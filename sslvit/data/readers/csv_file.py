"""Image files that a CSV file names, with their labels in another column.

    csv:/labels.csv[,/root]    csv:/dir    a folder with train.csv and perhaps test.csv or val.csv

The file is UTF-8, with commas, semicolons or tabs. Its first row is a header unless one of its cells is an image file,
or ends like one. Columns go by name, or counted from 1 (--image_column, --label_column); otherwise by usual names, and
then by which cells look like image files. Labels are class numbers if all of them are whole numbers; others are sorted.
Where a header names a column `split`, it parts the rows into train and test.

What holds for the paths of a list holds for these (lists.py). `list:` reads a .csv file so too, and a .tsv file that
has a header.
"""

import csv
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sslvit.data.labels import Labels, no_labels, to_class_numbers
from sslvit.data.readers.columns import IMAGE_NAMES, LABEL_NAMES
from sslvit.data.readers.folders import ENDINGS, SPLITS, FileStore, files_of_split, nearest
from sslvit.data.readers.lists import named_files
from sslvit.errors import DataError, NoInput

SPLIT_NAMES = ("split", "subset", "partition")
MORE_LABEL_NAMES = (*LABEL_NAMES, "class_name", "category")
WHOLE = re.compile(r"-?[0-9]{1,18}")
Looks = Callable[[str], bool]


class Row(NamedTuple):
    line: int  # the last of it in the file
    cells: list[str]


class Columns(NamedTuple):
    image: int
    label: int | None
    split: int | None
    unlabelled: str  # why there is no column of labels


def open_csv(
    place: Path,
    root: Path | None,
    split: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: tuple[str, ...] | None = None,
) -> FileStore:
    file, parted = _of_folder(place, split) if place.is_dir() else (place, False)
    if not file.is_file():
        raise NoInput(f"{file} is not a CSV file: {nearest(file)}")
    root = root or file.parent
    header, rows = read_rows(file, root, (image_column, label_column))
    if not rows:
        raise NoInput(f"{file} has no rows" + (" below its header" if header else ""))
    columns = choose_columns(file, header, rows[0].cells, image_column, label_column, _looks_in(root))
    if columns.split is not None and not parted:
        rows = _rows_of_split(file, rows, columns.split, split)
    elif split == "test" and not parted:
        raise NoInput(f"{file} has no test split: no column is called split (csv:FOLDER takes train.csv and test.csv)")
    if nameless := next((row for row in rows if not row.cells[columns.image]), None):
        raise DataError(f"{file}, line {nameless.line}: the column of images is empty")
    names = [row.cells[columns.image].encode("utf-8", "surrogateescape") for row in rows]
    labels, elsewhere = _labels(file, rows, columns, classes), f"say csv:{place},/that/folder or --root /that/folder"
    return named_files(names, root, labels, file=str(file), elsewhere=elsewhere)


def has_header(file: Path, root: Path) -> bool:
    """Of a list, whose entries may end with zero bytes instead of lines."""
    with open(file, "rb") as stream:
        if b"\0" in stream.readline():
            return False
    first = next(_rows(file), None)
    return first is not None and not any(map(_looks_in(root), first.cells))


def _of_folder(folder: Path, split: str) -> tuple[Path, bool]:
    """The file of a split, and whether it is that by its name."""
    found = sorted(file for file in folder.iterdir() if file.suffix in (".csv", ".tsv") and file.is_file())
    if not found:
        raise NoInput(f"csv:{folder} holds no .csv file; paths in one are taken from its own folder, or from --root")
    parted = files_of_split(found, "train") != found
    chosen = files_of_split(found, split) if parted else found
    if not chosen:
        raise NoInput(f"csv:{folder} has no {split} split: no file is named {' or '.join(SPLITS[split])}.csv")
    if len(chosen) > 1:
        raise ValueError(f"csv:{folder} has several files for {split}, {', '.join(f.name for f in chosen)}: name one")
    return chosen[0], parted


def read_rows(file: Path, root: Path, wanted: tuple[str | None, ...]) -> tuple[list[str] | None, list[Row]]:
    """The header, if there is one, and the rows below it, all as long as the first. wanted: names of columns."""
    rows = list(_rows(file))
    if not rows:
        return None, []
    first = rows[0].cells
    named = any(name in first for name in wanted if name is not None)
    header = named or not any(map(_looks_in(root), first))
    return ([cell.strip() for cell in first], rows[1:]) if header else (None, rows)


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
                    hint = f": one with a {'tab' if mark == chr(9) else mark!r} in it must stand in quotes"
                    raise DataError(
                        f"{file}, line {reader.line_num} has {len(cells)} columns, the first row has {width}"
                        + hint * (len(cells) > width)
                    )
                yield Row(reader.line_num, cells)
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num}: {error}; is a quote left open?") from error


def _looks_in(root: Path) -> Looks:
    """Whether a cell looks like an image file, by its ending or because it is there."""

    def looks(cell: str) -> bool:
        if os.path.splitext(cell)[1].lower().encode("utf-8", "surrogateescape") in ENDINGS:
            return True
        return bool(cell) and "\0" not in cell and os.path.isfile(os.path.join(root, cell))

    return looks


def choose_columns(
    file: Path, header: list[str] | None, first: list[str], image: str | None, label: str | None, looks: Looks
) -> Columns:
    """first: the first row below the header."""
    usual = [re.sub(r"[ -]", "_", name.casefold()) for name in header or ()]
    there = ", ".join(header) if header else f"1 to {len(first)}, and no header"

    def wanted(name: str, flag: str) -> int:
        if header and name in header:
            return header.index(name)
        if name.isascii() and name.isdecimal() and 1 <= int(name) <= len(first):
            return int(name) - 1
        raise ValueError(f"--{flag} {name}: {file} has the columns {there}")

    if image is None:
        found = [place for place, name in enumerate(usual) if name in IMAGE_NAMES]
        if len(found) != 1:
            found = [place for place in found or range(len(first)) if looks(first[place])]
        if len(found) != 1 and len(first) > 1:
            several = "several columns may hold" if found else "no column looks like"
            raise ValueError(f"{several} paths of images in {file}: choose one of {there} with --image_column")
    images = wanted(image, "image_column") if image is not None else found[0] if found else 0
    split = next((usual.index(name) for name in SPLIT_NAMES if name in usual), None)
    if label is not None:
        return Columns(images, wanted(label, "label_column"), split, "")
    named = [usual.index(name) for name in MORE_LABEL_NAMES if name in usual]
    others = [place for place in range(len(first)) if place not in (images, split)]
    if named or len(others) == 1:
        return Columns(images, (named or others)[0], split, "")
    return Columns(images, None, split, f"none of its columns, {there}, is known to hold them: say --label_column")


def _rows_of_split(file: Path, rows: list[Row], column: int, split: str) -> list[Row]:
    values = [row.cells[column].strip().casefold() for row in rows]
    for word in SPLITS[split]:
        if found := [row for row, value in zip(rows, values, strict=True) if value.startswith(word)]:
            return found
    held = ", ".join(sorted(set(values))[:5])
    raise NoInput(f"{file} has no {split} split: its column of splits holds {held}")


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
