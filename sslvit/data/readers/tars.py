"""WebDataset tars as a store of encoded images, read by number: the shards are indexed once and never unpacked.

    webdataset:/shards/train-{0000..0099}.tar is written webdataset:/shards/train-*.tar

A sample is a key, the name up to the first dot of its last part, and the rest is the column: 0001.jpg and 0001.cls are
the image and the label of one. Only headers, labels and images are read, each of bounded size.
"""

import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sslvit.data.image import BYTES_PER_PIXEL, ImageError
from sslvit.data.labels import no_labels, to_class_numbers
from sslvit.data.readers.columns import ReadOptions
from sslvit.data.readers.folders import ENDINGS, Names, Skipped, printable, split_files, stamp
from sslvit.data.readers.tar_index import Member, check_end, members
from sslvit.data.source import digest
from sslvit.errors import DataError, NoInput

LONGEST_LABEL = 1 << 10  # bytes
STREAMED = 1 << 20  # bytes read at a time by streams: headers and images with one sweep of the disk
MOST_DIGITS = 18  # of a class number
HEAD = 100  # samples that show whether a stream has images and labels

_shown = lru_cache(1000)(printable)  # there are few columns


class ImageInTar(NamedTuple):
    """Where an image lies inside a tar."""

    file: Path
    offset: int
    size: int

    def read(self, max_pixels: int) -> bytes:
        if self.size > BYTES_PER_PIXEL * max_pixels:
            raise ImageError(f"{self.size:,} bytes > limit {BYTES_PER_PIXEL * max_pixels:,}")
        try:
            with open(self.file, "rb", buffering=0) as stream:
                data = os.pread(stream.fileno(), self.size, self.offset)
        except OSError as error:
            raise ImageError(error.strerror or str(error)) from error
        if len(data) != self.size:
            raise ImageError(f"the archive ends after {len(data):,} of {self.size:,} bytes")
        return data


class TarStore:
    def __init__(self, files: list[Path], options: ReadOptions):
        self.files, self.skipped = files, Skipped()
        names, places, texts = [], [], []
        for shard, file in enumerate(files):
            images, labels = _samples(file, members(file, self.skipped), options.image_column, self.skipped)
            names += [member.name for member in images.values()]
            places += [(shard, member.offset, member.size) for member in images.values()]
            texts += [labels.get(key) for key in images]
        if not names:
            raise NoInput(f"no images in {len(files)} tar files: found {self.skipped}")
        self.names = Names(names)
        self.shards, self.offsets, self.sizes = np.array(places, np.int64).T.copy()
        self.labels, self.classes, self.unlabelled = self._labels(texts, options.classes)
        self.fingerprint = digest(b"\0".join(names), self.sizes.data)
        self.version = f"{self.fingerprint}:{[(os.path.realpath(file), stamp(file.stat())) for file in files]}"

    @staticmethod
    def _labels(texts: list[str | None], classes: tuple[str, ...] | None):
        known = [text for text in texts if text is not None]
        if missing := len(texts) - len(known):
            return no_labels(f"{missing:,} of {len(texts):,} images have no .cls")
        if all(text.isdecimal() and len(text) <= MOST_DIGITS for text in known):
            return to_class_numbers(np.array(known).astype(np.int64), ".cls", None)
        return to_class_numbers(known, ".cls", classes)

    def __len__(self) -> int:
        return len(self.names)

    def where(self, id: int) -> str:
        return f"{printable(os.fsencode(self.files[self.shards[id]]))}: {printable(self.names[id])}"

    def read(self, id: int, max_pixels: int) -> bytes:
        return ImageInTar(self.files[self.shards[id]], int(self.offsets[id]), int(self.sizes[id])).read(max_pixels)


class TarRows:
    """The samples of tars in their order there, for a stream: the members of one side by side, as WebDataset writes
    them. A row says where its image is; the bytes are read when it is decoded."""

    def __init__(self, files: list[Path], image_column: str | None):
        self.files, self.image_column, self.skipped = files, image_column, Skipped()
        for file in files:
            check_end(file)
        head = list(islice(self._rows(files[0], self.skipped), HEAD))
        if not head:
            raise NoInput(f"no images in {files[0]}, the first of {len(files)} tar files: found {self.skipped}")
        self.labelled = any(row["label"] is not None for row in head)

    def shard(self, index: int) -> Iterator[dict[str, Any]]:
        return self._rows(self.files[index], Skipped())

    def _rows(self, file: Path, skipped: Skipped) -> Iterator[dict[str, Any]]:
        for _, side_by_side in groupby(members(file, skipped, STREAMED), lambda member: _key(member.name)[0]):
            images, labels = _samples(file, side_by_side, self.image_column, skipped)
            for key, member in images.items():
                text = labels.get(key, "")
                label = int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else None
                yield {"image": ImageInTar(file, member.offset, member.size), "label": label}


def _key(name: bytes) -> tuple[bytes, bytes]:
    """The sample that a member belongs to, and its column."""
    folder, _, last = name.rpartition(b"/")
    key, _, column = last.partition(b".")
    return folder + b"/" + key, column


def _samples(
    file: Path, members: Iterable[Member], image_column: str | None, skipped: Skipped
) -> tuple[dict[bytes, Member], dict[bytes, str]]:
    """The image and the label of each sample by its key."""
    images: dict[bytes, Member] = {}
    labels: dict[bytes, str] = {}
    with open(file, "rb", buffering=0) as stream:
        for member in members:
            key, column = _key(member.name)
            if column == b"cls" and member.size <= LONGEST_LABEL:
                text = os.pread(stream.fileno(), member.size, member.offset)
                labels[key] = text.decode("utf-8", "backslashreplace").strip()
            elif (ending := b"." + column.lower().rpartition(b".")[2]) not in ENDINGS:
                skipped.add(f"*{_shown(ending)}" if column else "without an ending", member.name)
            elif image_column in (None, _shown(column)):
                if key in images:
                    other = printable(_key(images[key].name)[1])
                    several = f"{printable(key)} in {file} has several images, {other} and {printable(column)}"
                    raise ValueError(f"{several}: choose one with --image_column")
                images[key] = member
    return images, labels


def tar_files(pattern: str, split: str) -> list[Path]:
    files = split_files("webdataset", pattern, split)
    for file in files:
        if file.name.endswith((".gz", ".tgz", ".zst", ".xz", ".bz2")):
            raise DataError(f"{file} is compressed, so its images cannot be reached one by one: unpack it to a .tar")
    return files
