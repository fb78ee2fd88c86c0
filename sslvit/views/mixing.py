"""Mixup (https://arxiv.org/abs/1710.09412) and cutmix (https://arxiv.org/abs/1905.04899).

Every two neighbours in a batch are mixed with each other, by one draw per pair. The papers' code draws once per batch,
on each process, and mixes it with itself rolled or reversed, so that the number of processes changes the loss. In mixup
a pair has both shares, s of the one and 1 - s of the other, so plain ViT's rule that the larger share is a sample's own
changes nothing here.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from sslvit import rng
from sslvit.processes.device import send, send_together

TRIES = 64  # a draw of Beta(a, a), a <= 1, fails half the time at most


def targets(labels: Tensor, classes: int, smoothing: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class numbers, b -> probabilities, b k; `smoothing` of the mass is spread over all classes."""
    return F.one_hot(labels, classes).to(dtype) * (1 - smoothing) + smoothing / classes


def mix_pairs(images: Tensor, truth: Tensor, key: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Images 0 and 1, 2 and 3, ... with each other, by the key of the first of them: b c H W, b k -> b c H W, b k"""
    if len(images) % 2:
        raise ValueError(f"{len(images)} images per process: mixup and cutmix need pairs, an even number")
    kind = torch.promote_types(images.dtype, torch.float32)
    own = shares(key[::2], images.shape[-2:], mixup, cutmix, kind, images.device)
    own = rearrange(own, "b H W -> b 1 1 H W")
    pairs = rearrange(images, "(b two) c H W -> b two c H W", two=2)
    images = rearrange(pairs * own + pairs.flip(1) * (1 - own), "b two c H W -> (b two) c H W")
    share = reduce(own, "b 1 1 H W -> b 1 1", "mean")
    pairs = rearrange(truth, "(b two) k -> b two k", two=2)
    return images, rearrange(pairs * share + pairs.flip(1) * (1 - share), "b two k -> (b two) k")


def shares(
    key: Tensor,
    size: tuple[int, int],
    mixup: float,
    cutmix: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """How much of each pixel is the image's own, on a device: b -> b H W. Mixup: the same everywhere. Cutmix: 1 but 0
    in a box."""
    device = device or key.device
    height, width = size
    cut = rng.uniform(rng.fold(key, "switch")) < (0.5 if mixup and cutmix else float(cutmix > 0))
    even = beta(rng.fold(key, "share"), mixup).to(dtype) if mixup else torch.ones(len(key), device=key.device).to(dtype)
    if not cutmix:
        return send(even, device)[:, None, None].expand(-1, height, width)
    # A box of 1 - s of the area around a random pixel, cut off at the edges: then its share is what is left of it.
    side = (1 - beta(rng.fold(key, "box share"), cutmix).to(dtype)).sqrt()
    center = rng.uniform(rng.fold(key, "centre"), 2).to(dtype)
    even, cut, side, center = send_together((even, cut, side, center), device)
    rows, columns = (
        # Distances in shares of the length, between the middles of pixels and that of the box.
        ((torch.arange(length, device=device, dtype=dtype) + 0.5) / length - middle[:, None]).abs() < side[:, None] / 2
        for length, middle in zip(size, center.unbind(-1), strict=True)
    )
    box = rearrange(rows, "b H -> b H 1") & rearrange(columns, "b W -> b 1 W")
    return torch.where(cut[:, None, None], (~box).to(even.dtype), even[:, None, None])


def beta(key: Tensor, alpha: float) -> Tensor:
    """One draw of Beta(alpha, alpha), alpha <= 1, per key, by Jöhnk's rejection, in float64: the first x, y with
    x + y <= 1 of x = u^(1 / alpha), y = v^(1 / alpha) gives x / (x + y)."""
    x, y = (rng.uniform(key, TRIES, 2).double() ** (1 / alpha)).unbind(-1)
    good = (x + y <= 1) & (x + y > 0)
    first = good.to(torch.uint8).argmax(-1, keepdim=True)
    return (x / (x + y)).gather(-1, first).squeeze(-1)
