"""Predictions in a parquet file, by sample id, so that two models can be compared image by image.

One row an image: id, label, prediction, and a probability for each class. The file's metadata say what was predicted
with what: data, model, protocol.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sslvit import durable
from sslvit.evaluate.metrics import check


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
    table = pq.read_table(path)
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
