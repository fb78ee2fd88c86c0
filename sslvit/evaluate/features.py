"""The one extractor: every image once, in order, through a backbone in evaluation mode, in float32.

An image that cannot be read has no features: a substitute would be counted as if it were this one.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor, nn

from sslvit import rng
from sslvit.data.shared import read_ahead
from sslvit.data.source import Samples, Source
from sslvit.errors import DataError
from sslvit.models.readout import Encoded, read
from sslvit.processes import collectives
from sslvit.processes.device import Fetched, send
from sslvit.views.pretraining import CropFlip, EvalView

PIECE = 1 << 14  # rows that travel between processes at a time
READOUT = re.compile(r"(cls|mean|both)(?::([1-9]\d*))?|(patches)")


class Features(NamedTuple):
    """Features of the images that could be read: `x` and their labels `y`, for each of several readouts by name.

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=16)
    >>> features = sslvit.extract_features(vit, "shapes:n=64", image_size=16)
    >>> features.x.shape, features.y.shape, features.declared
    (torch.Size([64, 32]), torch.Size([64]), 'cls')
    """

    by_readout: dict[str, Tensor]  # n d each (patches: n p d), float32, on the CPU
    labels: Tensor | None  # n
    ids: Tensor  # n
    unreadable: Tensor  # m: ids of the requested images that could not be read
    declared: str = ""  # the readout that stands for all, if it is known
    classes: tuple[str, ...] | None = None  # the labels' names, if they are known

    @property
    def x(self) -> Tensor:
        """The features by the declared readout, or by the only one: n d"""
        if self.declared not in self.by_readout and len(self.by_readout) != 1:
            raise ValueError(f"these features have the readouts {', '.join(self.by_readout)}: choose of by_readout")
        return self.by_readout.get(self.declared, next(iter(self.by_readout.values())))

    @property
    def y(self) -> Tensor:
        if self.labels is None:
            raise DataError("these features are of images without labels")
        return self.labels


def left_out(features: Features, source: Source) -> str:
    """A sentence about the images that could not be read, with an example; empty if there are none."""
    count = len(features.unreadable)
    if not count:
        return ""
    example = source.read(features.unreadable[:1].numpy()).bad
    why = f", e.g. {example[0].path}: {example[0].reason}" if example else ""  # perhaps it can be read by now
    return f"{count:,} of {count + len(features.ids):,} images of {source.name} cannot be read and are left out{why}"


def bytes_of(source: Source, images: int) -> int:
    height, width = source.canvas
    return images * source.channels * height * width


def extract(
    backbone: nn.Module,
    source: Source,
    view: EvalView | CropFlip,
    accelerator: Accelerator,
    *,
    ids: np.ndarray | None = None,
    readouts: tuple[str, ...] | None = None,
    version: int = 0,
    batch_size: int = 256,
    workers: int = 0,
) -> Features:
    """The features of these images (by default the whole source) in their order, on every process.

    readouts: by default those that the backbone declares. cls, mean and both; cls:4 and mean:4 join the last four
    blocks; both:4 joins cls of the last four and mean of the last, as DINOv2's probe; patches are all of them.
    version: which draw of an augmenting view, the same for any batching.
    """
    ids = np.arange(len(source)) if ids is None else np.asarray(ids)
    if len(ids) == 0:
        raise ValueError(f"no images of {source.name} to extract features from")
    readouts = tuple(readouts or backbone.readouts)
    # Each process takes one contiguous share. The last ones are padded for the collective, and cut off again.
    share = -(-len(ids) // collectives.processes())
    mine = ids[collectives.rank() * share : (collectives.rank() + 1) * share]
    if len(mine) == 0:  # more processes than images: any image gives the shapes of the padding
        mine = ids[:1]
    batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    loader = read_ahead(batches, source.read, bytes_of(source, len(batches[0])), workers)
    rows = _forward(backbone, loader, view, version, readouts, accelerator.device)
    gathered = {name: gather(values, share, len(ids), accelerator.device) for name, values in rows.items()}
    for name in readouts:
        if count := int((~gathered[name].isfinite()).sum()):
            raise ValueError(f"{count} of the features {name} of {source.name} are not finite")
    good = ~gathered["unreadable"].bool()
    if not good.any():
        raise DataError(f"none of the {len(ids):,} images of {source.name} to be evaluated can be read")
    return Features(
        {name: gathered[name][good] for name in readouts},
        gathered["labels"][good] if "labels" in gathered else None,
        torch.from_numpy(ids)[good],
        torch.from_numpy(ids)[~good],
    )


def _forward(
    backbone: nn.Module,
    loader: Iterable[Samples],
    view: EvalView | CropFlip,
    version: int,
    readouts: tuple[str, ...],
    device: torch.device,
) -> dict[str, Tensor]:
    """The rows of this process: features by readout, all of one forward pass, labels, and which are unreadable."""
    batches: dict[str, list[Tensor]] = defaultdict(list)
    coming: dict[str, Fetched] = {}  # of the batch before, which is waited for with the next one queued
    with evaluation_mode(backbone, device.type):
        for samples in loader:
            features = features_of(backbone, samples, view, version, readouts, device)
            coming, before = {name: Fetched(values) for name, values in features.items()}, coming
            for name, values in before.items():
                batches[name].append(values.read())
            if samples.labels is not None:
                batches["labels"].append(samples.labels)
            batches["unreadable"].append(unreadable(samples).to(torch.uint8))  # gloo gathers no bools
    for name, values in coming.items():
        batches[name].append(values.read())
    return {name: torch.cat(rows) for name, rows in batches.items()}


def features_of(
    backbone: nn.Module,
    samples: Samples,
    view: EvalView | CropFlip,
    version: int,
    readouts: tuple[str, ...],
    device: torch.device,
) -> dict[str, Tensor]:
    """The features of one batch by readout, all of one forward pass, float32 on the device. For `evaluation_mode`."""
    blocks = max(_blocks(readout) for readout in readouts)
    (images,) = view(send(samples.pixels, device), rng.key(version, "version", samples.ids), samples.extents)
    last = backbone.intermediate(images, blocks) if blocks > 1 else [backbone(images)]
    return {readout: _read(last, readout).float() for readout in readouts}


def unreadable(samples: Samples) -> Tensor:
    """Which of them could not be read: b"""
    return torch.isin(samples.ids, torch.tensor([line.id for line in samples.bad], dtype=torch.int64))


@contextmanager
def evaluation_mode(model: nn.Module, device: str) -> Iterator[None]:
    """No dropout, no gradient, no lower precision. Then every module returns to its own mode, also after an error: the
    frozen part of a model in training stays in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


def _blocks(readout: str) -> int:
    """The number of last blocks that a readout reads."""
    match = READOUT.fullmatch(readout)
    if match is None:
        raise ValueError(f"readout must be cls, mean, both, patches, or of several blocks as cls:4, got {readout!r}")
    return int(match[2] or 1)


def _read(last: list[Encoded], readout: str) -> Tensor:
    """From the outputs of the last blocks to b d, or to b p d for the readout patches."""
    name, blocks = readout.partition(":")[0], last[-_blocks(readout) :]
    if name == "patches":
        return last[-1].patches
    if name == "both":
        return torch.cat([*(read(block, "cls") for block in blocks), read(last[-1], "mean")], -1)
    return torch.cat([read(block, name) for block in blocks], -1)


def gather(mine: Tensor, share: int, total: int, device: torch.device) -> Tensor:
    """The rows of all processes in order, on the CPU; each holds up to `share` of the `total`."""
    if collectives.processes() == 1:
        return mine
    whole = mine.new_empty(collectives.processes(), share, *mine.shape[1:])
    for start in range(0, share, PIECE):
        size = min(PIECE, share - start)
        piece = torch.zeros(size, *mine.shape[1:], dtype=mine.dtype, device=device)
        here = mine[start : start + size]
        piece[: len(here)] = here.to(device)
        whole[:, start : start + size] = rearrange(collectives.all_gather(piece), "(r n) ... -> r n ...", n=size).cpu()
    return rearrange(whole, "r n ... -> (r n) ...")[:total]
