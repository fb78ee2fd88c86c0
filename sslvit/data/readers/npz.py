"""The arrays of an .npz, read without running code, and a limit on what a compressed file may unpack to.

Deflate makes a thousand bytes of one, so that a file of 2 MB can fill a machine's memory. Images of few colours shrink
to a fiftieth, weights hardly at all.
"""

import zipfile
from math import prod

import numpy as np
from numpy.lib import format as npy

MOST_TIMES, ALWAYS = 100, 64 << 20


def check_unpacked(unpacked: int, packed: int, remedy: str) -> None:
    if unpacked > (most := MOST_TIMES * packed + ALWAYS):
        raise ValueError(
            f"its {packed:,} bytes claim to unpack to {unpacked:,}, more than the {most:,} ({MOST_TIMES} times as many "
            f"and {ALWAYS >> 20} MiB) that are unpacked. If you trust it, {remedy}"
        )


def check_sizes(archive: zipfile.ZipFile, packed: int) -> None:
    """Of all entries by the archive's directory, beyond whose sizes zipfile reads nothing, whatever they hold."""
    claimed = sum(entry.file_size for entry in archive.infolist())
    check_unpacked(claimed, packed, "store it without compression: np.savez(NEW, **np.load(FILE))")


def array_of(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, kinds: str = "fiub") -> np.ndarray:
    """Its header is compared with its size by the directory before memory is taken. kinds: of dtypes, by numpy's
    letters; never objects."""
    with archive.open(entry) as stream:
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{entry.filename} has version {version}")
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(stream)
        size = entry.file_size - stream.tell()
    if dtype.hasobject or dtype.kind not in kinds:
        raise ValueError(f"{entry.filename} contains {dtype}, not numbers")
    if min(shape, default=1) < 0 or prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{entry.filename} claims shape {shape} of {dtype}, and has {entry.file_size} bytes")
    with archive.open(entry) as stream:
        return npy.read_array(stream, allow_pickle=False)
