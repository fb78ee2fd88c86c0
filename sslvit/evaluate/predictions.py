"""Predictions in a parquet file, by sample id, so that two models can be compared image by image.

One row per image: id, label, prediction, and a probability for each class. The file's metadata name data, model and
protocol, and hold a seal, a hash of that and of all columns (files of earlier versions have none), since parquet does
not notice a changed byte. `sslvit pair FIRST.parquet SECOND.parquet` compares two.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from xxhash import xxh3_128

from sslvit.cli.run import shown
from sslvit.errors import DataError, NoInput
from sslvit.evaluate.metrics import check
from sslvit.evaluate.statistics import difference, sentence
from sslvit.storage import durable
from sslvit.storage.sealed import MARK, SEAL


class Predictions(NamedTuple):
    ids: Tensor  # n
    labels: Tensor  # n
    probabilities: Tensor  # n classes, float32
    about: dict[str, Any]


def save_predictions(path: Path, predictions: Predictions) -> None:
    """Written whole or not at all; an older file is replaced."""
    ids, labels, probabilities, about = predictions
    check(probabilities, labels)
    if ids.shape != labels.shape or len(ids.unique()) != len(ids):
        raise ValueError(f"ids of shape {tuple(ids.shape)} for {len(labels)} images, or not all different")
    flat = probabilities.float().contiguous().view(-1).numpy()
    columns = {"id": ids.numpy(), "label": labels.numpy(), "prediction": probabilities.argmax(-1).numpy()}
    table = pa.table(columns | {"probabilities": pa.FixedSizeListArray.from_arrays(flat, probabilities.shape[1])})
    text = json.dumps(about)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"about": text, SEAL: _seal(table, text.encode())}), sink)
    durable.replace(path, [memoryview(sink.getvalue())])


def load_predictions(path: Path) -> Predictions:
    if not path.is_file():
        raise NoInput(f"{path}: there is no such file. probe.py and finetune.py write predictions as .parquet")
    try:
        return _opened(pq.ParquetFile(pa.BufferReader(durable.read(Path(os.path.realpath(path))))).read())
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, RuntimeError, MemoryError) as error:
        raise DataError(f"{path} holds no predictions: {shown(' '.join(str(error).split())[:300])}") from error


def _opened(table: pa.Table) -> Predictions:
    if missing := {"id", "label", "probabilities"} - set(table.column_names):
        raise ValueError(f"it has no columns {sorted(missing)}")
    metadata = table.schema.metadata or {}
    if b"about" not in metadata:
        raise ValueError("its metadata do not name data, model and protocol")
    if SEAL.encode() in metadata and metadata[SEAL.encode()].decode() != _seal(table, metadata[b"about"]):
        raise ValueError("its content does not fit its seal: it is damaged, or was edited")
    about = json.loads(metadata[b"about"])
    if not isinstance(about, dict):
        raise ValueError(f"its metadata hold a {type(about).__name__}, not an object")
    flat = torch.tensor(table["probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False))
    return Predictions(
        torch.tensor(table["id"].to_numpy()), torch.tensor(table["label"].to_numpy()), flat.view(len(table), -1), about
    )


def _seal(table: pa.Table, about: bytes) -> str:
    """A hash of the values, however a file chunks them."""
    digest = xxh3_128(about)
    for name in sorted(table.column_names):
        column = table[name].combine_chunks()
        flat = column.flatten() if isinstance(column, pa.FixedSizeListArray) else column
        values = np.ascontiguousarray(flat.to_numpy(zero_copy_only=False))
        digest.update(f"{name} {values.dtype} {len(column)} {len(values)}".encode())
        digest.update(values.data)
    return MARK + digest.hexdigest()


def _by_id(predictions: Predictions) -> Predictions:
    ids, labels, probabilities, about = predictions
    order = ids.argsort()
    return Predictions(ids[order], labels[order], probabilities[order], about)


def paired(first: Predictions, second: Predictions) -> tuple[Predictions, Predictions]:
    """Both in the order of their ids, if they are of the same images."""
    a, b = _by_id(first), _by_id(second)
    if not torch.equal(a.ids, b.ids) or not torch.equal(a.labels, b.labels):
        common = len(set(a.ids.tolist()) & set(b.ids.tolist()))
        raise ValueError(
            f"predictions of {a.about} and {b.about} are not of the same images, or differ in labels: "
            f"{len(a.ids)} and {len(b.ids)} ids, {common} in common"
        )
    return a, b


def pair(first: Path, second: Path) -> str:
    """The comparison of two files of predictions, image by image, in sentences."""
    a, b = paired(load_predictions(first), load_predictions(second))
    lines, right = [], [one.probabilities.argmax(-1) == one.labels for one in (a, b)]
    for name, path, hits, one in zip(("first", "second"), (first, second), right, (a, b), strict=True):
        about = ", ".join(f"{key} {value}" for key, value in one.about.items())
        lines.append(f"{name}: {path}, {hits.double().mean():.2%}, {about}")
    x, y = right
    lines.append(
        f"of {len(x):,} images both are right on {int((x & y).sum()):,}, the first alone on {int((x & ~y).sum()):,}, "
        f"the second alone on {int((~x & y).sum()):,}, neither on {int((~x & ~y).sum()):,}"
    )
    return "\n".join([*lines, sentence("first", "second", difference([x], [y]), f"on these {len(x):,} images")])
