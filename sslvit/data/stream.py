"""Sets too large for one machine, read through once an epoch: Hugging Face datasets in streaming mode.

    stream = Stream("hf:org/name", canvas=512, rank=rank, processes=processes, seed=0)
    for samples, place in stream.batches(64, place=saved_place):

What is promised, and what is not:

- Every process reads its own part of each epoch, divided as `datasets.distributed.split_dataset_by_node` does: whole
  shards where the number of processes divides theirs, else every n-th row. Parts can differ in length. A process that
  ends its part begins its next epoch on its own, so nobody waits; an epoch is therefore not at one step for all.
- The order is ours, a function of (seed, epoch, number of processes, shards): eight shards at a time, in random order,
  a row from each in turn, then every thousand rows shuffled. That is less random than a permutation. (The shuffle
  buffer of `datasets` differs between its versions, starts threads that stay, and sleeps for five seconds an epoch.)
- Going on at a saved place is exact: the same batches as without the interruption. The part of the epoch that was seen
  is read again, though not decoded, so it costs as long as that reading takes. With another number of processes the
  rest of the epoch would be other rows, some seen twice and some not at all: such a restart is refused.
- If the set changes where it lies, so does all that follows; there is no fingerprint to tell by.
- A sample's id is its place in the epoch, rank + processes * (rows read), so its views change with the number of
  processes. In a source they do not.
- A bad image is replaced by the next good one of the stream. Labels are given if they are class numbers.
- Images must be in the rows: one that names a file or URL, as in sets of plain files on the hub, is a bad image.

Where the set fits on the disk, a source (source.py) gives all of this exactly and for any number of processes.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from typing import Any, NamedTuple

import torch

from sslvit import rng
from sslvit.data.columns import choose_image_column, choose_label_column
from sslvit.data.hub import SPLITS, choose_split, encoded_bytes, load_hub, matching, of_split
from sslvit.data.image import MAX_PIXELS, BadImage, open_image
from sslvit.data.samples import Bad, Samples
from sslvit.errors import DataError, NoInput

MIXED = 8  # shards read in turn
SHUFFLED = 1000  # rows
AHEAD = 64  # rows being decoded
IN_A_ROW = 1000  # bad images before the set is called unusable


class Place(NamedTuple):
    """Where a process is: all that its part of a checkpoint needs."""

    epoch: int
    rows: int  # taken of this epoch by this process
    processes: int


class Stream:
    def __init__(
        self,
        spec: str,  # hf:name[:configuration], parquet:/dir/*.parquet or webdataset:/dir/*.tar
        *,
        split: str = "train",
        canvas: int,
        channels: int = 3,
        rank: int = 0,
        processes: int = 1,
        seed: int = 0,
        image_column: str | None = None,
        label_column: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        import datasets

        self.name, self.rank, self.processes, self.seed = f"{spec} ({split}, streamed)", rank, processes, seed
        self.canvas, self.channels, self.max_pixels = (canvas, canvas), channels, max_pixels
        rows, self.roots = _load(spec, split)
        if rows.features is None:
            raise DataError(f"{spec} does not say what its columns are, so it cannot be streamed")
        self.image_column = choose_image_column(rows.features, image_column)
        if self.image_column not in rows.features:
            raise ValueError(f"image_column {self.image_column!r} is inside another column, which streams do not read")
        label = choose_label_column(rows.features, label_column)
        numbered = label is not None and getattr(rows.features[label], "dtype", "").startswith(("int", "uint"))
        self.label_column = label if numbered else None
        if isinstance(rows.features[self.image_column], datasets.Image):
            rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        self._rows = rows

    def batches(self, batch_size: int, place: Place | None = None) -> Iterator[tuple[Samples, Place]]:
        """Without end: a batch, and the place to go on at after it."""
        place = place or Place(0, 0, self.processes)
        if place.processes != self.processes:
            raise DataError(
                f"{self.name}: the place was saved by {place.processes} processes, {self.processes} read other rows: "
                f"start {place.processes}, or begin another epoch at Place({place.epoch + 1}, 0, {self.processes})"
            )
        good, bad, refused, images = [], [], [], self._images(place)
        while True:
            id, image, label, place = next(images)
            if isinstance(image, BadImage):
                refused.append((id, str(image)))
                if len(refused) > IN_A_ROW:
                    raise DataError(f"{self.name}: {len(refused):,} rows in a row cannot be used, the last: {image}")
                continue
            good.append((id, image, label))
            bad += [Bad(other, f"row {other}", reason, id) for other, reason in refused]
            refused = []
            if len(good) == batch_size:
                yield self._samples(good, tuple(bad)), place
                good, bad = [], []

    def _samples(self, good: list[tuple[int, torch.Tensor, int | None]], bad: tuple[Bad, ...]) -> Samples:
        pixels = torch.zeros(len(good), self.channels, *self.canvas, dtype=torch.uint8)
        for slot, (_, image, _) in enumerate(good):
            pixels[slot, :, : image.shape[1], : image.shape[2]] = image
        return Samples(
            pixels=pixels,
            extents=torch.tensor([image.shape[1:] for _, image, _ in good]),
            ids=torch.tensor([id for id, _, _ in good]),
            labels=None if self.label_column is None else torch.tensor([label for _, _, label in good]),
            bad=bad,
        )

    def _images(self, place: Place) -> Iterator[tuple[int, torch.Tensor | BadImage, int | None, Place]]:
        """Rows in order, decoded by threads a little ahead: decoders leave Python's lock to others."""
        with ThreadPoolExecutor() as threads:
            ahead = deque()
            for number, row, after in self._numbered(place):
                ahead.append((number, threads.submit(self._decode, row), row, after))
                if len(ahead) > AHEAD:
                    number, image, row, after = ahead.popleft()
                    label = None if self.label_column is None else row[self.label_column]
                    yield self.rank + self.processes * number, image.result(), label, after

    def _numbered(self, place: Place) -> Iterator[tuple[int, dict[str, Any], Place]]:
        """Rows of this process, epoch after epoch, each with its number in the epoch and the place after it."""
        epoch, seen = place.epoch, place.rows
        while True:
            number = -1
            for number, row in enumerate(self._shuffled(epoch)):
                if number >= seen:
                    yield number, row, Place(epoch, number + 1, self.processes)
            if number < 0:
                raise NoInput(f"{self.name}: there are no rows for process {self.rank} of {self.processes}")
            epoch, seen = epoch + 1, 0

    def _shuffled(self, epoch: int) -> Iterator[dict[str, Any]]:
        rows = self._part(rng.permutation(rng.key(self.seed, "shards", epoch), self._rows.num_shards).tolist())
        for block in count():
            held = list(islice(rows, SHUFFLED))
            if not held:
                return
            for index in rng.permutation(rng.key(self.seed, "rows", epoch, self.rank, block), len(held)).tolist():
                yield held[index]

    def _part(self, shards: list[int]) -> Iterator[dict[str, Any]]:
        if len(shards) % self.processes == 0:
            return self._in_turn(shards[self.rank :: self.processes])
        return islice(self._in_turn(shards), self.rank, None, self.processes)

    def _in_turn(self, shards: list[int]) -> Iterator[dict[str, Any]]:
        opened = (iter(self._rows.shard(self._rows.num_shards, index)) for index in shards)
        turns = deque(islice(opened, MIXED))
        while turns:
            shard = turns.popleft()
            row = next(shard, None)
            if row is None:
                turns.extend(islice(opened, 1))
            else:
                turns.append(shard)
                yield row

    def _decode(self, row: dict[str, Any]) -> torch.Tensor | BadImage:
        try:
            data = encoded_bytes(row[self.image_column], self.roots, self.max_pixels)
            return open_image(data, channels=self.channels, max_pixels=self.max_pixels, fit=self.canvas)
        except BadImage as error:
            return error


def _load(spec: str, split: str) -> tuple[Any, list[bytes]]:
    """The rows, and the folders that paths in them may lie in."""
    import datasets

    kind, _, rest = spec.partition(":")
    if kind == "hf":
        return choose_split(load_hub(rest, streaming=True), split, spec), []
    if kind not in ("parquet", "webdataset"):
        raise ValueError(f"{spec} cannot be streamed: hf:, parquet: and webdataset: can")
    files = of_split(matching(rest, ".tar" if kind == "webdataset" else ".parquet"), split)
    if not files:
        raise NoInput(f"{spec} has no {split} split: no file is named {' or '.join(SPLITS[split])}-...")
    rows = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", streaming=True)
    return rows, [os.fsencode(os.path.realpath(folder)) for folder in sorted({file.parent for file in files})]
