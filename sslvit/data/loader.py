"""The order of samples: a pure function of (seed, epoch, size). Batches of it for each process, read by workers.

Training is one endless row of images: epoch 0 in its order, epoch 1 in its own, and so on. Step s takes the
batch_size images from s * batch_size on, so every epoch shows each image once, no image is dropped at an epoch's
end, a set smaller than a batch works, and a position in the row is all that a restart needs.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslvit import rng
from sslvit.data.source import Samples, Source


class Loaded(NamedTuple):
    samples: Samples
    view_key: Tensor  # b: of (seed, epoch, sample id)
    slot_key: Tensor  # b: of (seed, step, slot in the global batch)


@lru_cache(maxsize=2)  # a batch touches two epochs at most, unless the set is smaller than the batch
def epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    """The order of one epoch: size"""
    return rng.permutation(rng.key(seed, "order", epoch), size)


def row(seed: int, size: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Sample ids and epochs at the positions start..stop-1 of the row of all epochs: b, b"""
    positions = torch.arange(start, stop)
    epochs = positions // size
    ids = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        ids[here] = epoch_order(seed, epoch, size)[positions[here] % size]
    return ids, epochs


class Row(Dataset):
    """Item i is the i-th micro-batch of this process: accumulation of them make a step."""

    def __init__(self, source: Source, *, batch_size: int, accumulation: int, rank: int, processes: int, seed: int):
        if batch_size % (processes * accumulation):
            raise ValueError(
                f"batch_size {batch_size} does not split into {processes} processes x {accumulation} accumulated "
                f"parts: processes x accumulation must divide it"
            )
        self.source, self.seed, self.batch_size, self.accumulation = source, seed, batch_size, accumulation
        self.part = batch_size // (processes * accumulation)
        self.first_slot = rank * self.part * accumulation

    def __getitem__(self, item: int) -> Loaded:
        step, part = divmod(item, self.accumulation)
        slot = self.first_slot + part * self.part
        position = step * self.batch_size + slot
        ids, epochs = row(self.seed, len(self.source), position, position + self.part)
        return Loaded(
            samples=self.source.read(np.asarray(ids)),
            view_key=rng.key(self.seed, "views", epochs, ids),
            slot_key=rng.key(self.seed, "forward", step, torch.arange(slot, slot + self.part)),
        )


def load(row: Row, *, first_step: int, steps: int, workers: int, timeout: float, pin: bool) -> Iterator[Loaded]:
    """The micro-batches of the steps first_step..steps-1. What they hold does not depend on the number of workers."""
    items = range(first_step * row.accumulation, steps * row.accumulation)
    return iter(
        DataLoader(
            row,
            batch_size=None,
            sampler=items,
            num_workers=workers,
            timeout=timeout if workers else 0,
            pin_memory=pin,
            prefetch_factor=4 if workers else None,
        )
    )
