"""The order of a stream's images, read through once an epoch by each process for itself.

What is promised, and what is not:

- Every process reads its own part of each epoch, divided as `datasets.distributed.split_dataset_by_node` does: whole
  shards where the number of processes divides theirs, else every n-th row. Parts can differ in length. A process that
  ends its part begins its next epoch on its own, so nobody waits; an epoch is therefore not at one step for all.
- The order is ours, a function of (seed, epoch, number of processes, shards): eight shards at a time, in random order,
  a row from each in turn, then every thousand rows shuffled. That is less random than a permutation. (The shuffle
  buffer of `datasets` differs between its versions, starts threads that stay, and sleeps for five seconds an epoch.)
- Where batches are to be whole, the rows that do not fill a process's last micro-batch of an epoch are left out, and a
  row is the same process's in every epoch: so no batch holds a row twice, though processes be in different epochs.
- Going on at a saved place is exact: the same batches as without the interruption. The part of the epoch that was seen
  is read again, though not decoded, so it costs as long as that reading takes. With another number of processes the
  rest of the epoch would be other rows, some seen twice and some not at all: such a restart is refused.
- A sample's id is its shard and its number in it, so its views are the same for any number of processes.
- A bad image is replaced by the next good one of the stream. Labels are given if they are class numbers, -1 for a row
  that has none.
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
    rows: int  # taken of this epoch by this process


class DecodedRow(NamedTuple):
    """A row of the stream as it comes, and where that leaves the process."""

    id: int
    image: Tensor | ImageError  # uint8 c H W
    label: int | None
    place: Position  # after it, in the epoch that it is of


class StreamSampler(MicroBatches):
    """The endless row of a stream's images for one process. Its items can only be taken one after another."""

    source: Stream
    different = math.inf

    def __init__(self, source: Stream, **share: int):
        super().__init__(source, **share)
        self.go_on_at([])

    def go_on_at(self, places: list[list[int]]) -> None:
        if places and len(places) != self.processes:
            raise DataError(
                f"{self.source.name}: {len(places)} processes were reading it, {self.processes} would read other rows, "
                f"some twice and some never: go on with {len(places)}"
            )
        self.place = Position(*places[self.rank]) if places else Position(0, 0)
        self._batches = self._read(self.place)
        self._last: int | None = None
        self._after: dict[int | None, Position] = {None: self.place}  # after each of the last items

    def places(self, step: int, device: torch.device) -> list[list[int]]:
        """Of the next step, parts may have been taken already."""
        place = self._after.get(step * self.accumulation - 1, self._after.get(None))
        return collectives.all_gather(torch.tensor([place], device=device)).tolist()

    def first(self, count: int) -> Samples:
        batch = next(self._batches)
        self._batches = chain([batch], self._batches)
        return batch[0]

    def __getitem__(self, item: int) -> Loaded:
        assert self._last in (None, item - 1), f"item {item} of a stream after {self._last}"
        samples, epochs, self.place = next(self._batches)
        self._last, self._after[item] = item, self.place
        self._after.pop(item - self.accumulation - 1, None)
        return self.loaded(item, samples, epochs)

    def _read(self, place: Position) -> Iterator[tuple[Samples, Tensor, Position]]:
        """Micro-batches, the epoch of each of their images, and the place after them."""
        good: list[DecodedRow] = []
        bad: list[Unreadable] = []
        refused: list[DecodedRow] = []
        filled = place.rows > 0  # whether this epoch had a micro-batch
        for picked in self._decoded(place):
            if isinstance(picked.image, ImageError):
                refused.append(picked)
                if len(refused) > IN_A_ROW:
                    many = f"{len(refused):,} rows in a row cannot be used, the last: {picked.image}"
                    raise DataError(f"{self.source.name}: {many}")
                continue
            for other in refused:
                shard, number = divmod(other.id, SHARD)
                bad.append(Unreadable(other.id, f"shard {shard}, row {number}", str(other.image), picked.id))
            refused = []
            if self.whole_batches and good and good[0].place.epoch < picked.place.epoch:
                if not filled:
                    raise DataError(
                        f"{self.source.name}: {len(good)} rows are all that process {self.rank} of {self.processes} "
                        f"has, and a "
                        f"micro-batch needs {self.micro_batch_size} different ones: use a smaller --batch_size"
                    )
                good, filled = [], False
            good.append(picked)
            if len(good) == self.micro_batch_size:
                filled = True
                yield self._samples(good, bad), torch.tensor([one.place.epoch for one in good]), picked.place
                good, bad = [], []

    def _samples(self, good: list[DecodedRow], bad: list[Unreadable]) -> Samples:
        pixels = torch.zeros(len(good), self.source.channels, *self.source.canvas, dtype=torch.uint8)
        images = [picked.image for picked in good if not isinstance(picked.image, ImageError)]
        for slot, image in enumerate(images):
            pixels[slot, :, : image.shape[1], : image.shape[2]] = image
        labels = [-1 if picked.label is None else picked.label for picked in good]
        return Samples(
            pixels=pixels,
            extents=torch.tensor([image.shape[1:] for image in images]),
            ids=torch.tensor([picked.id for picked in good]),
            labels=None if self.source.label_column is None else torch.tensor(labels),
            bad=tuple(bad),
        )

    def _decoded(self, place: Position) -> Iterator[DecodedRow]:
        """Rows in order, decoded by threads a little ahead: decoders leave Python's lock to others."""
        threads = ThreadPoolExecutor()
        try:
            ahead: deque[tuple[int, Future, int | None, Position]] = deque()
            for id, row, after in self._numbered(place):
                ahead.append((id, threads.submit(self.source.decode, row), self.source.label(row), after))
                if len(ahead) > max(AHEAD, self.micro_batch_size):
                    id, image, label, after = ahead.popleft()
                    yield DecodedRow(id, image.result(), label, after)
        finally:  # without waiting: what collects a forgotten stream may be one of its own threads
            threads.shutdown(wait=False, cancel_futures=True)

    def _numbered(self, place: Position) -> Iterator[tuple[int, dict[str, Any], Position]]:
        """Rows of this process, epoch after epoch, each with its id and the place after it."""
        epoch, seen = place
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
            held = list(islice(rows, SHUFFLED))
            if not held:
                return
            for index in rng.permutation(rng.key(self.seed, "rows", epoch, self.rank, block), len(held)).tolist():
                yield held[index]

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
