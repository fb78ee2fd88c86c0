"""WebDataset tars as a store of encoded images, read by number: the shards are indexed once and never unpacked.

    webdataset:/shards/train-{0000..0099}.tar is written webdataset:/shards/train-*.tar

A sample is a key, the name up to the first dot of its last part, and the rest is the column: 0001.jpg and 0001.cls are
the image and the label of one. Only headers and image bytes are read, so no name in an archive can lead anywhere.
"""

import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sslvit.data.files import ENDINGS, Names, Skipped, printable, stamp
from sslvit.data.hub import SPLITS, matching, of_split
from sslvit.data.image import BYTES_A_PIXEL, BadImage
from sslvit.data.labels import no_labels, number
from sslvit.errors import DataError, NoInput

BLOCK, AHEAD = 512, 1 << 14
ADLER = 65521  # its modulus
REGULAR, WITHOUT_DATA, LONG_NAME, PAX = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6"), b"L", b"x"
SILENT = (
    b"5",
    b"g",
    b"K",
)  # folders, remarks on the whole archive, long names of links: nothing that could be an image
PAX_SIZE = re.compile(rb"[0-9]{1,18}")
OCTAL = re.compile(rb"[0-7]*")
LONGEST_NAME = 1 << 16  # bytes of a long name's or extended header's block
LONGEST_LABEL = 1 << 10


class Member(NamedTuple):
    name: bytes
    offset: int
    size: int


def members(file: Path, skipped: Skipped, ahead: int = AHEAD) -> Iterator[Member]:
    """The regular files of a tar (ustar, GNU and pax names), from its headers alone, `ahead` bytes at a time. What is
    damaged or cut off stops: nobody can know what else was in it."""
    try:
        with open(file, "rb", buffering=0) as stream:
            yield from _members(stream.fileno(), skipped, ahead)
    except _Damaged as error:
        raise DataError(f"{file} is damaged {error}: write it again or leave it out") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


class _Damaged(Exception):
    """At which byte, and how."""


def _members(file: int, skipped: Skipped, ahead: int) -> Iterator[Member]:
    position, long_name, long_size, empty, end = 0, b"", None, bytes(BLOCK), os.fstat(file).st_size
    held, first = b"", 0  # headers of small members lie close together
    while True:
        if not 0 <= position - first <= len(held) - BLOCK:
            held, first = os.pread(file, ahead, position), position
        header = held[position - first : position - first + BLOCK]
        if len(header) < BLOCK:
            raise _Damaged(f"at byte {end:,}, where it ends without the empty block that closes an archive")
        if header == empty:
            return _check_empty(file, position)
        try:
            # The checksum is the sum of the bytes with its own taken as spaces. Adler's low half is a sum too, plus 1.
            adler = zlib.adler32(header[156:], zlib.adler32(header[:148])) & 0xFFFF
            if (_number(header[148:156]) - 8 * ord(" ") + 1 - adler) % ADLER:
                raise ValueError("wrong checksum")
            declared, kind = _number(header[124:136]), header[156:157]
        except ValueError as error:
            raise _Damaged(f"at byte {position:,}, which is no header of a member") from error
        size, data = declared if long_size is None else long_size, position + BLOCK
        size *= kind not in WITHOUT_DATA
        position = data + -(-size // BLOCK) * BLOCK
        if data + size > end:
            raise _Damaged(f"at byte {end:,}, where it ends within a member of bytes {data:,} to {data + size:,}")
        if kind == LONG_NAME:
            long_name = os.pread(file, min(declared, LONGEST_NAME), data).rstrip(b"\0")
            continue
        if kind == PAX:
            records = _pax(os.pread(file, min(declared, LONGEST_NAME), data))
            long_name = records.get(b"path", long_name)
            long_size = int(records[b"size"]) if PAX_SIZE.fullmatch(records.get(b"size", b"")) else long_size
            continue
        prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
        name = long_name or prefix + b"/" * bool(prefix) + header[:100].partition(b"\0")[0]
        long_name, long_size = b"", None
        if kind in REGULAR:
            yield Member(name, data, size)
        elif kind not in SILENT:
            skipped.add("links, devices or sparse files", name)


def _check_empty(file: int, position: int) -> None:
    """That nothing follows the end: neither an archive put behind this one nor members beyond a hole."""
    while piece := os.pread(file, 1 << 20, position):
        if piece.strip(b"\0"):
            raise _Damaged(f"after byte {position:,}, where an empty block closes it but more follows")
        position += len(piece)


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's binary form, for sizes beyond 8 GB
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    if not OCTAL.fullmatch(digits := field.strip(b" \0")):  # int() would take a sign
        raise ValueError(f"{field!r} is no number")
    return int(digits or b"0", 8)


def _pax(text: bytes) -> dict[bytes, bytes]:
    """Records of "length key=value\\n"."""
    records = {}
    while text:
        length, space, _ = text.partition(b" ")
        if not space or not length.isdigit() or not 0 < int(length) <= len(text):
            break
        key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key] = value
        text = text[int(length) :]
    return records


class TarStore:
    def __init__(self, files: list[Path], *, image_column: str | None = None, classes: tuple[str, ...] | None = None):
        self.files, self.skipped = files, Skipped()
        names, places, texts = [], [], []
        for shard, file in enumerate(files):
            images, labels = self._samples(file, image_column)
            names += [member.name for member in images.values()]
            places += [(shard, member.offset, member.size) for member in images.values()]
            texts += [labels.get(key) for key in images]
        if not names:
            raise NoInput(f"no images in {len(files)} tar files: found {self.skipped}")
        self.names = Names(names)
        self.shards, self.offsets, self.sizes = np.array(places, np.int64).T.copy()
        self.labels, self.classes, self.unlabelled = self._labels(texts, classes)
        self.fingerprint = hashlib.blake2b(b"\0".join(names) + self.sizes.tobytes(), digest_size=16).hexdigest()
        self.version = f"{self.fingerprint}:{[(os.path.realpath(file), stamp(file.stat())) for file in files]}"

    def _samples(self, file: Path, image_column: str | None) -> tuple[dict[bytes, Member], dict[bytes, str]]:
        images, labels, shown = {}, {}, cache(printable)  # there are few columns
        with open(file, "rb") as stream:
            for member in members(file, self.skipped):
                folder, _, last = member.name.rpartition(b"/")
                key, _, column = last.partition(b".")
                key = folder + b"/" + key
                if column == b"cls" and member.size <= LONGEST_LABEL:
                    stream.seek(member.offset)
                    labels[key] = stream.read(member.size).decode("utf-8", "backslashreplace").strip()
                elif b"." + column.lower().rpartition(b".")[2] not in ENDINGS:
                    self.skipped.add(f"*.{shown(column)}", member.name)
                elif image_column in (None, shown(column)):
                    if key in images:
                        other = printable(images[key].name.rpartition(b"/")[2].partition(b".")[2])
                        raise ValueError(
                            f"{printable(key)} in {file} has several images, {other} and {printable(column)}: "
                            f"choose one with --image_column"
                        )
                    images[key] = member
        return images, labels

    @staticmethod
    def _labels(texts: list[str | None], classes: tuple[str, ...] | None):
        missing = sum(text is None for text in texts)
        if missing:
            return no_labels(f"{missing:,} of {len(texts):,} images have no .cls beside them")
        if all(text.isdecimal() for text in texts):
            return number(np.array(texts).astype(np.int64), ".cls", None)
        return number(texts, ".cls", classes)

    def __len__(self) -> int:
        return len(self.names)

    def where(self, id: int) -> str:
        return f"{printable(os.fsencode(self.files[self.shards[id]]))}: {printable(self.names[id])}"

    def read(self, id: int, max_pixels: int) -> bytes:
        size = int(self.sizes[id])
        if size > BYTES_A_PIXEL * max_pixels:
            raise BadImage(f"{size:,} bytes > limit {BYTES_A_PIXEL * max_pixels:,}")
        try:
            with open(self.files[self.shards[id]], "rb", buffering=0) as stream:
                data = os.pread(stream.fileno(), size, int(self.offsets[id]))
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from error
        if len(data) != size:
            raise BadImage(f"the archive ends after {len(data):,} of {size:,} bytes")
        return data


def open_tars(
    pattern: str, split: str, *, image_column: str | None = None, classes: tuple[str, ...] | None = None
) -> TarStore:
    files = matching(pattern, ".tar")
    compressed = [file for file in files if file.name.endswith((".gz", ".tgz", ".zst", ".xz", ".bz2"))]
    if compressed:
        raise DataError(
            f"{compressed[0]} is compressed, so its images cannot be reached by number: unpack it to a .tar"
        )
    files = of_split(files, split)
    if not files:
        raise NoInput(f"webdataset:{pattern} has no {split} split: no file is named {' or '.join(SPLITS[split])}-...")
    return TarStore(files, image_column=image_column, classes=classes)
