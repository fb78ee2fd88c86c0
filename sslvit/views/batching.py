"""The work on a batch: its check, pieces that fit the cache, and operations on some rows."""

from collections.abc import Callable
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

PIECE = 1 << 20  # values worked on at a time on a CPU: operations then get about a fifth of them, a megabyte of floats
LARGE = 1 << 16  # a sample of so many values is a piece of its own

Size = int | tuple[int, int]


def to_pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def checked(pixels: Tensor, key: Tensor, extents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Key and extents on the CPU, where parameters are drawn; ValueError if this is not a batch."""
    if pixels.ndim != 4 or pixels.dtype != torch.uint8 or pixels.numel() == 0:
        raise ValueError(f"pixels must be uint8 of shape b c H W, got {pixels.dtype} of shape {tuple(pixels.shape)}")
    if key.shape != pixels.shape[:1]:
        raise ValueError(f"{len(pixels)} images need as many keys, not keys of shape {tuple(key.shape)}")
    canvas = torch.tensor(pixels.shape[2:])
    if extents is None:
        return key.cpu(), canvas.expand(len(pixels), 2)
    if extents.shape != (len(pixels), 2):
        raise ValueError(f"extents of {len(pixels)} images have shape (b, 2), not {tuple(extents.shape)}")
    extents = extents.to("cpu", torch.int64)
    if not bool(((extents >= 1) & (extents <= canvas)).all()):
        raise ValueError(f"extents {extents.tolist()} leave the canvas of {canvas.tolist()}")
    return key.cpu(), extents


def piece_length(pixels: Tensor, size: tuple[int, int]) -> int:
    """How many samples fit the cache together."""
    _, channels, height, width = pixels.shape
    # glibc gives large freed blocks back to the system, and fetching each again costs more than the arithmetic on it,
    # until a program has freed a larger one. Untouched, this one costs nothing. (collectives.keep_memory does the same
    # for commands; elsewhere, as in notebooks, views of 32 px would take up to three times as long.)
    torch.empty(7 << 20)
    values = channels * max(height * width, size[0] * size[1])
    return 1 if values > LARGE else max(1, PIECE // values)


def pieces(count: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def batch(*shape: int) -> Tensor:
    """Memory for the views of a batch, on the CPU. From numpy, which asks the system for large pages: to get 600 KB of
    small ones takes a quarter of the time of filling them with a view of 224 px. In a loader's worker from shared
    memory, as in torch's own collating: from elsewhere it would be copied on its way to the trainer."""
    worker = get_worker_info()
    if worker is not None and not getattr(worker.dataset, "piped", False):
        return torch.empty(0).set_(torch.UntypedStorage._new_shared(4 * prod(shape)), 0, shape)
    return torch.from_numpy(np.empty(shape, np.float32))


def true_indices(flags: list[bool]) -> list[int]:
    return [row for row, flag in enumerate(flags) if flag]


def apply_to_rows(images: Tensor, rows: list[int], operation: Callable[..., None], *arguments: Tensor) -> None:
    """Carries out an in-place operation on these rows alone."""
    if len(rows) == len(images):
        operation(images, *arguments)
    elif rows:
        which = torch.tensor(rows, device=images.device)
        part = images.index_select(0, which)
        operation(part, *(argument.index_select(0, which) for argument in arguments))
        images.index_copy_(0, which, part)
