"""Small images decoded once: a uint8 array in a file that all processes and later runs map into memory.

    $SSLVIT_CACHE, else $XDG_CACHE_HOME/sslvit, else ~/.cache/sslvit, and without a home /tmp/sslvit-UID
        <hash of what was decoded and how>/pixels.bin     n c H W
                                           about.json     shape, hash of pixels.bin, the bad images; sealed

A cache folder is written under another name and renamed when complete, and its hash is checked whenever it is opened,
which takes a second a gigabyte; what is not as it was written is written anew. Any of them may be deleted at any time:
nothing else does it.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sslvit.data.image import BadImage
from sslvit.data.labels import Labels
from sslvit.data.readers.encoded import EncodedSource
from sslvit.data.source import ArraySource, Mapped, Source
from sslvit.errors import Stop
from sslvit.storage import durable, sealed

FORMAT = 1  # raise it when the opener decodes anything differently
CHUNK = 1024
PATIENCE = 600  # seconds for a chunk of a worker
SPARE = 1.1  # the disk must have this much more room than is written
ABOUT, LONGEST_ABOUT = "about.json", 1 << 30  # which names every bad image


def say(line: str) -> None:
    """One line for the person at the terminal."""
    print(line, file=sys.stderr, flush=True)


def cache_root() -> Path:
    if "SSLVIT_CACHE" in os.environ:
        return Path(os.environ["SSLVIT_CACHE"])
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "sslvit"
    try:
        return Path.home() / ".cache" / "sslvit"
    except RuntimeError:  # a user without a home, as containers have
        return Path(tempfile.gettempdir()) / f"sslvit-{os.getuid()}"


def decoded_bytes(source: Source) -> int:
    return len(source) * source.channels * source.canvas[0] * source.canvas[1]


def cached(source: EncodedSource, workers: int = 0, say: Callable[[str], None] = say) -> Source:
    """The same images from the cache, decoded now if they are not there. Where that cannot be done (no room, or the
    images turn out to differ in size) the source itself, and a line that says why."""
    wanted = json.dumps([FORMAT, source.version])
    folder = cache_root() / hashlib.blake2b(wanted.encode(), digest_size=16).hexdigest()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one decodes, the others wait for it
            if (ready := _open(folder, source, say)) is not None:
                return ready
            _write(folder, source, workers, say)
            return _open(folder, source, say) or source
    except OSError as error:
        say(f"{source.name}: not cached, images are decoded whenever they are read: {error}")
        return source


def _open(folder: Path, source: EncodedSource, say: Callable[[str], None]) -> Source | None:
    try:
        about = sealed.read(folder / ABOUT, longest=LONGEST_ABOUT, require_seal=True)
        if "differs" in about:
            return source
        sealed.check(about, shape=list, hash=str, bad=list)
        shape = (len(source), source.channels, *source.canvas)
        if about["shape"] != list(shape) or _hash(folder / "pixels.bin") != about["hash"]:
            raise ValueError("its pixels are not what was written")
    except FileNotFoundError:
        return None
    except ValueError as error:
        say(f"cache {folder} is written anew: {error}")
        return None
    return ArraySource(
        Mapped(folder / "pixels.bin", 0, shape),
        name=source.name,
        fingerprint=source.fingerprint,
        labels=Labels(source.labels, source.classes, source.unlabelled),
        bad={id: (path, reason) for id, path, reason in about["bad"]},
        decoded_from=source,
    )


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


class _Chunks(Dataset):
    """Item i is a run of images, decoded: b c H W, and the bad among them. Or the id of one of another size."""

    def __init__(self, source: EncodedSource):
        self.source = source

    def __len__(self) -> int:
        return -(-len(self.source) // CHUNK)

    def __getitem__(self, item: int) -> tuple[np.ndarray, list[tuple[int, str, str]]] | int:
        ids = range(item * CHUNK, min((item + 1) * CHUNK, len(self.source)))
        pixels = torch.zeros(len(ids), self.source.channels, *self.source.canvas, dtype=torch.uint8)
        bad = []
        for slot, id in enumerate(ids):
            try:
                image = self.source.image(id)
            except BadImage as error:
                bad.append((id, self.source.store.where(id), str(error)))
                continue
            if image.shape[1:] != self.source.canvas:
                return id
            pixels[slot] = image
        return pixels.numpy(), bad  # through a pipe: these are more than shared memory may have room for


def as_it_is(chunk: Any) -> Any:
    """torch's own collating would make tensors of arrays."""
    return chunk


def _write(folder: Path, source: EncodedSource, workers: int, say: Callable[[str], None]) -> None:
    size, free = decoded_bytes(source), shutil.disk_usage(folder.parent).free
    if free < SPARE * size:
        raise OSError(f"{folder.parent} has {free / 1e6:,.0f} MB free, {SPARE * size / 1e6:,.0f} MB are needed")
    height, width = source.canvas
    say(
        f"{source.name}: decoding {len(source):,} images of {source.channels} x {height} x {width} once, "
        f"{size / 1e6:,.1f} MB in {folder}"
    )
    shutil.rmtree(folder, ignore_errors=True)
    new = folder.with_suffix(".new")  # safe under the lock; what a killed process left is overwritten
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        try:
            about = _decode(new / "pixels.bin", source, workers)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            raise Stop(
                f"{source.name}: a process that decodes its images died, or gave nothing for {PATIENCE} seconds: a "
                f"file that cannot be read, or no memory left. The same command tries again. torch says: {error}"
            ) from error
        durable.write(new / ABOUT, [sealed.text(about, indent=None)])
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _decode(file: Path, source: EncodedSource, workers: int) -> dict:
    digest, bad = hashlib.blake2b(), []
    with open(file, "wb") as stream:
        patience = PATIENCE if workers else 0
        chunks = DataLoader(
            _Chunks(source), batch_size=None, num_workers=workers, timeout=patience, collate_fn=as_it_is
        )
        for chunk in tqdm(chunks, unit=f" x {CHUNK:,} images", delay=3, disable=None):
            if isinstance(chunk, int):
                stream.truncate(0)
                return {"differs": chunk}  # remembered, so that the next run does not try again
            pixels = np.asarray(chunk[0])
            digest.update(pixels.data)
            stream.write(pixels.data)
            bad += chunk[1]
        stream.flush()
        os.fsync(stream.fileno())
    return {"shape": [len(source), source.channels, *source.canvas], "hash": digest.hexdigest(), "bad": bad}
