"""Files and folders that a crash leaves either complete or invisible.

The order is always the same: write into a `.tmp-` folder, fsync every file, fsync the folder, rename it to its real
name, fsync the parent. Before anything is deleted it is renamed to `.del-`, so that nothing half deleted has a real
name. `.tmp-` and `.del-` entries that a killed process left behind are swept by the next one.

The hash is xxh3_128: 264 MB took 0.015 s, against 0.17 s for sha256, 0.34 s for blake2b, and 0.08 s for writing the
file. It protects against accidents, not attackers; nor would sha256, since who can change a file can change its
manifest too.
"""

import errno
import io
import json
import logging
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

log = logging.getLogger(__name__)

CHUNK = 1 << 20  # small enough to be still in the cache when it is written after it was hashed
LONGEST_HEADER, MOST_TENSORS = 4 << 20, 20_000  # of a safetensors file; the largest ViT and its optimizer: 2,000
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(path: Path, pieces: Iterable[bytes | memoryview], *, synced: bool = True) -> dict[str, int | str]:
    """Writes and fsyncs a new file, and returns the size and hash of its intended content, in one pass.

    Mode 0666 minus the umask: safetensors' own writer makes files that only their owner can read.
    """
    digest, size = xxh3_128(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            for start in range(0, len(piece), CHUNK):
                chunk = memoryview(piece)[start : start + CHUNK]
                digest.update(chunk)
                size += len(chunk)
                while chunk:  # a full disk accepts some bytes and refuses the others at the next call
                    chunk = chunk[os.write(fd, chunk) :]
        if synced:
            os.fsync(fd)
    finally:
        os.close(fd)
    return {"size": size, "xxh3_128": digest.hexdigest()}


def replace(path: Path, pieces: Iterable[bytes | memoryview], *, synced: bool = True) -> None:
    """Writes a file whole or not at all, in the place of another of its name: of a link itself, not of its target.

    synced: otherwise a power loss may empty it, which a file that is written often can bear.
    """
    make_folder(path.parent)
    place = temporary(path.parent, path.name)
    try:
        write(place / path.name, pieces, synced=synced)
        (place / path.name).replace(path)
        if synced:
            sync_folder(path.parent)
    finally:
        discard(place)


def without_links(name: str | Path, flags: int) -> int:
    """An opener for `open`: a link is refused, and a named pipe does not wait for its other end."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def replace_text(path: Path, text: str) -> None:
    """As UTF-8, whatever the locale; other bytes of file names stay legible, as \\udce9."""
    replace(path, [text.encode("utf-8", "backslashreplace")])


def replace_picture(path: Path, picture: Any) -> None:
    """As a PNG. picture: a Pillow image."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    replace(path, [encoded.getvalue()])


def fingerprint(path: Path) -> dict[str, int | str]:
    """What `write` returned, computed from the file."""
    digest, size = xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "xxh3_128": digest.hexdigest()}


def read(path: Path, written: dict[str, int | str] | None = None, longest: int | None = None) -> bytes:
    """All bytes of a regular file, read once. written: the expected result of `fingerprint`. longest: the most bytes.

    Raises ValueError with the reason, or OSError.
    """
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):  # to open a named pipe would wait for ever
        raise ValueError("is not a regular file")
    if longest is not None and status.st_size > longest:
        raise ValueError(f"has {status.st_size} bytes, more than {longest}")
    if written is not None and status.st_size != written["size"]:
        raise ValueError(f"has {status.st_size} bytes instead of {written['size']}")
    contents = path.read_bytes()
    if written is not None and xxh3_128(contents).hexdigest() != written["xxh3_128"]:
        raise ValueError("its bytes are not those that were written (hash differs)")
    return contents


def tensor_pieces(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time, so that saving needs no second copy of the model.

    Tensors that share memory are written once per name. Wide dtypes come first, as in the reference implementation, so
    that every tensor of a mapped file is aligned.
    """
    assert sys.byteorder == "little"
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or name == "__metadata__":
            raise ValueError(f"tensor {name!r} ({tensor.dtype}, {tensor.layout}) cannot be in a safetensors file")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        tensor = tensors[name].detach().cpu().contiguous()
        yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def check_header(begins: bytes) -> None:
    """Checks a safetensors file by its first LONGEST_HEADER + 8 bytes. Its library accepts headers of 100 MB, repeats
    them in its errors, and needs 40 us per tensor, even an empty one. Raises ValueError."""
    length = int.from_bytes(begins[:8], "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"its header claims {length:,} bytes, more than the {LONGEST_HEADER:,} that are read")
    if (count := begins.count(b"{", 8, 8 + length) - 1) > MOST_TENSORS:  # JSON cannot hide a brace
        raise ValueError(f"its header names {count:,} tensors, more than the {MOST_TENSORS:,} that are read")


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    digest = xxh3_128()
    for piece in tensor_pieces(tensors):
        digest.update(piece)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes the names inside a folder survive a power loss."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems neither can nor need it
            raise
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """With its parents, so that they survive a power loss too."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def temporary(parent: Path, name: str) -> Path:
    """A new, empty folder beside the place where it will be renamed to: elsewhere a rename might be a copy."""
    folder = parent / f".tmp-{name}-{uuid.uuid4().hex[:8]}"
    os.mkdir(folder)
    return folder


@contextmanager
def whole_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """A folder to write in, which then becomes `folder`, whole or not at all: in the place of an older one, or OSError
    if there is one by then that is not empty."""
    make_folder(folder.parent)
    written = temporary(folder.parent, folder.name)
    try:
        yield written
        sync_folder(written)
        older = hide(folder) if replace and folder.exists() else None
        os.rename(written, folder)
        sync_folder(folder.parent)
        if older is not None:
            delete(older)
    finally:
        if written.exists():
            discard(written)


def hide(path: Path) -> Path:
    """Renames a file or folder to a hidden name, which the caller is to delete."""
    trash = path.with_name(f".del-{path.name}-{uuid.uuid4().hex[:8]}")
    os.rename(path, trash)
    return trash


def discard(path: Path) -> None:
    """Takes a file or folder out of sight and then deletes it. A failure is logged: it must not stop a run."""
    try:
        delete(hide(path))
    except OSError as error:
        log.warning("%s could not be deleted: %s", path, error)


def sweep(folder: Path) -> None:
    """Deletes leftovers of a killed process. Only for the one process that may write here."""
    for path in folder.iterdir():
        if path.name.startswith((".tmp-", ".del-")):
            try:
                delete(path)
            except OSError as error:
                log.warning("%s could not be deleted: %s", path, error)


def delete(path: Path) -> None:
    """Deletes a file, a link (not what it points to), or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)
