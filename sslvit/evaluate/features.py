"""The one extractor: every image once, in order, not augmented, through a backbone in eval mode."""

from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sslvit import distributed, rng
from sslvit.data.source import Source
from sslvit.data.views import Plain
from sslvit.readout import read


class Features(NamedTuple):
    by_readout: dict[str, Tensor]  # n d each, float32, on the CPU
    labels: Tensor | None  # n
    ids: Tensor  # n


@torch.no_grad()
def extract(
    backbone: nn.Module,
    source: Source,
    view: Plain,
    accelerator: Accelerator,
    *,
    ids: np.ndarray | None = None,
    readouts: tuple[str, ...] | None = None,
    batch_size: int = 256,
) -> Features:
    """The features of these images (all of the source by default), in their order, on every process.

    Each process takes one contiguous part; parts are padded for the collective and the padding is cut off again, so no
    image is counted twice, whatever the number of processes.
    """
    ids = np.arange(len(source)) if ids is None else ids
    readouts = readouts or backbone.readouts
    part = -(-len(ids) // distributed.processes())
    mine = ids[distributed.rank() * part : (distributed.rank() + 1) * part]
    was_training = backbone.training
    backbone.eval()
    rows: dict[str, list[Tensor]] = {name: [] for name in readouts}
    labels = []
    for start in range(0, len(mine), batch_size):
        samples = source.read(mine[start : start + batch_size])
        pixels = samples.pixels.to(accelerator.device, non_blocking=True)
        # An evaluation view draws nothing; views want a key all the same.
        (images,) = view(pixels, rng.key(0, samples.ids.to(pixels.device)), samples.extents)
        with accelerator.autocast():
            encoded = backbone(images)
        for name in readouts:
            rows[name].append(read(encoded, name).float())
        if samples.labels is not None:
            labels.append(samples.labels)
    backbone.train(was_training)

    def everyone(parts: list[Tensor], width: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        whole = torch.zeros(part, *width, dtype=dtype, device=accelerator.device)
        if parts:
            whole[: len(mine)] = torch.cat(parts).to(accelerator.device)
        return distributed.all_gather(whole)[: len(ids)].cpu()

    width = {name: backbone.width * (2 if name == "both" else 1) for name in readouts}
    return Features(
        {name: everyone(rows[name], (width[name],), torch.float32) for name in readouts},
        None if source.labels is None else everyone(labels, (), torch.int64),
        torch.from_numpy(np.asarray(ids)),
    )
