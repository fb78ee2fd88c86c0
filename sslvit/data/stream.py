"""Datasets too large for the local disk: Hugging Face datasets in streaming mode, and tars read through.

    python recipes/mpp.py --data stream:hf:org/name --epoch_images 1000000

A stream is shards of rows, each with an image to be decoded; stream_order.py orders them. Tars are read by tars.py:
`datasets` would decode every member that it has a decoder for, of any size. In a table images must be in the rows, or
be files below the root that was named: any other file or URL, as in sets of plain files on the hub, is a bad image. A
stream has no fingerprint: changes of the dataset go unnoticed.

Where the dataset fits on the disk, a source (source.py) is better: it is shuffled as a whole, resumes at once, with any
number of processes, and can be evaluated.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sslvit.data.cache import say
from sslvit.data.image import MAX_PIXELS, ImageError, open_image
from sslvit.data.levels import Span
from sslvit.data.readers.columns import ReadOptions, choose_image_column, choose_label_column
from sslvit.data.readers.folders import real_paths
from sslvit.data.readers.lists import checked_root
from sslvit.data.readers.tables import choose_split, encoded_bytes, first_line, load_hub, load_parquet
from sslvit.data.readers.tars import ImageInTar, TarRows, tar_files
from sslvit.data.source import Images
from sslvit.errors import DataError
from sslvit.processes import collectives

SHARD = 1 << 40  # ids of a shard: more than any has rows


class Stream(Images):
    labels = classes = None
    unlabelled = "those of a stream are known only as it is read"

    def __init__(
        self,
        spec: str,  # hf:name[:configuration], parquet:/dir/*.parquet or webdataset:/dir/*.tar
        *,
        epoch_images: int,
        split: str = "train",
        canvas: int,
        channels: int = 3,
        image_column: str | None = None,
        label_column: str | None = None,
        root: Path | str | None = None,
        max_pixels: int = MAX_PIXELS,
        span: Span | None = None,
    ):
        if epoch_images < 1:
            raise ValueError(f"--epoch_images is {epoch_images}; a stream needs how many images count as one pass")
        self.name, self.epoch_images = f"{spec} ({split}, streamed)", epoch_images
        self.canvas, self.channels, self.max_pixels, self.span = (canvas, canvas), channels, max_pixels, span
        kind, _, rest = spec.partition(":")
        if not rest.strip():
            raise ValueError(f"stream:{spec} lacks a path or name: is a variable of the shell unset?")
        options = ReadOptions(split, checked_root(root, kind), image_column, label_column)
        if kind == "webdataset":
            self._open_tars(tar_files(rest, split), options)
        elif kind == "hf":
            self._open_table(choose_split(load_hub(rest, streaming=True), split, spec), [], options)
        elif kind == "parquet":
            self._open_table(*load_parquet(rest, split, streaming=True), options)
        else:
            raise ValueError(f"{spec!r} cannot be streamed: hf:, parquet: and webdataset: can")

    def _open_tars(self, files: list[Path], options: ReadOptions) -> None:
        if options.label_column not in (None, "cls"):
            raise ValueError(f"--label_column {options.label_column}: in tars a label is the member .cls of its sample")
        rows = TarRows(files, options.image_column)
        if rows.skipped and collectives.rank() == 0:
            say(f"{self.name}: not read, of what lies at the beginning of {files[0]}: {rows.skipped}")
        self.image_column, self.label_column = "image", "label" if rows.labelled else None
        self._rows_of, self.shards = rows.shard, len(files)
        self.roots: list[bytes] = []

    def _open_table(self, rows: Any, own: list[Path], options: ReadOptions) -> None:
        """own: the data's own folders."""
        import datasets

        if rows.features is None:
            raise DataError(f"{self.name} does not say what its columns are, so it cannot be streamed")
        self.image_column = choose_image_column(rows.features, options)
        if self.image_column not in rows.features:
            raise ValueError(f"--image_column {self.image_column} is inside another column, which streams do not read")
        label = choose_label_column(rows.features, options.label_column)
        numbered = label is not None and getattr(rows.features[label], "dtype", "").startswith(("int", "uint"))
        self.label_column = label if numbered else None
        if isinstance(rows.features[self.image_column], datasets.Image):
            rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        self._rows_of, self.shards = partial(rows.shard, rows.num_shards), rows.num_shards
        self.roots = real_paths(own if options.root is None else [options.root])

    def __len__(self) -> int:
        return self.epoch_images

    def shard(self, index: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a shard, each with an id that no other row has."""
        try:
            yield from enumerate(self._rows_of(index), index * SHARD)
        except DataError:
            raise
        except (OSError, ValueError) as error:  # Arrow's are among these
            raise DataError(f"{self.name}: shard {index} cannot be read: {first_line(error)}") from error

    def label(self, row: dict[str, Any]) -> int | None:
        return None if self.label_column is None else row[self.label_column]

    def decode(self, row: dict[str, Any]) -> Tensor | ImageError:
        try:
            image = row[self.image_column]
            tarred = isinstance(image, ImageInTar)
            data = image.read(self.max_pixels) if tarred else encoded_bytes(image, self.roots, self.max_pixels)
            return open_image(data, channels=self.channels, max_pixels=self.max_pixels, fit=self.canvas, span=self.span)
        except ImageError as error:
            return error
