"""The one extractor: every image once, in order, through a backbone in eval mode, in float32; not augmented, unless a
probe that trains on augmented versions asks for one.

An image that cannot be read has no features: another that stood in for it would be counted as if it were this one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sslvit import rng
from sslvit.data.source import Samples, Source
from sslvit.errors import DataError
from sslvit.models.readout import Encoded, read
from sslvit.processes import collectives
from sslvit.views.pretraining import CropFlip, EvalView

PIECE = 1 << 14  # rows that travel between processes at a time


class Features(NamedTuple):
    """Of the images that could be read."""

    by_readout: dict[str, Tensor]  # n d each (patches: n p d), float32, on the CPU
    labels: Tensor | None  # n
    ids: Tensor  # n
    unreadable: Tensor  # m: the ids of the others that were asked for


def left_out(features: Features, source: Source) -> str:
    """A sentence about the images that could not be read, with an example, or nothing."""
    count = len(features.unreadable)
    if not count:
        return ""
    example = source.read(features.unreadable[:1].numpy()).bad
    why = f", e.g. {example[0].path}: {example[0].reason}" if example else ""  # perhaps it can be read by now
    return f"{count:,} of {count + len(features.ids):,} images of {source.name} cannot be read and are left out{why}"


class _Batches(Dataset):
    """Item i is the i-th batch of these images."""

    def __init__(self, source: Source, ids: np.ndarray, batch_size: int):
        self.source, self.ids, self.batch_size = source, ids, batch_size

    def __len__(self) -> int:
        return -(-len(self.ids) // self.batch_size)

    def __getitem__(self, item: int) -> Samples:
        return self.source.read(self.ids[item * self.batch_size : (item + 1) * self.batch_size])


@torch.no_grad()
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
    """The features of these images (all of the source by default) that can be read, in their order, on every process.

    One forward pass serves all readouts: cls, mean and both; cls:4 and mean:4, of the last four blocks, joined; both:4,
    cls of the last four and mean of the last, as DINOv2's probe; patches, all of them. The default is what the backbone
    declares. Always in float32, whatever training runs in, so that monitored and later numbers are the same. version:
    which one of an augmenting view, the same for any batching.

    Each process takes one contiguous part; parts are padded for the collective and the padding is cut off again, so no
    image is counted twice, whatever the number of processes.
    """
    ids = np.arange(len(source)) if ids is None else np.asarray(ids)
    readouts = tuple(readouts or backbone.readouts)
    blocks = max(_blocks(readout) for readout in readouts)
    if len(ids) == 0:
        raise ValueError(f"no images of {source.name} to extract features from")
    part = -(-len(ids) // collectives.processes())
    mine = ids[collectives.rank() * part : (collectives.rank() + 1) * part]
    if len(mine) == 0:  # more processes than images: another's image tells the shapes, and is cut off again
        mine = ids[:1]
    rows: dict[str, list[Tensor]] = {name: [] for name in readouts}
    labels, replaced = [], []
    batches = DataLoader(_Batches(source, mine, batch_size), batch_size=None, num_workers=workers)
    with _eval_mode(backbone), torch.autocast(accelerator.device.type, enabled=False):
        for samples in batches:
            pixels = samples.pixels.to(accelerator.device, non_blocking=True)
            # Plain draws nothing; views want a key all the same.
            (images,) = view(pixels, rng.key(version, "version", samples.ids.to(pixels.device)), samples.extents)
            last = backbone.intermediate(images, blocks) if blocks > 1 else [backbone(images)]
            for name in readouts:
                rows[name].append(_read(last, name).float().cpu())
            if samples.labels is not None:
                labels.append(samples.labels)
            bad = torch.tensor([line.id for line in samples.bad], dtype=torch.int64)
            replaced.append(torch.isin(samples.ids, bad).to(torch.uint8))  # gloo gathers no bools
    gathered = {name: _everyone(rows[name], part, len(ids), accelerator.device) for name in readouts}
    for name, values in gathered.items():
        if not values.isfinite().all():
            raise ValueError(
                f"{int((~values.isfinite()).sum())} of the features {name} of {source.name} are not finite"
            )
    all_ids = torch.from_numpy(ids.copy())
    good = ~_everyone(replaced, part, len(ids), accelerator.device).bool()
    if not good.any():
        raise DataError(f"not one of the {len(ids):,} images of {source.name} to be looked at can be read")
    return Features(
        {name: values[good] for name, values in gathered.items()},
        None if source.labels is None else _everyone(labels, part, len(ids), accelerator.device)[good],
        all_ids[good],
        all_ids[~good],
    )


@contextmanager
def _eval_mode(backbone: nn.Module) -> Iterator[None]:
    """Every module goes back to the mode of its own, also after an error: a frozen part of a model that trains stays
    in evaluation mode."""
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _blocks(readout: str) -> int:
    """How many of the last blocks it reads."""
    name, _, count = readout.partition(":")
    if name not in ("cls", "mean", "both", "patches") or (count and not count.isdecimal()) or count == "0":
        raise ValueError(f"readout {readout!r} is none of cls, mean, both, patches, or of blocks as in cls:4")
    if name == "patches" and count:
        raise ValueError(f"readout {readout!r}: patches are read from the last block")
    return int(count or 1)


def _read(last: list[Encoded], readout: str) -> Tensor:
    """From the outputs of the last blocks to b d, or to b p d for the readout patches."""
    name, blocks = readout.partition(":")[0], last[-_blocks(readout) :]
    if name == "patches":
        return last[-1].patches
    if name == "both":
        return torch.cat([*(read(block, "cls") for block in blocks), read(last[-1], "mean")], -1)
    return torch.cat([read(block, name) for block in blocks], -1)


def _everyone(rows: list[Tensor], part: int, total: int, device: torch.device) -> Tensor:
    """The rows of all processes in order, on the CPU; each holds up to `part` of the `total`."""
    mine = torch.cat(rows)
    if collectives.processes() == 1:
        return mine
    whole = mine.new_empty(collectives.processes(), part, *mine.shape[1:])
    for start in range(0, part, PIECE):
        size = min(PIECE, part - start)
        piece = torch.zeros(size, *mine.shape[1:], dtype=mine.dtype, device=device)
        here = mine[start : start + size]
        piece[: len(here)] = here.to(device)
        whole[:, start : start + size] = rearrange(collectives.all_gather(piece), "(r n) ... -> r n ...", n=size).cpu()
    return rearrange(whole, "r n ... -> (r n) ...")[:total]
