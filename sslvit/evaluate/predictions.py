"""Predictions in a parquet file, by sample id, so that two models can be compared image by image.

One row an image: id, label, prediction, and a probability for each class. The file's metadata say what was predicted
with what: data, model, protocol. `python -m sslvit pair FIRST.parquet SECOND.parquet` compares two.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sslvit import durable
from sslvit.errors import NoInput
from sslvit.evaluate.metrics import check
from sslvit.statistics import difference, sentence


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
    ).replace_schema_metadata({"about": json.dumps(about)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    durable.replace(path, [memoryview(sink.getvalue())])


def load_predictions(path: Path) -> Predictions:
    if not path.is_file():
        raise NoInput(f"{path}: there is no such file. probe.py and finetune.py write predictions as .parquet")
    try:
        table = pq.read_table(path)
        if missing := {"id", "label", "probabilities"} - set(table.column_names):
            raise ValueError(f"it has no columns {sorted(missing)}")
        if b"about" not in (table.schema.metadata or {}):
            raise ValueError("its metadata do not say what was predicted with what")
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{path} holds no predictions: {error}") from error
    flat = torch.tensor(table["probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False))
    return Predictions(
        torch.tensor(table["id"].to_numpy()),
        torch.tensor(table["label"].to_numpy()),
        flat.view(len(table), -1),
        json.loads(table.schema.metadata[b"about"]),
    )


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
