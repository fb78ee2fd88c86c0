"""Predictions in a parquet file, by sample id, so that two models can be compared image by image.

One row an image: id, label, prediction, and a probability for each class. The file's metadata say what was predicted
with what, data, model, protocol; and hold a seal, a hash of that and of all columns (files of earlier versions have
none), since parquet does not notice a changed byte. `python -m sslvit pair FIRST.parquet SECOND.parquet` compares two.
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

from sslvit.cli import shown
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
    table = pa.table(
        {
            "id": ids.numpy(),
            "label": labels.numpy(),
            "prediction": probabilities.argmax(-1).numpy(),
            "probabilities": pa.FixedSizeListArray.from_arrays(
                probabilities.float().contiguous().view(-1).numpy(), probabilities.shape[1]
            ),
        }
    )
    told = json.dumps(about)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"about": told, SEAL: _seal(table, told.encode())}), sink)
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
    told = table.schema.metadata or {}
    if b"about" not in told:
        raise ValueError("its metadata do not say what was predicted with what")
    if SEAL.encode() in told and told[SEAL.encode()].decode() != _seal(table, told[b"about"]):
        raise ValueError("its content does not fit its seal: it is damaged, or was edited")
    about = json.loads(told[b"about"])
    if not isinstance(about, dict):
        raise ValueError(f"its metadata hold a {type(about).__name__}, not an object")
    flat = torch.tensor(table["probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False))
    return Predictions(
        torch.tensor(table["id"].to_numpy()), torch.tensor(table["label"].to_numpy()), flat.view(len(table), -1), about
    )


def _seal(table: pa.Table, about: bytes) -> str:
    """Of the values, whatever pieces a file holds them in."""
    digest = xxh3_128(about)
    for name in sorted(table.column_names):
        column = table[name].combine_chunks()
        flat = column.flatten() if isinstance(column, pa.FixedSizeListArray) else column
        values = np.ascontiguousarray(flat.to_numpy(zero_copy_only=False))
        digest.update(f"{name} {values.dtype} {len(column)} {len(values)}".encode())
        digest.update(values.data)
    return MARK + digest.hexdigest()


def paired(first: Predictions, second: Predictions) -> tuple[Predictions, Predictions]:
    """Both in the order of their ids, if they are of the same images."""
    both = [
        Predictions(one.ids.sort().values, one.labels[order], one.probabilities[order], one.about)
        for one in (first, second)
        for order in [one.ids.argsort()]
    ]
    if not torch.equal(both[0].ids, both[1].ids) or not torch.equal(both[0].labels, both[1].labels):
        common = len(set(first.ids.tolist()) & set(second.ids.tolist()))
        raise ValueError(
            f"predictions of {first.about} and {second.about} are not of the same images, or differ in labels: "
            f"{len(first.ids)} and {len(second.ids)} ids, {common} in common"
        )
    return both[0], both[1]


def pair(first: Path, second: Path) -> str:
    """What two files of predictions say of each other, image by image."""
    both = paired(load_predictions(first), load_predictions(second))
    right = [one.probabilities.argmax(-1) == one.labels for one in both]
    lines = [
        f"{name}: {path}, {100 * hits.double().mean():.2f} %, {', '.join(f'{k} {v}' for k, v in one.about.items())}"
        for name, path, hits, one in zip(("first", "second"), (first, second), right, both, strict=True)
    ]
    only = [int((right[i] & ~right[1 - i]).sum()) for i in range(2)]
    lines.append(
        f"of {len(right[0]):,} images both are right on {int((right[0] & right[1]).sum()):,}, the first alone on "
        f"{only[0]:,}, the second alone on {only[1]:,}, neither on {int((~right[0] & ~right[1]).sum()):,}"
    )
    found = difference([right[0]], [right[1]])
    return "\n".join([*lines, sentence("first", "second", found, f"on these {len(right[0]):,} images")])
