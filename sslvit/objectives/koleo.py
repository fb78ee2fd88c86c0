"""KoLeo (https://arxiv.org/abs/1806.03198): how near the features of different images are, to keep them apart."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit.models.blocks import at_least_float32


def nearest(features: Tensor, group: int) -> Tensor:
    """The distance of each to the nearest other one of its group, all of length 1: b d -> b; without one, nothing.

    In groups of consecutive rows, the last of what is left.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.to(at_least_float32(features.dtype)), dim=-1, eps=1e-8)
        distances = []
        for rows in unit.split(group):
            if len(rows) > 1:
                cosines = (rows @ rows.T).detach().fill_diagonal_(-2)
                distances.append(F.pairwise_distance(rows, rows[cosines.argmax(1)], eps=1e-8))
        return torch.cat(distances) if distances else unit.new_zeros(0)
