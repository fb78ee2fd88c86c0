"""Array files: idx (MNIST's format) and npz."""

import gzip
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import psutil
from einops import rearrange

from sslvit.data.labels import Labels, no_labels, to_class_numbers
from sslvit.data.levels import Levels, Span, check_levels, to_bytes
from sslvit.data.readers import npz
from sslvit.data.source import ArraySource, Mapped, digest
from sslvit.errors import DataError, NoInput

UINT8 = 8  # idx files: two zero bytes, the type, the number of axes, then the axes as big-endian uint32
IDX_STEMS = {"train": ("train",), "test": ("t10k", "test")}


def open_idx(folder: Path, split: str) -> ArraySource:
    """A folder of MNIST's four files, or of Fashion-MNIST's, KMNIST's, EMNIST's: gzipped or not, labels optional."""
    if not folder.is_dir():
        raise NoInput(f"idx:{folder}: no such folder")
    images = _find(folder, split, "images", 3) or _find(folder, split, "images", 4)
    if images is None:
        expected, files = f"{IDX_STEMS[split][0]}-images-idx3-ubyte or .gz", sorted(p.name for p in folder.iterdir())
        raise NoInput(
            f"idx:{folder} has no images of the {split} split: expected a file like {expected}, got {files[:8]}"
        )
    array = _read_idx(images)
    if array.ndim not in (3, 4) or not array.size:
        raise NoInput(f"{images} holds no images: its header says {array.shape}")
    pixels = rearrange(array, "n H W -> n 1 H W") if array.ndim == 3 else rearrange(array, "n H W c -> n c H W")
    file = _find(folder, split, "labels", 1)
    labels = no_labels(f"{folder} has no labels of the {split} split") if file is None else _labels(file, len(pixels))
    # Bytes on disk that are the array already are mapped: all processes share them.
    mapped = images.suffix != ".gz" and array.ndim == 3
    stored = Mapped(images, 4 + 4 * array.ndim, pixels.shape) if mapped else pixels
    return _source(pixels, stored, f"idx:{folder} ({split})", labels)


def open_npz(file: Path, split: str, classes: tuple[str, ...] | None, span: Span | None = None) -> ArraySource:
    """images and labels, or x_train, y_train, x_test, y_test, or train_images, train_labels, ... as in MedMNIST."""
    if not file.is_file():
        raise NoInput(f"npz:{file}: no such file")
    if file.suffix == ".npy":
        raise DataError(f"npz:{file} is one array: np.savez('images.npz', images=..., labels=...) writes what is read")
    try:
        with zipfile.ZipFile(file) as archive:
            npz.check_sizes(archive, file.stat().st_size)
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            own = (f"{split}_images", f"x_{split}", f"{split}_x", f"X_{split}")
            images = _first(names, own + (("images", "x", "X", "data", "arr_0") if split == "train" else ()))
            if images is None:
                raise NoInput(f"{file} has no {split} images: expected {own[0]}, it holds {', '.join(names)}")
            own = (f"{split}_labels", f"y_{split}", f"{split}_y", f"Y_{split}")
            column = _first(names, own + (("labels", "label", "y", "arr_1") if split == "train" else ()))
            pixels = as_uint8(_read_npy(archive, images), f"{file}: {images}", span)
            labels = no_labels(f"{file} holds no labels, only {', '.join(names)}")
            if column is not None:
                labels = to_class_numbers(_read_npy(archive, column), column, classes)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, LookupError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} cannot be read: {error}") from error
    return _source(pixels, pixels, f"npz:{file} ({split})", labels)


def _source(pixels: np.ndarray, stored: np.ndarray | Mapped, name: str, labels: Labels) -> ArraySource:
    return ArraySource(stored, name=name, fingerprint=digest(np.ascontiguousarray(pixels).data), labels=labels)


def _find(folder: Path, split: str, kind: str, axes: int) -> Path | None:
    """E.g. train-images-idx3-ubyte.gz, also written train-images.idx3-ubyte, or with EMNIST's prefix."""
    for stem in IDX_STEMS[split]:
        for ending in (f"{stem}-{kind}-idx{axes}-ubyte", f"{stem}-{kind}.idx{axes}-ubyte"):
            files = sorted(file for file in folder.iterdir() if file.name.removesuffix(".gz").endswith(ending))
            if len({file.name.removesuffix(".gz") for file in files}) > 1:
                raise DataError(f"{folder} has several sets, {', '.join(f.name for f in files)}: keep one per folder")
            if files:
                return files[0]
    return None


def _read_idx(file: Path) -> np.ndarray:
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            zero, kind, axes = struct.unpack(">HBB", stream.read(4))
            if zero != 0 or kind != UINT8 or not 1 <= axes <= 4:
                raise DataError(f"{file} is not an idx file of uint8: it begins with {zero:04x} {kind:02x} {axes:02x}")
            shape = struct.unpack(f">{axes}I", stream.read(4 * axes))
            wanted = int(np.prod(shape, dtype=object))
            if file.suffix == ".gz":
                npz.check_unpacked(wanted, file.stat().st_size, "unpack it: gunzip FILE")
            _check_memory(wanted, file)
            content = stream.read(wanted + 1)
    except DataError:
        raise
    except (OSError, EOFError, struct.error, zlib.error, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if len(content) != wanted:
        size = f"more than {wanted:,}" if len(content) > wanted else f"{len(content):,}"
        raise DataError(f"{file} has {size} bytes of data, its header {shape} needs {wanted:,}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _labels(file: Path, size: int) -> Labels:
    values = _read_idx(file)
    if values.shape != (size,):
        raise DataError(f"{file} holds labels of shape {values.shape} for {size} images")
    return to_class_numbers(values, file.name, None)


def _read_npy(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    entry = archive.getinfo(f"{name}.npy")
    _check_memory(entry.file_size, f"{archive.filename}: {name}")
    return npz.array_of(archive, entry, "fiubSU")


def _check_memory(wanted: int, what: str | Path) -> None:
    available = psutil.virtual_memory().available
    if wanted > available:
        raise DataError(f"{what} claims {wanted:,} bytes, more than the {available:,} of free memory")


def _first(names: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((name for name in wanted if name in names), None)


SAMPLE, BRIGHT = 1 << 22, 99.5  # values of an array of more than 8 bits, and their percentile that counts as bright


def as_uint8(array: np.ndarray, what: str, span: Span | None) -> np.ndarray:
    """n H W, n H W c or n c H W of bool, uint8, uint16 or float in [0, 1], or with a span of any numbers -> n c H W"""
    if array.ndim == 3:
        array = rearrange(array, "n H W -> n 1 H W")
    elif array.ndim != 4 or array.shape[1] == array.shape[3]:
        raise DataError(f"{what} has shape {array.shape}, which is not n H W, n H W c or n c H W with few channels")
    elif array.shape[3] < array.shape[1]:
        array = rearrange(array, "n H W c -> n c H W")
    if not array.size:
        raise NoInput(f"{what} holds no pixels: its shape is {array.shape}")
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif span and array.dtype != np.uint8 and array.dtype.kind in "uif":
        if not np.isfinite(array).all():
            raise DataError(f"{what} contains NaN or inf")
        array = np.stack([to_bytes(image, span) for image in array])
    elif array.dtype == np.uint16:
        sample = array[:: max(1, min(array.size // SAMPLE, len(array) // 16))]
        bright = int(np.percentile(sample, BRIGHT))  # so that a few pixels do not decide
        # Thin strokes and stars are bright in so few pixels that only the brightest of all tells anything.
        check_levels(Levels(int(array.min()), bright or int(array.max()), 65535, grey=True), f"99.5% of {what}")
        array = np.stack([((image.astype(np.uint32) + 128) // 257).astype(np.uint8) for image in array])
    elif array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):
            spread = f"{what} holds floats from {array.min():g} to {array.max():g}"
            raise DataError(f"{spread}: they must lie in [0, 1], or use --range")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise DataError(f"{what} holds {array.dtype}: pixels are bool, uint8, uint16 or floats in [0, 1]")
    return np.ascontiguousarray(array)
