"""Folders of image files: finding them, naming them in one buffer, reading them."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np

from sslvit.data.image import BadImage, read_file
from sslvit.errors import DataError, NoInput

ENDINGS = {b".jpg", b".jpeg", b".jpe", b".jfif", b".png", b".webp", b".bmp", b".dib", b".gif", b".tif", b".tiff"}


class Names:
    """Byte strings in one buffer: a list of a million str would be copied into every worker by its reference counts."""

    def __init__(self, names: list[bytes]):
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.buffer = np.frombuffer(b"".join(names), np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.buffer[start : self.ends[index]].tobytes()


def printable(path: bytes) -> str:
    """A name fit for a log or a terminal: no control bytes, and what is not UTF-8 as \\xNN."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Scan:
    """One pass over the folders: the image files, and what else was there, counted."""

    def __init__(self, roots: list[Path], follow_links: bool):
        self.follow_links = follow_links
        self.roots = [os.fsencode(os.path.realpath(root)) for root in roots]
        self.found: list[bytes] = []  # names from their root
        self.sizes: list[int] = []
        self.times: list[int] = []
        self.starts: list[int] = []  # of each root
        self.skipped: Counter[str] = Counter()
        for root in self.roots:
            self.starts.append(len(self.found))
            self._walk(root, b"", ())

    def _walk(self, root: bytes, inside: bytes, above: tuple[tuple[int, int], ...]) -> None:
        folder = os.path.join(root, inside)
        folders = []
        try:
            if self.follow_links:  # links can make a loop
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in above:
                    self.skipped["loops of links"] += 1
                    return
                above = (*above, (status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self.skipped[f"folders: {error.strerror}"] += 1
            return
        for entry in listed:
            name = os.path.join(inside, entry.name)
            if entry.name.startswith(b"."):
                self.skipped["hidden"] += 1
            elif entry.is_symlink() and not self._allowed(entry, root):
                self.skipped["links that lead out of the folder, or to folders (follow_links reads them)"] += 1
            elif entry.is_dir():
                folders.append(name)
            elif not entry.is_file():
                self.skipped["neither files nor folders, or broken links"] += 1
            elif (ending := os.path.splitext(entry.name)[1].lower()) not in ENDINGS:
                self.skipped[f"*{printable(ending)}" if ending else "no extension"] += 1
            else:
                status = entry.stat()
                self.found.append(name)
                self.sizes.append(status.st_size)
                self.times.append(status.st_mtime_ns)
        for name in folders:
            self._walk(root, name, above)

    def _allowed(self, entry: os.DirEntry, root: bytes) -> bool:
        if self.follow_links:
            return True
        return not entry.is_dir() and os.path.realpath(entry.path).startswith(root + b"/")

    def counts(self) -> str:
        return ", ".join(f"{count:,} {what}" for what, count in self.skipped.most_common(6)) or "nothing"


class FolderStore:
    """The encoded images of folders, by number. Labels are the names of the first level of sub-folders, if any."""

    def __init__(self, roots: list[Path], *, follow_links: bool = False, classes: tuple[str, ...] | None = None):
        for root in roots:
            if not root.is_dir():
                raise NoInput(f"{root} is not a folder: {nearest(root)}")
        scan = Scan(roots, follow_links)
        if not scan.found:
            raise NoInput(f"no image files in {', '.join(map(str, roots))}: found {scan.counts()}")
        self.skipped = scan.skipped
        self.roots, self.starts = scan.roots, np.array(scan.starts)
        self.names = Names(scan.found)
        self.labels, self.classes = _labels(scan.found, classes)
        self.bytes = sum(scan.sizes)
        content = hashlib.blake2b(b"\0".join(scan.found), digest_size=16)
        content.update(np.array(scan.sizes, np.int64))
        self.fingerprint = content.hexdigest()
        # A replaced file of the same size is another image to the cache, but a copied folder is the same set to a run.
        content.update(np.array(scan.times, np.int64))
        self.version = content.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def path(self, id: int) -> bytes:
        root = self.roots[np.searchsorted(self.starts, id, side="right") - 1]
        return os.path.join(root, self.names[id])

    def where(self, id: int) -> str:
        return printable(self.path(id))

    def read(self, id: int, max_pixels: int) -> bytes:
        return read_file(self.path(id), max_pixels)


def _labels(names: list[bytes], classes: tuple[str, ...] | None) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """The first folder of each name. Images beside the sub-folders, or a single sub-folder, tell no classes apart."""
    first = [name.partition(b"/") for name in names]
    found = sorted({folder for folder, slash, _ in first if slash})
    if len(found) < (2 if classes is None else 1) or not all(slash for _, slash, _ in first):
        return None, None
    shown = {folder: printable(folder) for folder in found}
    classes = classes or tuple(shown[folder] for folder in found)
    unknown = [name for name in shown.values() if name not in classes]
    if unknown:
        raise DataError(
            f"the folders {', '.join(unknown[:5])} are not among the {len(classes)} classes: {classes[:5]} ..."
        )
    number = {folder: classes.index(name) for folder, name in shown.items()}
    return np.array([number[folder] for folder, _, _ in first], np.int64), classes


def nearest(path: Path) -> str:
    """What exists on the way to a path that does not, for an error message."""
    if path.exists():
        return "it is a file"
    above = next(parent for parent in path.absolute().parents if parent.is_dir())
    try:
        inside = sorted(entry.name for entry in above.iterdir())[:8]
    except OSError as error:
        return f"the nearest folder is {above}, which cannot be listed: {error.strerror}"
    return f"the nearest folder is {above}, which holds {', '.join(inside) or 'nothing'}"


__all__ = ["BadImage", "FolderStore", "Names", "nearest", "printable"]
