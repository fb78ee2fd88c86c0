"""The members of a tar by name and offset, from its headers alone. Nothing is unpacked, so no name leads anywhere.

https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html, and GNU's long names and large sizes.
"""

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sslvit.data.readers.folders import Skipped
from sslvit.errors import DataError

BLOCK, AHEAD = 512, 1 << 14
ADLER = 65521  # its modulus
REGULAR, WITHOUT_DATA, LONG_NAME, PAX = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6"), b"L", b"x"
SILENT = (b"5", b"g", b"K")  # folders, comments on the whole archive, long names of links: not worth a mention
PAX_SIZE = re.compile(rb"[0-9]{1,18}")
OCTAL = re.compile(rb"[0-7]*")
LONGEST_NAME = 1 << 16  # bytes of a long name's or extended header's block
UNENDED = "at byte {:,}, where it ends without the empty block that closes an archive"


class Member(NamedTuple):
    name: bytes
    offset: int
    size: int


class _Damaged(Exception):
    """At which byte, and how."""


def members(file: Path, skipped: Skipped, ahead: int = AHEAD) -> Iterator[Member]:
    """The regular files of a tar (ustar, GNU and pax names), reading `ahead` bytes at a time. A damaged or truncated
    one is refused: what else was in it is unknown."""
    with _opened(file) as fd:
        yield from _members(fd, skipped, ahead)


def check_end(file: Path) -> None:
    """That a tar ends with an empty block, without reading it: most truncated ones do not."""
    with _opened(file) as fd:
        end = os.fstat(fd).st_size
        if os.pread(fd, BLOCK, max(0, end - BLOCK)) != bytes(BLOCK):
            raise _Damaged(UNENDED.format(end))


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    try:
        with open(file, "rb", buffering=0) as stream:
            yield stream.fileno()
    except _Damaged as error:
        raise DataError(f"{file} is damaged {error}: write it again or leave it out") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


def _members(file: int, skipped: Skipped, ahead: int) -> Iterator[Member]:
    position, long_name, long_size, empty, end = 0, b"", None, bytes(BLOCK), os.fstat(file).st_size
    buffer, first = b"", 0  # headers of small members lie close together
    while True:
        if not 0 <= position - first <= len(buffer) - BLOCK:
            buffer, first = os.pread(file, ahead, position), position
        header = buffer[position - first : position - first + BLOCK]
        if len(header) < BLOCK:
            raise _Damaged(UNENDED.format(end))
        if header == empty:
            return _check_empty(file, position)
        try:
            # The checksum is the sum of the bytes with its own taken as spaces. Adler's low half is a sum too, plus 1.
            adler = zlib.adler32(header[156:], zlib.adler32(header[:148])) & 0xFFFF
            if (_number(header[148:156]) - 8 * ord(" ") + 1 - adler) % ADLER:
                raise ValueError("wrong checksum")
            declared, kind = _number(header[124:136]), header[156:157]
        except ValueError as error:
            raise _Damaged(f"at byte {position:,}, which is not a member's header") from error
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
    """That nothing follows the end: neither an appended archive nor members beyond a hole."""
    while piece := os.pread(file, 1 << 20, position):
        if piece.strip(b"\0"):
            raise _Damaged(f"after byte {position:,}, where an empty block closes it but more follows")
        position += len(piece)


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's binary form, for sizes beyond 8 GB
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    if not OCTAL.fullmatch(digits := field.strip(b" \0")):  # int() would take a sign
        raise ValueError(f"{field!r} is not a number")
    return int(digits or b"0", 8)


def _pax(text: bytes) -> dict[bytes, bytes]:
    """Records of "length key=value\\n"."""
    records = {}
    while text:
        length, space, _ = text.partition(b" ")
        if not space or len(length) > 18 or not length.isdigit() or not 0 < int(length) <= len(text):
            break
        key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key] = value
        text = text[int(length) :]
    return records
