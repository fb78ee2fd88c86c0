"""Shared memory for what workers send. A container may have next to none (docker: 64 MB by default): then batches are
copied through pipes, which is slower and needs no more than ordinary memory."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

SHARED = Path("/dev/shm")
AHEAD = 2  # batches of a worker, torch's default
PAGES = 1 << 16  # bytes of the small tensors of a batch, a few pages each
MORE = "docker run --shm-size=8g, or `mount -o remount,size=8g /dev/shm`, gives more"


def room() -> int | None:
    """Free bytes of shared memory; None where the system does not say."""
    return shutil.disk_usage(SHARED).free if SHARED.is_dir() else None


def shortage(batch: int, workers: int, ahead: int) -> str:
    """A warning if batches of this size do not fit into shared memory: those made ahead, one in use, one more."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed, free = (batch + PAGES) * (workers * ahead + 2) * local, room()
    if free is None or needed <= free:
        return ""
    processes = f" of {local} processes" if local > 1 else ""
    return (
        f"{SHARED} has {free / 1e6:,.1f} MB free, and {workers} workers{processes} with {ahead} batches of "
        f"{batch / 1e6:,.1f} MB need {needed / 1e6:,.1f} MB: batches are copied through pipes instead, which takes "
        f"longer. {MORE}"
    )


class Piped(NamedTuple):
    """A tensor in a pipe: torch would send it through shared memory."""

    array: np.ndarray


def into_pipe(value: Any) -> Any:
    """The same nested tuples with every tensor piped."""
    return Piped(value.numpy()) if isinstance(value, Tensor) else map_tuple(into_pipe, value)


def into_shared_memory(value: Any) -> Any:
    """As torch does when it sends a tensor, where an error for lack of room would only be printed."""
    return value.share_memory_() if isinstance(value, Tensor) else map_tuple(into_shared_memory, value)


def out_of_pipe(value: Any) -> Any:
    return torch.from_numpy(value.array) if isinstance(value, Piped) else map_tuple(out_of_pipe, value)


def read_ahead(batches: Sequence[Any], read: Callable[[Any], Any], size: int, workers: int) -> Iterator[Any]:
    """`read` of each batch in order, by workers if there are any. size: of a batch, in bytes."""
    piped = bool(workers) and bool(shortage(size, workers, AHEAD))
    collate = partial(_read_into_pipe, read) if piped else read
    loader = DataLoader(batches, batch_size=None, collate_fn=collate, num_workers=workers)
    return map(out_of_pipe, loader) if piped else iter(loader)


def _read_into_pipe(read: Callable[[Any], Any], batch: Any) -> Any:
    return into_pipe(read(batch))


def map_tuple(change: Any, value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    changed = map(change, value)
    return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
