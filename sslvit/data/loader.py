"""The order of samples: a pure function of (seed, epoch, size). Batches of it for each process, read by workers.

Training is one endless sequence of images: epoch 0 in its order, epoch 1 in its own, and so on. Step s takes the
batch_size images from s * batch_size on, so every epoch shows each image once, none is dropped at an epoch's end, a set
smaller than a batch works, and a position in the sequence is all that a restart needs. The official codes drop each
epoch's last incomplete batch: with ours an epoch has up to one step more, and a batch that reaches into the next epoch
can hold an image twice. Where the images of a batch are compared with each other (an objective's couples_samples), an
image would be its own negative: there batches are whole, and an epoch's last images are left out as in the official
code. (The substitute of an unreadable image can be in the batch already.)
"""

import logging
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from functools import lru_cache, partial
from multiprocessing import active_children
from multiprocessing.sharedctypes import RawArray
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sslvit import rng
from sslvit.data import shared
from sslvit.data.readers import encoded
from sslvit.data.source import Images, Samples, Source
from sslvit.data.waiting import fetch
from sslvit.processes import signals

log = logging.getLogger(__name__)

LOOK_EVERY = 1.0  # seconds
AHEAD = 4  # batches per worker, made before they are needed


class Loaded(NamedTuple):
    samples: Samples
    view_key: Tensor  # b: of (seed, epoch, sample id)
    slot_key: Tensor  # b: of (seed, step, slot in the global batch)
    views: tuple[Tensor, ...] | None = None  # if a worker made them; then there are no pixels


class Views(Protocol):
    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None, /) -> tuple[Tensor, ...]: ...


@lru_cache(maxsize=2)  # a batch touches two epochs at most, unless the set is smaller than the batch
def epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    """The order of one epoch: size"""
    return rng.permutation(rng.key(seed, "order", epoch), size)


def sample_ids(seed: int, size: int, start: int, stop: int, shown: int | None = None) -> tuple[Tensor, Tensor]:
    """Sample ids and epochs at the positions start..stop-1 of the sequence of all epochs: b, b. Each epoch shows all
    images, or the first `shown` of its order."""
    shown = size if shown is None else shown
    positions = torch.arange(start, stop)
    epochs = positions // shown
    ids = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        ids[here] = epoch_order(seed, epoch, size)[positions[here] % shown]
    return ids, epochs


class MicroBatches(Dataset, ABC):
    """Item i is the i-th micro-batch of this process; a step consists of `accumulation` of them."""

    def __init__(self, source: Images, *, batch_size: int, accumulation: int, rank: int, processes: int, seed: int):
        if batch_size % (processes * accumulation):
            share = f"{processes} processes x {accumulation} micro-batches"
            raise ValueError(f"--batch_size {batch_size} must be divisible by {share}")
        self.source, self.seed, self.batch_size, self.accumulation = source, seed, batch_size, accumulation
        self.micro_batch_size = batch_size // (processes * accumulation)
        self.rank, self.processes = rank, processes
        self.reading: Any = []  # the image that each worker is at, -1 before its first, in memory that all share
        self.whole_batches = False
        self.piped = False  # whether workers send batches through pipes, because shared memory is too small
        self.begun, self.awaited = 0, 0  # the first item that was loaded, and the next one that training waits for

    @property
    def different(self) -> float:
        """How many images there are; infinite if unknown."""
        return len(self.source)

    @property
    def epoch_images(self) -> int:
        """How many images count as an epoch."""
        return len(self.source)

    def only_whole_batches(self) -> None:
        """From the first item on, no batch reaches into another epoch, so none holds an image twice."""
        self.whole_batches = True

    @abstractmethod
    def __getitem__(self, item: int) -> Loaded: ...

    @abstractmethod
    def first(self, count: int) -> Samples:
        """About `count` images of the first batch, to be looked at before training."""

    def places(self, step: int, device: torch.device) -> list[list[int]]:
        """What a checkpoint of this step, the last that was done, needs besides. Collective."""
        return []

    def go_on_at(self, places: list[list[int]]) -> None:
        """Makes the next item the one that followed when `places` were taken."""

    def slots(self, item: int) -> tuple[int, int]:
        """The step of an item, and its first slot in the step's global batch."""
        step, micro_batch = divmod(item, self.accumulation)
        return step, (self.rank * self.accumulation + micro_batch) * self.micro_batch_size

    def loaded(self, item: int, samples: Samples, epochs: Tensor) -> Loaded:
        step, slot = self.slots(item)
        slots = torch.arange(slot, slot + self.micro_batch_size)
        return Loaded(
            samples=samples,
            view_key=rng.key(self.seed, "views", epochs, samples.ids),
            slot_key=rng.key(self.seed, "forward", step, slots),
        )


class EpochSampler(MicroBatches):
    """Of a source: any item at any time, so that the step is all that a checkpoint needs."""

    source: Source

    @property
    def epoch_images(self) -> int:
        size = len(self.source)
        return size - size % self.batch_size if self.whole_batches else size

    def only_whole_batches(self) -> None:
        if (size := len(self.source)) < self.batch_size:
            fits = max(size - size % (self.processes * self.accumulation), 1)
            raise ValueError(
                f"--batch_size {self.batch_size}: {size:,} images do not fill a batch without one twice, which would "
                f"be compared with itself: use --batch_size {fits}, or more images"
            )
        super().only_whole_batches()

    def __getitem__(self, item: int) -> Loaded:
        step, slot = self.slots(item)
        start = step * self.batch_size + slot
        ids, epochs = sample_ids(self.seed, len(self.source), start, start + self.micro_batch_size, self.epoch_images)
        return self.loaded(item, self.source.read(np.asarray(ids)), epochs)

    def first(self, count: int) -> Samples:
        ids, _ = sample_ids(self.seed, len(self.source), 0, min(count, self.batch_size))
        return self.source.read(np.asarray(ids))


def load(
    sampler: MicroBatches,
    *,
    first_step: int,
    steps: int,
    workers: int,
    timeout: float,
    pin: bool,
    views: Views | None = None,
) -> Generator[Loaded, None, None]:
    """The micro-batches of the steps first_step..steps-1. Their content does not depend on the number of workers.

    views: made by the workers, for training on a CPU; a GPU makes them faster itself, and from fewer bytes.
    """
    items = range(first_step * sampler.accumulation, steps * sampler.accumulation)
    sampler.reading, sampler.begun = RawArray("q", [-1] * workers) if workers else [], items.start
    small = shared.shortage(bytes_of(sampler, views), workers, AHEAD) if workers else ""
    if small and os.environ.get("LOCAL_RANK", "0") == "0":
        log.warning("warning: %s", small)
    sampler.piped = bool(small)
    loader = DataLoader(
        sampler,
        batch_size=None,
        sampler=items,
        num_workers=workers,
        timeout=LOOK_EVERY if workers else 0,
        pin_memory=pin,
        prefetch_factor=AHEAD if workers else None,
        collate_fn=partial(to_trainer, views, piped=sampler.piped) if workers else None,
        worker_init_fn=init_worker,
    )
    handler, others = signal.getsignal(signal.SIGCHLD), set(active_children())
    loaded = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # Torch's handler would raise for a dead worker in the middle of whatever the main thread is doing, such as a
        # step of the optimizer, or in a place that swallows it. `fetch` looks for dead workers by itself.
        ours = handler if handler and not getattr(handler, "__module__", "").startswith("torch.") else signal.SIG_DFL
        signal.signal(signal.SIGCHLD, ours)
    # In the order in which they were started: Process-9 comes before Process-10.
    started = sorted(set(active_children()) - others, key=lambda child: (len(child.name), child.name))
    return tracked(sampler, items, fetch(loaded, len(items), started, timeout) if workers else loaded)


def init_worker(worker: int) -> None:
    signals.ignore_signals_in_worker()
    encoded.reading = get_worker_info().dataset.reading, worker


def tracked(sampler: MicroBatches, items: range, loaded: Iterator[Loaded]) -> Generator[Loaded, None, None]:
    """Notes which item is awaited, for the message about a worker that hangs."""
    sampler.awaited = items.start
    for item, micro_batch in zip(items, loaded, strict=True):
        sampler.awaited = item + 1
        yield shared.out_of_pipe(micro_batch) if sampler.piped else micro_batch


def bytes_of(sampler: MicroBatches, views: Views | None) -> int:
    """Of one micro-batch as a worker sends it, measured on one black image."""
    pixels = torch.zeros(1, sampler.source.channels, *sampler.source.canvas, dtype=torch.uint8)
    made = views(pixels, rng.key(sampler.seed, "views", torch.tensor([0]))) if views else (pixels,)
    return sampler.micro_batch_size * sum(tensor.nbytes for tensor in made)


def to_trainer(views: Views | None, loaded: Loaded, *, piped: bool) -> Loaded:
    if views:
        samples = loaded.samples
        made = views(samples.pixels, loaded.view_key, samples.extents)
        loaded = loaded._replace(samples=samples._replace(pixels=samples.pixels.new_empty(0)), views=made)
    return shared.into_pipe(loaded) if piped else shared.into_shared_memory(loaded)
