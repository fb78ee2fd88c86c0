"""Sets too large for one machine, never held: Hugging Face datasets in streaming mode.

    python recipes/mpp.py --data stream:hf:org/name --epoch_images 1000000

A stream is shards of rows, each with an image to be decoded; stream_row.py reads them. Images must be in the rows: one
that names a file or URL, as in sets of plain files on the hub, is a bad image. If the set changes where it lies, so
does all that follows; there is no fingerprint to tell by.

Where the set fits on the disk, a source (source.py) is better: it is shuffled as a whole, it goes on at once after a
restart, with any number of processes, and it can be evaluated.
"""

import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from sslvit.data.columns import choose_image_column, choose_label_column
from sslvit.data.hub import SPLITS, choose_split, encoded_bytes, first_line, load_hub, matching, of_split
from sslvit.data.image import MAX_PIXELS, BadImage, open_image
from sslvit.data.samples import Images
from sslvit.errors import DataError, NoInput

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
        max_pixels: int = MAX_PIXELS,
    ):
        import datasets

        if epoch_images < 1:
            raise ValueError(
                f"--epoch_images is {epoch_images}; of a stream it must say how many images count as one pass, because "
                f"nobody knows how many are in {spec} before it is read"
            )
        self.name, self.epoch_images = f"{spec} ({split}, streamed)", epoch_images
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
        self._rows, self.shards = rows, rows.num_shards

    def __len__(self) -> int:
        return self.epoch_images

    def shard(self, index: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a shard, each with an id that no other row has."""
        return enumerate(self._rows.shard(self.shards, index), index * SHARD)

    def label(self, row: dict[str, Any]) -> int | None:
        return None if self.label_column is None else row[self.label_column]

    def decode(self, row: dict[str, Any]) -> Tensor | BadImage:
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
        raise ValueError(f"{spec!r} cannot be streamed: hf:, parquet: and webdataset: can")
    files = of_split(matching(rest, ".tar" if kind == "webdataset" else ".parquet"), split)
    if not files:
        raise NoInput(f"{spec} has no {split} split: no file is named {' or '.join(SPLITS[split])}-...")
    try:
        rows = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{spec} cannot be read: {first_line(error)}") from error
    return rows, [os.fsencode(os.path.realpath(folder)) for folder in sorted({file.parent for file in files})]
