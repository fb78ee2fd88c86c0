"""How far and in how many directions features differ: what every objective reports of its backbone's readout.

training/watch.py says what these numbers mean, and judges them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def deviation(features: Tensor) -> Tensor:
    """The standard deviation over the batch of l2-normalised features, times sqrt(d): b d -> ()"""
    unit = F.normalize(features.float(), dim=-1)
    return unit.std(0, correction=0).mean() * unit.shape[-1] ** 0.5


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """b d -> ()"""
    unit = F.normalize(features.float(), dim=-1)
    centred = unit - unit.mean(0)
    b, d = centred.shape
    gram = centred @ centred.mT if b < d else centred.mT @ centred  # their eigenvalues are the same
    return gram.trace().square() / gram.square().sum().clamp(min=1e-30)


def spread(features: Tensor) -> dict[str, Tensor]:
    """What every objective reports of its backbone's readout: b d"""
    return {"feature_std": deviation(features), "effective_rank": effective_rank(features)}
