"""The order of a stream's images, read through once per epoch by each process for itself.

- Every process reads its own share of each epoch, divided as `datasets.distributed.split_dataset_by_node` does: whole
  shards where the number of processes divides theirs, else every n-th row. Shares can differ in length, and a process
  that ends its share begins its next epoch at once; so an epoch does not begin at the same step for all.
- The order is a function of (seed, epoch, number of processes, shards): eight shards at a time, in random order, a row
  from each in turn, then every thousand rows shuffled. That is less random than a permutation. (The shuffle buffer of
  `datasets` differs between its versions, starts threads that stay, and sleeps for five seconds per epoch.)
- Where batches must be whole, the rows that do not fill a process's last micro-batch of an epoch are left out, and a
  row is the same process's in every epoch: so no batch holds a row twice, even if processes are in different epochs.
- Resuming is exact: the same batches as without the interruption. What was seen of the epoch is read again, though not
  decoded. With another number of processes the rest of the epoch would be other rows: that is refused.
- A sample's id is its shard and its number in it, so its views are the same for any number of processes.
- A bad image is replaced by the next good one of the stream. Labels are class numbers, -1 for a row that has none.
- Threads decode ahead, while the loop computes; rows are read, over the network too, when a batch is asked for.
"""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslvit import rng
from sslvit.data.image import ImageError
from sslvit.data.loader import Loaded, MicroBatches
from sslvit.data.source import Samples, Unreadable
from sslvit.data.stream import SHARD, Stream
from sslvit.errors import DataError, NoInput
from sslvit.processes import collectives

MIXED = 8  # shards read in turn
SHUFFLED = 1000  # rows
AHEAD = 64  # rows being decoded, or a micro-batch if that is more
IN_A_ROW = 1000  # bad images before the set is called unusable


class Position(NamedTuple):
    """Where a process is: all that its part of a checkpoint needs."""

    epoch: int
    rows: int  # of this epoch, taken by this process


class DecodedRow(NamedTuple):
    id: int
    image: Tensor | ImageError  # uint8 c H W
    label: int | None
    position: Position  # after it, in its epoch


class StreamSampler(MicroBatches):
    """The endless sequence of a stream's images for one process. Its items can only be taken one after another."""

    source: Stream
    different = math.inf

    def __init__(self, source: Stream, **share: int):
        super().__init__(source, **share)
        self.go_on_at([])

    def go_on_at(self, places: list[list[int]]) -> None:
        if places and len(places) != self.processes:
            others = f"{len(places)} processes were reading it, {self.processes} would read other rows"
            raise DataError(f"{self.source.name}: {others}, some twice, some never: use {len(places)} processes")
        self.position = Position(*places[self.rank]) if places else Position(0, 0)
        self._batches = self._read(self.position)
        self._last: int | None = None
        self._after: dict[int | None, Position] = {None: self.position}  # after each of the last items

    def places(self, step: int, device: torch.device) -> list[list[int]]:
        """Micro-batches of the next step may have been taken already."""
        position = self._after.get(step * self.accumulation - 1, self._after.get(None))
        return collectives.all_gather(torch.tensor([position], device=device)).tolist()

    def first(self, count: int) -> Samples:
        batch = next(self._batches)
        self._batches = chain([batch], self._batches)
        return batch[0]

    def __getitem__(self, item: int) -> Loaded:
        assert self._last in (None, item - 1), f"item {item} of a stream after {self._last}"
        samples, epochs, self.position = next(self._batches)
        self._last, self._after[item] = item, self.position
        self._after.pop(item - self.accumulation - 1, None)
        return self.loaded(item, samples, epochs)

    def _read(self, position: Position) -> Iterator[tuple[Samples, Tensor, Position]]:
        """Micro-batches, the epoch of each of their images, and the position after them."""
        good: list[DecodedRow] = []
        bad: list[Unreadable] = []
        filled = position.rows > 0  # whether this epoch had a micro-batch
        for row, replaced in self._readable(position):
            bad += replaced
            if self.whole_batches and good and good[0].position.epoch < row.position.epoch:
                if not filled:
                    few = f"process {self.rank} has {len(good)} rows, a micro-batch needs {self.micro_batch_size}"
                    raise DataError(f"{self.source.name}: {few} different ones: use a smaller --batch_size")
                good, filled = [], False
            good.append(row)
            if len(good) == self.micro_batch_size:
                filled = True
                yield self._samples(good, bad), torch.tensor([one.position.epoch for one in good]), row.position
                good, bad = [], []

    def _readable(self, position: Position) -> Iterator[tuple[DecodedRow, list[Unreadable]]]:
        """Each row with an image, and the bad ones before it that it replaces."""
        bad: list[DecodedRow] = []
        for row in self._decoded(position):
            if not isinstance(row.image, ImageError):
                yield (
                    row,
                    [
                        Unreadable(one.id, "shard {}, row {}".format(*divmod(one.id, SHARD)), str(one.image), row.id)
                        for one in bad
                    ],
                )
                bad = []
                continue
            bad.append(row)
            if len(bad) > IN_A_ROW:
                many = f"{len(bad):,} rows in a row cannot be used, the last: {row.image}"
                raise DataError(f"{self.source.name}: {many}")

    def _samples(self, good: list[DecodedRow], bad: list[Unreadable]) -> Samples:
        pixels = torch.zeros(len(good), self.source.channels, *self.source.canvas, dtype=torch.uint8)
        images = [row.image for row in good if not isinstance(row.image, ImageError)]
        for slot, image in enumerate(images):
            pixels[slot, :, : image.shape[1], : image.shape[2]] = image
        labels = [-1 if row.label is None else row.label for row in good]
        return Samples(
            pixels=pixels,
            extents=torch.tensor([image.shape[1:] for image in images]),
            ids=torch.tensor([row.id for row in good]),
            labels=None if self.source.label_column is None else torch.tensor(labels),
            bad=tuple(bad),
        )

    def _decoded(self, position: Position) -> Iterator[DecodedRow]:
        """Rows in order, decoded by threads a little ahead: decoders release Python's lock."""
        threads = ThreadPoolExecutor()
        try:
            ahead: deque[tuple[int, Future, int | None, Position]] = deque()
            for id, row, after in self._numbered(position):
                ahead.append((id, threads.submit(self.source.decode, row), self.source.label(row), after))
                if len(ahead) > max(AHEAD, self.micro_batch_size):
                    id, image, label, after = ahead.popleft()
                    yield DecodedRow(id, image.result(), label, after)
        finally:  # without waiting: what collects a forgotten stream may be one of its own threads
            threads.shutdown(wait=False, cancel_futures=True)

    def _numbered(self, position: Position) -> Iterator[tuple[int, dict[str, Any], Position]]:
        """Rows of this process, epoch after epoch, each with its id and the position after it."""
        epoch, seen = position
        while True:
            number = -1
            for number, (id, row) in enumerate(self._shuffled(epoch)):
                if number >= seen:
                    yield id, row, Position(epoch, number + 1)
            if number < 0:
                raise NoInput(f"{self.source.name}: there are no rows for process {self.rank} of {self.processes}")
            epoch, seen = epoch + 1, 0

    def _shuffled(self, epoch: int) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = self._mine(rng.permutation(rng.key(self.seed, "shards", epoch), self.source.shards).tolist())
        for block in count():
            buffer = list(islice(rows, SHUFFLED))
            if not buffer:
                return
            for index in rng.permutation(rng.key(self.seed, "rows", epoch, self.rank, block), len(buffer)).tolist():
                yield buffer[index]

    def _mine(self, shards: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        if len(shards) % self.processes == 0:
            always = [shard for shard in shards if shard % self.processes == self.rank]
            return self._in_turn(always if self.whole_batches else shards[self.rank :: self.processes])
        if self.whole_batches:
            return (one for one in self._in_turn(shards) if sum(divmod(one[0], SHARD)) % self.processes == self.rank)
        return islice(self._in_turn(shards), self.rank, None, self.processes)

    def _in_turn(self, shards: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        opened = map(self.source.shard, shards)
        turns = deque(islice(opened, MIXED))
        while turns:
            shard = turns.popleft()
            row = next(shard, None)
            if row is None:
                turns.extend(islice(opened, 1))
            else:
                turns.append(shard)
                yield row
