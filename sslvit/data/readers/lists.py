"""Image files that a list names, and rules for every text or table that names files.

    list:/file.txt[,/root]

A list has one name per line, with its ending, and then perhaps a tab and a label, which is a word even where it is a
number. There is no header, no quoting and no comment. Files with columns are read by csv_file.py.

Names are taken from the list's own folder, or from the root. They must lie inside it: a path or link that leaves it
is refused, and its target is not opened. A file that is not there is a bad image.
"""

import codecs
import os
import stat
from functools import cache
from pathlib import Path

from sslvit.data.labels import Labels, no_labels, to_class_numbers
from sslvit.data.readers.folders import ENDINGS, FileStore, Skipped, lies_inside, nearest, printable, real_paths, stamp
from sslvit.errors import DataError, NoInput

NAMING = ("list", "csv", "hf", "disk", "parquet")  # kinds whose lines or rows may name files


def open_list(file: Path, root: Path | None, classes: tuple[str, ...] | None) -> FileStore:
    """Entries may end with zero bytes instead of newlines, so that names can contain these."""
    if not file.is_file():
        raise NoInput(f"list {file} is not a file: {nearest(file)}")
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    lines = [line for line in content.split(b"\0" if b"\0" in content else b"\n") if line.strip()]
    if not lines:
        raise NoInput(f"list {file} is empty")
    entries = [line.rstrip(b"\r").partition(b"\t") for line in lines]
    texts = [text.decode("utf-8", "backslashreplace") for _, tab, text in entries if tab]
    labels = no_labels(f"{len(texts):,} of {len(lines):,} lines of {file} have a label")
    if len(texts) == len(lines):
        labels = to_class_numbers(texts, "label", classes)
    names, elsewhere = [name for name, _, _ in entries], f"use list:{file},/that/folder"
    return named_files(names, root or file.parent, labels, file=str(file), elsewhere=elsewhere)


def checked_root(root: Path | str | None, kind: str) -> Path | None:
    """The folder of --root, which must fit the kind of data."""
    if root is None:
        return None
    if kind not in NAMING:
        raise ValueError(f"--root {root} is for lines or rows that name files ({', '.join(NAMING)}), not for {kind}")
    if not os.path.isdir(root):
        raise NoInput(f"--root {root} is not a folder: {nearest(Path(root))}")
    return Path(root)


def named_files(names: list[bytes], root: Path, labels: Labels, *, file: str, elsewhere: str) -> FileStore:
    """The files of these names, all inside the root. elsewhere: what to do if they lie below another folder."""
    (root_bytes,) = real_paths([root])
    files, missing = [], Skipped()
    real = cache(os.path.realpath)  # of folders, which are few
    for name in names:
        if b"\0" in name:
            raise DataError(f"{file} names {printable(name)}: no file's name has a zero byte")
        path = os.path.join(root_bytes, name)
        folder, last = os.path.split(path)
        path, size, changed = os.path.join(real(folder), last), 0, 0
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                path = os.path.realpath(path)
                status = os.stat(path)
            size, changed = status.st_size, stamp(status)
        except OSError as error:
            missing.add(f"names ({error.strerror}), which count as bad images", name)
        if last == b".." or not lies_inside(path, [root_bytes]):
            raise DataError(f"{file} names {printable(name)}, which is not inside {printable(root_bytes)}")
        files.append((name, size, changed))
    if 2 * missing.counts.total() > len(files):
        hint = _hint(root_bytes, next(iter(missing.first.values()))) or f"if they lie below another folder, {elsewhere}"
        raise NoInput(f"most files that {file} names are not below {printable(root_bytes)}: {missing}; {hint}")
    return FileStore([root_bytes], [0], files, labels, missing)


def _hint(root: bytes, name: bytes) -> str:
    """What may be wrong with the name of a missing file."""
    for separator, word in ((b",", "comma"), (b";", "semicolon"), (b" ", "space")):
        before = name.rpartition(separator)[0].rstrip()
        if before and os.path.isfile(os.path.join(root, before)):
            return (
                f"{printable(before)} is a file, so a tab must stand before the label, not a {word}"
                + "; csv:FILE reads it" * (word != "space")
            )
    for ending in sorted(ENDINGS):
        if os.path.isfile(os.path.join(root, name + ending)):
            return f"{printable(name + ending)} is a file: names need their ending"
    if os.path.isfile(os.path.join(root, name.replace(b"\\", b"/"))):
        return "the separator in paths must be /, not \\"
    return "URLs are not fetched" if b"://" in name else ""
