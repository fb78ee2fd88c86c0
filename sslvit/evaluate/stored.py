"""Features on disk, in a folder named by a hash of all that they depend on, so that none is ever out of date.

That is the backbone's weights and configuration, the data's files and how they are decoded, ids, view, readouts, kind
of device and the package's version. (Files are identified by size and time: a rewrite with the clock set back goes
unnoticed.) Labels are the source's and are not stored. A damaged file is noticed by its hash or seal, and made again.

    <hash>/features.safetensors    by readout, with ids
           about.json              its size and hash, and in words what it holds
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load as load_safetensors
from torch import nn
from xxhash import xxh3_128

from sslvit import __version__
from sslvit.data.spec import Source
from sslvit.evaluate.features import Features, extract
from sslvit.processes import collectives
from sslvit.storage import durable, sealed
from sslvit.views.pretraining import CropFlip, EvalView

log = logging.getLogger(__name__)
FORMAT = 2  # another one whenever the same backbone and images give other features
FILE, ABOUT = "features.safetensors", "about.json"


def stored(
    folder: Path,
    backbone: nn.Module,
    source: Source,
    view: EvalView | CropFlip,
    accelerator: Accelerator,
    *,
    ids: np.ndarray | None = None,
    readouts: tuple[str, ...] | None = None,
    version: int = 0,
    batch_size: int = 256,
) -> Features:
    """The features of `extract`, read from the folder if they are there, else written to it."""
    ids = np.arange(len(source)) if ids is None else np.asarray(ids)
    readouts = tuple(readouts or backbone.readouts)
    about = {
        "version": [__version__, FORMAT],
        "weights": durable.tensors_hash(backbone.state_dict()),
        "backbone": [type(backbone).__name__, asdict(backbone.config)],
        "data": [source.name, source.version],
        "ids": xxh3_128(ids.astype(np.int64).tobytes()).hexdigest(),
        "view": [repr(view), version],
        "readouts": readouts,
        "device": accelerator.device.type,
    }
    place = folder / xxh3_128(json.dumps(about, sort_keys=True).encode()).hexdigest()
    features = _read(place, readouts, source)
    everywhere = collectives.all_mean(torch.tensor(float(features is not None), device=accelerator.device)) == 1
    if features is not None and everywhere:  # extraction is a collective: all processes read, or all extract
        return features
    features = extract(
        backbone, source, view, accelerator, ids=ids, readouts=readouts, version=version, batch_size=batch_size
    )
    if collectives.rank() == 0:
        _write(place, features, about)
    return features


def _read(place: Path, readouts: tuple[str, ...], source: Source) -> Features | None:
    try:
        written = sealed.read(place / ABOUT, file=dict)["file"]
        tensors = load_safetensors(durable.read(place / FILE, written=written))
        by_readout = {readout: tensors[f"readout {readout}"] for readout in readouts}
        ids = tensors["ids"]
        labels = None if source.labels is None else torch.from_numpy(source.labels[ids.numpy()])
        return Features(by_readout, labels, ids, tensors["unreadable"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        log.warning("%s is damaged and is made again: %s", place, error)
        return None


def _write(place: Path, features: Features, about: dict[str, Any]) -> None:
    tensors = {f"readout {readout}": values for readout, values in features.by_readout.items()}
    tensors |= {"ids": features.ids, "unreadable": features.unreadable}
    with durable.whole_folder(place) as folder:
        file = durable.write(folder / FILE, durable.tensor_pieces(tensors))
        durable.write(folder / ABOUT, [sealed.text(about | {"file": file})])
