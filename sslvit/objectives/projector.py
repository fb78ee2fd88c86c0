"""The heads of objectives that compare the embeddings of views: linear layers with batch norm between them."""

from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from sslvit.objectives.batch_norm import BatchNorm

End = Literal["norm", "scaled norm", "linear", "linear with bias"]


def projector(*widths: int, generator: torch.Generator, end: End = "norm") -> nn.Sequential:
    """Linear layers of these widths, with batch norm and ReLU between them. A bias in front of a batch norm would be
    subtracted again, so there is none.

    end: what the last layer is followed by, a batch norm without weights (MoCo v3) or with a scale alone (SimCLR), or
    nothing; then it may have a bias.
    """
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):  # torch's layers draw from its global generator when they are made
        for width_in, width_out in pairwise(widths):
            linear, bound = nn.Linear(width_in, width_out, bias=False), width_in**-0.5
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)  # torch's own rule
            layers += [linear, BatchNorm(width_out), nn.ReLU()]
    layers = layers[:-2]
    if end == "linear with bias":
        linear.bias = nn.Parameter(torch.empty(widths[-1]).uniform_(-bound, bound, generator=generator))
    elif end != "linear":
        layers.append(BatchNorm(widths[-1], affine=end == "scaled norm"))
        if end == "scaled norm":
            layers[-1].bias.requires_grad_(False)
    return nn.Sequential(*layers)
