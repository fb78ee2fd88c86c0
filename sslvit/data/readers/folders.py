"""Image files of folders: finding them, naming them in one buffer, reading them by number."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sslvit.data.image import ImageError, read_file
from sslvit.data.labels import Labels, match_classes, no_labels
from sslvit.data.source import digest
from sslvit.errors import NoInput

ENDINGS = {b".jpg", b".jpeg", b".jpe", b".jfif", b".png", b".webp", b".bmp", b".dib", b".gif", b".tif", b".tiff"}
SPLITS = {"train": ("train",), "test": ("test", "validation", "val", "valid", "dev")}
# Sets often keep the masks of their test split.
SPLITS["masked test"] = ("validation", "val", "valid", "dev", "test")
MOST_KINDS = 8  # of what is not read


class Names:
    """Byte strings in one buffer: forked workers that read a list copy it, by its reference counts
    (https://github.com/pytorch/pytorch/issues/13246)."""

    def __init__(self, names: Iterable[bytes]):
        names = list(names)
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.buffer = np.frombuffer(b"".join(names), np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.buffer[start : self.ends[index]].tobytes()


def printable(path: bytes) -> str:
    """Without control bytes, and what is not UTF-8 as \\xNN."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def real_paths(folders: Iterable[Path]) -> list[bytes]:
    return [os.fsencode(os.path.realpath(folder)) for folder in folders]


class Skipped:
    """Entries among the images that are not read: how many of each kind, and the first of them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, bytes] = {}

    def add(self, kind: str, name: bytes) -> None:
        self.counts[kind] += 1
        self.first.setdefault(kind, name)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        # Endings last: there may be many, and an unreadable folder must not go unseen among them.
        kinds = sorted(self.counts, key=lambda kind: (kind.startswith("*"), -self.counts[kind]))
        listed = [f"{self.counts[kind]:,} {kind}: {printable(self.first[kind])[-80:]}" for kind in kinds[:MOST_KINDS]]
        more = sum(self.counts[kind] for kind in kinds[MOST_KINDS:])
        return "; ".join(listed + [f"{more:,} of other kinds"] * bool(more)) or "nothing"


def stamp(status: os.stat_result) -> int:
    """Differs between files whose names, sizes and times agree, as copies' may: no copying tool can set the inode or
    the time of its change."""
    return hash((status.st_ino, status.st_ctime_ns, status.st_mtime_ns))  # for integers the same in every process


FoundFile = tuple[bytes, int, int]  # name from its root, size, stamp


class FileStore:
    """Image files by number. A file whose size has changed since is a bad image, not another sample."""

    def __init__(self, roots: list[bytes], starts: list[int], files: list[FoundFile], labels: Labels, skipped: Skipped):
        """files: root after root; starts: the index of each root's first"""
        self.skipped = skipped
        names, sizes, stamps = zip(*files, strict=True)
        self.roots, self.starts = roots, np.array(starts)
        self.names, self.sizes = Names(names), np.array(sizes, np.int64)
        self.labels, self.classes, self.unlabelled = labels
        content = b"\0".join(names), self.sizes.data
        self.fingerprint = digest(*content)
        # For the cache a touched file is another image, and so is a copy; for a run a copied folder is the same set.
        self.version = digest(*content, np.array(stamps, np.int64).data, b"\0".join(roots))

    def __len__(self) -> int:
        return len(self.names)

    def path(self, id: int) -> bytes:
        root = self.roots[np.searchsorted(self.starts, id, side="right") - 1]
        return os.path.join(root, self.names[id])

    def where(self, id: int) -> str:
        return printable(self.path(id))

    def read(self, id: int, max_pixels: int) -> bytes:
        data = read_file(self.path(id), max_pixels)
        if len(data) != self.sizes[id]:
            raise ImageError(f"changed since it was listed: {len(data):,} bytes, then {self.sizes[id]:,}")
        return data


def open_folders(roots: list[Path], *, follow_links: bool = False, classes: tuple[str, ...] | None = None) -> FileStore:
    """All images below the roots, labelled by the first level of sub-folders if there are at least two."""
    for root in roots:
        if not os.path.isdir(root):
            raise NoInput(f"{root} is not a folder: {nearest(root)}")
    scan = _Scan(roots, follow_links)
    if not scan.files:
        raise NoInput(f"no image files in {', '.join(map(str, roots))}: found {scan.skipped}")
    labels = _folder_labels([name for name, _, _ in scan.files], classes)
    if labels.numbers is None and "*.csv" in scan.skipped.first:
        labels = no_labels(f"{labels.problem}; csv:FILE reads them from {printable(scan.skipped.first['*.csv'])}")
    return FileStore(scan.roots, scan.starts, scan.files, labels, scan.skipped)


class _Scan:
    """One pass over the folders, in an order that depends on the names alone: the image files, the rest counted."""

    def __init__(self, roots: list[Path], follow_links: bool):
        self.follow_links = follow_links
        self.roots = real_paths(roots)
        self.files: list[FoundFile] = []
        self.starts: list[int] = []
        self.skipped = Skipped()
        for root in self.roots:
            self.starts.append(len(self.files))
            self._walk(root, b"", ())

    def _walk(self, root: bytes, inside: bytes, above: tuple[tuple[int, int], ...]) -> None:
        folder = os.path.join(root, inside)
        folders = []
        try:
            if self.follow_links:  # links can make a loop
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in above:
                    self.skipped.add("loops of links", inside)
                    return
                above = (*above, (status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self.skipped.add(f"folders ({error.strerror})", inside or root)
            return
        for entry in listed:
            name = os.path.join(inside, entry.name)
            try:
                if entry.name.startswith(b"."):
                    self.skipped.add("hidden", name)
                elif entry.is_symlink() and not self._allowed(entry, root):
                    self.skipped.add("links out of the folder or to folders (--follow_links reads them)", name)
                elif entry.is_dir():
                    folders.append(name)
                elif not entry.is_file():
                    self.skipped.add("neither files nor folders", name)
                elif (ending := os.path.splitext(entry.name)[1].lower()) not in ENDINGS:
                    self.skipped.add(f"*{printable(ending)}" if ending else "without an ending", name)
                else:
                    status = entry.stat()
                    self.files.append((name, status.st_size, stamp(status)))
            except OSError as error:  # gone since it was listed, or a link to itself
                self.skipped.add(str(error.strerror), name)
        for name in folders:
            self._walk(root, name, above)

    def _allowed(self, entry: os.DirEntry, root: bytes) -> bool:
        return self.follow_links or (not entry.is_dir() and lies_inside(os.path.realpath(entry.path), [root]))


def lies_inside(path: bytes, roots: list[bytes]) -> bool:
    return any(path.startswith(root.rstrip(b"/") + b"/") for root in roots)


def _folder_labels(names: list[bytes], classes: tuple[str, ...] | None) -> Labels:
    of_image = [folder for folder, _, file in (name.partition(b"/") for name in names) if file]
    folders = sorted(set(of_image))
    if flat := len(names) - len(of_image):
        return no_labels(f"{flat:,} images lie beside sub-folders" if folders else "the images lie in no sub-folders")
    if len(folders) < 2 and classes is None:
        return no_labels(f"all images lie in the one sub-folder {printable(folders[0])}")
    shown = {folder: printable(folder) for folder in folders}
    known = match_classes(tuple(shown.values()), classes)
    number = {folder: known.index(name) for folder, name in shown.items()}
    return Labels(np.array([number[folder] for folder in of_image], np.int64), known, "")


def nearest(path: Path) -> str:
    """The nearest existing folder above a missing path, for an error message."""
    if os.path.exists(path):
        return "it is a folder" if os.path.isdir(path) else "it is a file"
    above = next(parent for parent in path.absolute().parents if os.path.isdir(parent))
    try:
        names = sorted(entry.name for entry in above.iterdir())
    except OSError as error:
        return f"the nearest folder is {above}, which cannot be listed: {error.strerror}"
    return f"the nearest folder is {above}, which holds {', '.join(names[:5]) or 'nothing'}" + " ..." * (len(names) > 5)


def split_files(kind: str, pattern: str, split: str) -> list[Path]:
    """The regular files of a glob, or below a folder, that belong to the split, in order of their names."""
    path, ending = Path(pattern), {"parquet": ".parquet", "webdataset": ".tar"}[kind]
    if path.is_dir():
        candidates = sorted(path.rglob(f"*{ending}"))
    else:
        candidates = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
    candidates = [file for file in candidates if file.is_file()]
    if not candidates:
        raise NoInput(f"no {ending} files match {pattern}: {nearest(Path(pattern.partition('*')[0] or '.'))}")
    files = files_of_split(candidates, split)
    if not files:
        raise NoInput(f"{kind}:{pattern} has no {split} split: no file is named {' or '.join(SPLITS[split])}-...")
    return files


def files_of_split(files: list[Path], split: str) -> list[Path]:
    """The files whose names begin with the split's. Files that name no split are the train split."""
    words = sum(SPLITS.values(), ())
    named = {word: [file for file in files if re.match(rf"{word}(ing|set|val)?(?![a-z])", file.name)] for word in words}
    if any(named.values()):
        return next((named[word] for word in SPLITS[split] if named[word]), [])
    return files if split == "train" else []
