"""Features of many images in one file. They are written in shards as they are computed, so that a kill costs one shard.

    features.parquet                     a row per image: id, path, label, features; in its metadata `about`, what of
    features.npy                         or the features alone, with the rest in features.npy.rows.parquet
    features.parquet.unreadable.jsonl    the images that have no row: id, path, reason
    .features.parquet.unfinished/        until then: shards.py

The rows are those of `extract` on one process, bit for bit, with any number of processes and workers: batches hold the
same images. The path of an image is what errors call it: a file, a member of a tar, the row of a table. Arrays and the
built-in images have none, and then there is no such column.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm
from xxhash import xxh3_128

from sslvit import __version__
from sslvit.data.readers.encoded import EncodedSource
from sslvit.data.shared import read_ahead
from sslvit.data.source import ArraySource, Samples, Source, Unreadable, whole
from sslvit.data.subset import Subset
from sslvit.errors import CannotWrite, DataError
from sslvit.evaluate.features import bytes_of, evaluation_mode, features_of, unreadable
from sslvit.evaluate.shards import Shard, Shards
from sslvit.processes import collectives
from sslvit.storage import durable
from sslvit.views.pretraining import EvalView

SHARD_BATCHES, SHARD_BYTES = 8, 64 << 20  # a shard has up to so many batches, and one at least
ROW_BYTES = 200  # about, of an id, a label and a path
SHOWN = 3  # unreadable images that are named at the terminal
DIFFERENT = {"model": "a different model", "images": "different images", "options": "different options"}
SUFFIXES = (".parquet", ".npy")
ROWS, UNREADABLE = "rows.parquet", "unreadable.jsonl"


class Embedded(NamedTuple):
    """What was written, as the main process knows it."""

    rows: int
    shape: tuple[int, ...]  # of a row
    unreadable: int
    per_second: float  # images; 0 if all shards were there


class Work(NamedTuple):
    source: Source
    ids: np.ndarray
    readout: str
    shape: tuple[int, ...]  # of a row
    dtype: torch.dtype
    batch_size: int

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def pieces(self) -> list[np.ndarray]:
        """The ids of each shard."""
        batches = SHARD_BYTES // (self.batch_size * self.row_bytes)
        rows = self.batch_size * min(max(batches, 1), SHARD_BATCHES)
        return [self.ids[first : first + rows] for first in range(0, len(self.ids), rows)]

    def batches(self, ids: np.ndarray) -> list[np.ndarray]:
        return [ids[first : first + self.batch_size] for first in range(0, len(ids), self.batch_size)]


def beside(out: Path, name: str) -> Path:
    return out.with_name(f"{out.name}.{name}")


def products(out: Path) -> list[Path]:
    """What is written: of unreadable images, of rows, and the file itself."""
    return [beside(out, UNREADABLE), *([beside(out, ROWS)] if out.suffix == ".npy" else []), out]


def check_out(out: Path, overwrite: bool) -> None:
    """Refuses a file that cannot be written, before a model is opened. What was made beside it is no reason to refuse
    if a command was killed between the two: then its folder is there."""
    if out.suffix not in SUFFIXES:
        raise ValueError(f"--out {out}: its name must end in {' or '.join(SUFFIXES)}")
    shards = Shards(out)
    shards.sweep()
    for path in reversed(products(out)):
        if os.path.isdir(path):
            raise CannotWrite(f"--out: {path} is a folder: choose another name")
        if os.path.lexists(path) and not overwrite and (path == out or not shards.folder.is_dir()):
            raise CannotWrite(f"--out: {path} exists: --overwrite replaces it, or choose another name")


def embed(
    backbone: nn.Module,
    source: Source,
    view: EvalView,
    accelerator: Accelerator,
    out: Path,
    *,
    ids: np.ndarray,
    readout: str,
    about: dict[str, Any],
    batch_size: int = 256,
    workers: int = 0,
    float16: bool = False,
    overwrite: bool = False,
) -> Embedded:
    """Writes the file; of several processes each computes its share of the shards. about: more metadata."""
    check_out(out, overwrite)
    shape = _shape(backbone, source, view, readout, accelerator.device)
    work = Work(source, ids, readout, shape, torch.float16 if float16 else torch.float32, batch_size)
    weights = durable.tensors_hash(backbone.state_dict())
    of = {
        "model": [weights, repr(asdict(backbone.config))],
        "images": [source.version, xxh3_128(ids.tobytes()).hexdigest()],
        "options": [readout, repr(view), batch_size, str(work.dtype), accelerator.device.type, __version__],
    }
    collectives.assert_identical_on_all_ranks({name: json.dumps(one) for name, one in of.items()}, accelerator.device)
    about |= {"weights": weights, "data": source.name, "fingerprint": source.fingerprint, "images": len(ids)}
    about |= {"readout": readout, "view": repr(view), "classes": source.classes, "version": __version__}
    shards, bad = Shards(out), list[Unreadable]()
    with ExitStack() as lock:
        if accelerator.is_main_process:
            with _writing(out):
                _check(shards, work, of, overwrite)
                lock.enter_context(shards.locked(of))
        accelerator.wait_for_everyone()
        per_second = _compute(backbone, work, view, shards, accelerator, workers)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with _writing(out):
                bad = _finish(shards, work, about)
        accelerator.wait_for_everyone()
    for line in bad[:SHOWN]:
        accelerator.print(f"skipped, unreadable: {line.path}: {line.reason}")
    return Embedded(len(ids) - len(bad), shape, len(bad), per_second)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """What the system refuses in here is about the file and its folder."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(f"--out {out} cannot be written: {error.strerror or error}") from error


def _shape(backbone: nn.Module, source: Source, view: EvalView, readout: str, device: torch.device) -> tuple[int, ...]:
    """Of a row, from a black image; what cannot be read from this backbone is refused here."""
    pixels = torch.zeros(1, source.channels, *source.canvas, dtype=torch.uint8)
    samples = Samples(pixels, whole(source.canvas, 1), torch.zeros(1, dtype=torch.int64), None)
    with evaluation_mode(backbone, device.type):
        return tuple(features_of(backbone, samples, view, 0, (readout,), device)[readout].shape[1:])


def _check(shards: Shards, work: Work, of: dict[str, Any], overwrite: bool) -> None:
    """Refuses before anything is written: other work that was begun, or a disk without room for the missing shards and
    for the file that is made of all."""
    if (different := shards.different(of)) and not overwrite:
        what = " and ".join(DIFFERENT[name] for name in different)
        raise CannotWrite(
            f"--out {shards.out}: {shards.folder} belongs to an unfinished command with {what}: "
            "--overwrite starts afresh, or choose another name"
        )
    there = 0 if different else shards.rows()
    need = (2 * len(work.ids) - there) * work.row_bytes + len(work.ids) * ROW_BYTES
    parent = next(folder for folder in shards.folder.absolute().parents if folder.is_dir())
    if need > (free := shutil.disk_usage(parent).free):
        raise CannotWrite(
            f"--out {shards.out}: {len(work.ids):,} rows of {work.row_bytes:,} bytes, in shards and then in the file, "
            f"need {need / 1e6:,.0f} MB more, and {free / 1e6:,.0f} MB are free in {parent}"
        )


def _compute(
    backbone: nn.Module, work: Work, view: EvalView, shards: Shards, accelerator: Accelerator, workers: int
) -> float:
    """Writes the missing shards of this process; the images per second of all."""
    rank, processes = collectives.rank(), collectives.processes()
    mine = {number: ids for number, ids in enumerate(work.pieces()) if number % processes == rank}
    with _writing(shards.out):
        there = shards.files()
        todo = {n: ids for n, ids in mine.items() if n not in there or not shards.is_whole(there[n])}
    if len(todo) < len(mine):
        done = len(mine) - len(todo)
        accelerator.print(f"Resuming: {done:,} of {len(mine):,} shards are already in {shards.folder}")
    if not todo:
        return 0.0
    batches = [batch for ids in todo.values() for batch in work.batches(ids)]
    loader = read_ahead(batches, work.source.read, bytes_of(work.source, max(map(len, batches))), workers)
    images, began = processes * sum(map(len, batches)), time.perf_counter()  # the others have about as many
    off = None if accelerator.is_main_process else True  # None: off where nobody watches
    with evaluation_mode(backbone, accelerator.device.type), tqdm(total=images, unit=" images", disable=off) as bar:
        for number, ids in todo.items():
            features, bad = [], list[Unreadable]()
            for _ in work.batches(ids):
                samples = next(loader)
                rows = features_of(backbone, samples, view, 0, (work.readout,), accelerator.device)[work.readout].cpu()
                features.append(rows[~unreadable(samples)])
                bad += samples.bad
                bar.update(processes * len(samples.ids))
            shard = _shard(work, ids, torch.cat(features), bad)
            with _writing(shards.out):
                shards.write(number, shard)
    return images / (time.perf_counter() - began)


def _shard(work: Work, ids: np.ndarray, features: Tensor, bad: list[Unreadable]) -> Shard:
    ids = ids[~np.isin(ids, [line.id for line in bad])]
    stored = features.to(work.dtype)
    finite = stored.isfinite().flatten(1).all(1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        highest = features[first].abs().max()
        large = f": {highest:g} is too large for --float16" if highest.isfinite() else ""
        raise ValueError(f"features {work.readout} of image {ids[first]} of {work.source.name} are not finite{large}")
    return Shard(stored, torch.from_numpy(ids), bad)


def _finish(shards: Shards, work: Work, about: dict[str, Any]) -> list[Unreadable]:
    """Makes the file of all shards, and those beside it; then they are renamed, the file last."""
    rows, files, array = shards.rows(), shards.files(), shards.out.suffix == ".npy"
    if len(files) < len(work.pieces()):
        raise CannotWrite(f"--out {shards.out}: shards of other processes are not there: all must see the same folder")
    if not rows:
        line = shards.read(files[0]).unreadable[0]
        what = f"none of {len(work.ids):,} images of {work.source.name} can be read"
        raise DataError(f"{what}, the first because: {line.path}: {line.reason}")
    about |= {"unreadable": len(work.ids) - rows}
    schema, bad = _schema(work, about, features=not array), list[Unreadable]()
    made = {place: shards.folder / place.name for place in products(shards.out)}
    lines_file, out_file = made[beside(shards.out, UNREADABLE)], made[shards.out]
    table_file = made.get(beside(shards.out, ROWS), out_file)
    with _new(out_file) as out, _new(table_file) if array else nullcontext(out) as table:
        if array:
            header = {"descr": np.dtype(str(work.dtype).partition(".")[2]).str, "fortran_order": False}
            np.lib.format.write_array_header_1_0(out, header | {"shape": (rows, *work.shape)})
        with pq.ParquetWriter(table, schema, compression="none", use_dictionary=False) as writer:
            for shard in map(shards.read, files.values()):
                if array:
                    out.write(shard.features.numpy().data)
                if len(shard.ids):
                    writer.write_table(_table(work, schema, shard))
                bad += shard.unreadable
    with _new(lines_file) as lines:
        kept = [{"id": line.id, "path": line.path, "reason": line.reason} for line in bad]
        lines.write("".join(json.dumps(line) + "\n" for line in kept).encode())
    shards.made()
    for place, file in made.items():
        if file == lines_file and not bad:
            place.unlink(missing_ok=True)  # of an earlier command
        else:
            os.replace(file, place)
    durable.sync_folder(shards.folder.parent)
    durable.discard(shards.folder)
    return bad


@contextmanager
def _new(path: Path) -> Iterator[BinaryIO]:
    """A file to write, on the disk at the end."""
    path.unlink(missing_ok=True)
    with open(path, "xb", opener=durable.without_links) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _schema(work: Work, about: dict[str, Any], *, features: bool) -> pa.Schema:
    columns: dict[str, pa.DataType] = {"id": pa.int64()}
    if _paths(work.source, work.ids[:1]) is not None:
        columns["path"] = pa.string()
    if work.source.labels is not None:
        columns["label"] = pa.int64()
    if features:
        columns["features"] = pa.from_numpy_dtype(str(work.dtype).partition(".")[2])
        for size in reversed(work.shape):
            columns["features"] = pa.list_(columns["features"], size)
    return pa.schema(columns, {"about": json.dumps(about)})


def _table(work: Work, schema: pa.Schema, shard: Shard) -> pa.Table:
    ids, flat = shard.ids.numpy(), pa.array(shard.features.reshape(-1).numpy())
    for size in reversed(work.shape):
        flat = pa.FixedSizeListArray.from_arrays(flat, size)
    labels = None if work.source.labels is None else work.source.labels[ids]
    columns = {"id": ids, "path": _paths(work.source, ids), "label": labels, "features": flat}
    return pa.table([pa.array(columns[name]) for name in schema.names], schema)


def _paths(source: Source, ids: np.ndarray) -> list[str] | None:
    """What errors call these images; None where they are no files."""
    if isinstance(source, Subset):
        return _paths(source.inner, source.rows[ids])
    if isinstance(source, ArraySource) and source.decoded_from is not None:
        source = source.decoded_from
    return [source.store.where(id) for id in ids.tolist()] if isinstance(source, EncodedSource) else None
