"""Sinkhorn and Knopp's assignment of samples to outputs, over the samples of all processes, as in SwAV and DINOv2."""

import torch
from torch import Tensor

from sslvit.models.blocks import at_least_float32
from sslvit.processes import collectives


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Probabilities of each sample by which all outputs are used about equally: m k -> m k

    exp(logits / temperature), whose columns are divided by their sums over all processes, and then rows by their own,
    `rounds` times, so that in the end each sample sums to 1. Processes may have different numbers of samples, or none.
    """
    logits, kind = logits.double(), at_least_float32(logits.dtype)  # float32 has no exp(-100), which would be 0 / 0
    mine = logits.max() if logits.numel() else logits.new_full((), -torch.inf)
    shares = ((logits - collectives.all_gather(mine.view(1)).max()) / temperature).exp()  # of the largest: no overflow
    for _ in range(rounds):
        totals = collectives.all_mean(shares.sum(0)) * collectives.processes()
        shares = shares / totals.clamp(min=torch.finfo(shares.dtype).tiny)
        shares = shares / shares.sum(1, keepdim=True)
    return shares.to(kind)
