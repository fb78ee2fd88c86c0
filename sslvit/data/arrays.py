"""Array files: idx (MNIST's format) and npz."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
from einops import rearrange

from sslvit.data.samples import ArraySource, Mapped
from sslvit.errors import DataError, NoInput

# http://yann.lecun.com/exdb/mnist: two zero bytes, the type (8: uint8), the number of axes, the axes as big-endian uint32.
UINT8 = 8
IDX_STEMS = {"train": ("train",), "test": ("t10k", "test")}


def open_idx(folder: Path, split: str) -> ArraySource:
    """A folder of MNIST's four files, or of Fashion-MNIST's, KMNIST's, EMNIST's: gzipped or not, labels optional."""
    if not folder.is_dir():
        raise NoInput(f"idx:{folder}: no such folder")
    images = _find(folder, split, "images", 3) or _find(folder, split, "images", 4)
    if images is None:
        raise NoInput(
            f"idx:{folder} has no images of the {split} split: expected a file like "
            f"{IDX_STEMS[split][0]}-images-idx3-ubyte or .gz, found {sorted(p.name for p in folder.iterdir())[:8]}"
        )
    array = _read(images)
    if not array.size:
        raise NoInput(f"{images} holds no pixels: its header says {array.shape}")
    pixels = rearrange(array, "n H W -> n 1 H W") if array.ndim == 3 else rearrange(array, "n H W c -> n c H W")
    file = _find(folder, split, "labels", 1)
    labels = None if file is None else _read(file).astype(np.int64)
    if labels is not None and labels.shape != (len(pixels),):
        raise DataError(f"{file}: {labels.shape} labels for {len(pixels)} images")
    fingerprint = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).hexdigest()
    stored = pixels
    if images.suffix != ".gz" and array.ndim == 3:  # uint8 already: every process maps the one file
        stored = Mapped(images, 4 + 4 * array.ndim, pixels.shape)
    classes = None if labels is None else tuple(str(label) for label in range(labels.max() + 1))
    return ArraySource(stored, name=f"idx:{folder} ({split})", fingerprint=fingerprint, labels=labels, classes=classes)


def _find(folder: Path, split: str, kind: str, axes: int) -> Path | None:
    """E.g. train-images-idx3-ubyte.gz, also written train-images.idx3-ubyte, or with EMNIST's prefix."""
    for stem in IDX_STEMS[split]:
        for ending in (f"{stem}-{kind}-idx{axes}-ubyte", f"{stem}-{kind}.idx{axes}-ubyte"):
            found = sorted(p for p in folder.iterdir() if p.name.removesuffix(".gz").endswith(ending))
            if len(found) > 1 and {p.name.removesuffix(".gz") for p in found} != {found[0].name}:
                raise DataError(f"{folder} holds several sets: {', '.join(p.name for p in found)}; keep one a folder")
            if found:
                return found[0]
    return None


def _read(file: Path) -> np.ndarray:
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            zero, kind, axes = struct.unpack(">HBB", stream.read(4))
            if zero != 0 or kind != UINT8 or not 1 <= axes <= 4:
                raise DataError(f"{file} is not an idx file of uint8: it begins with {zero:04x} {kind:02x} {axes:02x}")
            shape = struct.unpack(f">{axes}I", stream.read(4 * axes))
            wanted = int(np.prod(shape, dtype=object))
            # At most one byte more than is wanted: a header that lies must not fill the memory.
            content = stream.read(wanted + 1)
    except (OSError, EOFError, struct.error, gzip.zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if len(content) != wanted:
        raise DataError(
            f"{file} holds {'more than ' * (len(content) > wanted)}{min(len(content), wanted):,} bytes of "
            f"data, its header {shape} wants {wanted:,}"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)
