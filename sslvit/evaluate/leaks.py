"""Near-duplicates between two sets: test images that a backbone has all but seen in pretraining.

An image is compared by a thumbnail: 16 x 16 pixels, each channel as it is, its mean taken away and its length set to 1.
Two images are near-duplicates if their thumbnails, or one and the mirrored other, correlate above a threshold. That
survives resizing, compression, and changes of brightness and contrast; not crops or rotations, so the count is a lower
bound. An image without contrast is compared with nothing.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit import rng
from sslvit.data.source import Source
from sslvit.data.views import Plain

SIDE = 16
THRESHOLD = 0.99
FLAT = 0.5 / 255  # a deviation below which a thumbnail holds nothing but rounding


class Leaks(NamedTuple):
    ids: Tensor  # m: of the test images with a near-duplicate
    twins: Tensor  # m: the most alike image of the other set
    similarity: Tensor  # m
    total: int  # test images looked at

    def __str__(self) -> str:
        share = 100 * len(self.ids) / self.total
        return f"{len(self.ids):,} of {self.total:,} test images ({share:.2f} %) have a near-duplicate in pretraining"


def thumbnails(source: Source, *, batch_size: int = 1024) -> Tensor:
    """n c 16 16, of mean 0 and length 1; zero where an image has no contrast."""
    parts = []
    for start in range(0, len(source), batch_size):
        samples = source.read(np.arange(start, min(start + batch_size, len(source))))
        (images,) = Plain(SIDE)(samples.pixels, rng.key(0, samples.ids), samples.extents)
        centred = images - images.mean((1, 2, 3), keepdim=True)
        flat = centred.square().mean((1, 2, 3), keepdim=True).sqrt() < FLAT
        parts.append(F.normalize(centred.flatten(1), dim=-1).view_as(images).masked_fill(flat, 0))
    return torch.cat(parts)


def leaks(pretraining: Tensor, test: Tensor, *, threshold: float = THRESHOLD, chunk: int = 1024) -> Leaks:
    """Of thumbnails, n c h w and m c h w. Ids are their rows."""
    if pretraining.shape[1:] != test.shape[1:]:
        raise ValueError(f"thumbnails {tuple(pretraining.shape[1:])} and {tuple(test.shape[1:])} do not compare")
    best = torch.full((len(test),), -1.0)
    twins = torch.zeros(len(test), dtype=torch.int64)
    flat = test.flatten(1)
    for start in range(0, len(pretraining), chunk):
        piece = pretraining[start : start + chunk]
        for seen in (piece, piece.flip(-1)):
            similarity, rows = (flat @ seen.flatten(1).T).max(-1)
            better = similarity > best
            best[better], twins[better] = similarity[better], rows[better] + start
    ids = (best > threshold).nonzero().squeeze(1)
    return Leaks(ids, twins[ids], best[ids], len(test))
