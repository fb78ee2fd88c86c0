"""Small images decoded once: a uint8 array in a file that all processes and later runs map into memory.

    $SSLVIT_CACHE, else $XDG_CACHE_HOME/sslvit, else ~/.cache/sslvit, and without a home /tmp/sslvit-UID
        <hash of what was decoded and how>/pixels.bin     n c H W
                                           about.json     shape, hash of pixels.bin, the bad images; sealed

The hash is checked whenever a cache is opened; a damaged one is written anew. Any of them may be deleted at any time:
nothing else does it.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from sslvit.data.image import ImageError
from sslvit.data.labels import Labels
from sslvit.data.readers.encoded import EncodedSource
from sslvit.data.source import ArraySource, Mapped, Source, digest
from sslvit.errors import Error
from sslvit.processes.progress import progress_bar
from sslvit.processes.system import fcntl
from sslvit.storage import durable, sealed

FORMAT = 2  # raise it when the opener decodes anything differently
CHUNK = 1024
PATIENCE = 600  # seconds for a chunk of a worker
SPARE = 1.1  # the disk must have this much more room than is written
PIXELS, ABOUT = "pixels.bin", "about.json"
LONGEST_ABOUT = 1 << 30  # it names every bad image


def say(line: str) -> None:
    """One line for the person at the terminal."""
    print(line, file=sys.stderr, flush=True)


def cache_root() -> Path:
    if "SSLVIT_CACHE" in os.environ:
        return Path(os.environ["SSLVIT_CACHE"])
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "sslvit"
    try:
        return Path.home() / ".cache" / "sslvit"
    except RuntimeError:  # a user without a home, as containers have
        return Path(tempfile.gettempdir()) / f"sslvit-{os.getuid()}"


def decoded_bytes(source: Source) -> int:
    return len(source) * source.channels * source.canvas[0] * source.canvas[1]


def cached(source: EncodedSource, workers: int = 0, say: Callable[[str], None] = say) -> Source:
    """The same images from the cache, decoded now if they are not in it. If that is impossible (no room, or images of
    several sizes) the source itself, and a line that says why."""
    wanted = json.dumps([FORMAT, source.version])
    folder = cache_root() / digest(wanted.encode())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process decodes, others wait for it
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
        sealed.check(about, shape=list, xxh3_128=str, bad=list)
        shape = (len(source), source.channels, *source.canvas)
        if about["shape"] != list(shape) or durable.fingerprint(folder / PIXELS)["xxh3_128"] != about["xxh3_128"]:
            raise ValueError("its pixels are not what was written")
    except FileNotFoundError:
        return None
    except ValueError as error:
        say(f"cache {folder} is written anew: {error}")
        return None
    return ArraySource(
        Mapped(folder / PIXELS, 0, shape),
        name=source.name,
        fingerprint=source.fingerprint,
        labels=Labels(source.labels, source.classes, source.unlabelled),
        bad={id: (path, reason) for id, path, reason in about["bad"]},
        decoded_from=source,
    )


class _Chunks(Dataset):
    """Item i is a chunk of images, decoded: b c H W, and the bad ones among them. Or the id of one of another size."""

    def __init__(self, source: EncodedSource):
        self.source = source

    def __len__(self) -> int:
        return -(-len(self.source) // CHUNK)

    def __getitem__(self, item: int) -> tuple[np.ndarray, list[tuple[int, str, str]]] | int:
        ids = range(item * CHUNK, min((item + 1) * CHUNK, len(self.source)))
        pixels = np.zeros((len(ids), self.source.channels, *self.source.canvas), np.uint8)
        bad = []
        for slot, id in enumerate(ids):
            try:
                image = self.source.image(id)
            except ImageError as error:
                bad.append((id, self.source.store.where(id), str(error)))
                continue
            if image.shape[1:] != self.source.canvas:
                return id
            pixels[slot] = image.numpy()
        return pixels, bad  # arrays go through a pipe: these are more than shared memory may have room for


def _uncollated(chunk: Any) -> Any:
    """torch's own collating would make tensors of arrays."""
    return chunk


def _write(folder: Path, source: EncodedSource, workers: int, say: Callable[[str], None]) -> None:
    size, free = decoded_bytes(source), shutil.disk_usage(folder.parent).free
    if free < SPARE * size:
        raise OSError(f"{folder.parent} has {free / 1e6:,.0f} MB free, {SPARE * size / 1e6:,.0f} MB are needed")
    shape = f"{source.channels} x {source.canvas[0]} x {source.canvas[1]}"
    say(f"{source.name}: decoding {len(source):,} images of {shape} once, {size / 1e6:,.1f} MB in {folder}")
    for leftover in folder.parent.glob(f".*-{folder.name}-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with durable.whole_folder(folder) as new:
        about = _decode(new / PIXELS, source, workers)
        durable.write(new / ABOUT, [sealed.text(about, indent=None)])


def _decode(file: Path, source: EncodedSource, workers: int) -> dict:
    bad: list[tuple[int, str, str]] = []
    differing: list[int] = []

    def chunks() -> Iterator[memoryview]:
        loader = DataLoader(
            _Chunks(source),
            batch_size=None,
            num_workers=workers,
            timeout=PATIENCE if workers else 0,
            collate_fn=_uncollated,
        )
        for chunk in progress_bar(loader, unit=f" x {CHUNK:,} images", delay=3, disable=None):
            if isinstance(chunk, int):
                differing.append(chunk)
                return
            bad.extend(chunk[1])
            yield chunk[0].reshape(-1).data

    try:
        written = durable.write(file, chunks())
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):  # torch has no class for it
            raise
        raise Error(
            f"{source.name}: a process that decodes its images died, or gave nothing for {PATIENCE} seconds: a file "
            f"that cannot be read, or no memory left. The same command tries again. torch says: {error}"
        ) from error
    if differing:
        os.truncate(file, 0)
        return {"differs": differing[0]}  # remembered, so that the next run does not try again
    shape = [len(source), source.channels, *source.canvas]
    return {"shape": shape, "xxh3_128": written["xxh3_128"], "bad": bad}
