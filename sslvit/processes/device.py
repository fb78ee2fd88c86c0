"""Copies to and from a device for which the host does not wait.

An ordinary copy waits until the device has done all that was asked of it before, and leaves it idle afterwards. One
from or to pinned memory is queued like any other operation.
"""

from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Tree = TypeVar("Tree")


def send(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on this device, which may be its own."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def send_together(tree: Tree, device: torch.device) -> Tree:
    """Tensors on the CPU, in tuples and lists, in one copy. What is no tensor stays."""
    leaves, form = tree_flatten(tree)
    if all(leaf.device == device for leaf in leaves if isinstance(leaf, Tensor)):
        return tree
    return tree_unflatten(in_one_copy(leaves, device), form)


def in_one_copy(leaves: list, device: torch.device) -> list:
    leaves = [*leaves]
    # Numbers of eight bytes come first, then those of four and of one: so each begins at a multiple of its bytes.
    places = sorted((i for i, x in enumerate(leaves) if isinstance(x, Tensor)), key=lambda i: -leaves[i].itemsize)
    pieces = [leaves[i].contiguous().view(-1).view(torch.uint8) for i in places]
    sizes = [len(piece) for piece in pieces]
    joined = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    torch.cat(pieces, out=joined)
    for i, piece in zip(places, send(joined, device).split(sizes), strict=True):
        leaves[i] = piece.view(leaves[i].dtype).view(leaves[i].shape)
    return leaves


class Fetched:
    """Numbers on their way to the host, which waits for them when it reads them, and not for what is queued later."""

    def __init__(self, values: Tensor):
        self.values = values
        self.arrived: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> Tensor:
        """Once, on the CPU: pinned memory is for what is on its way."""
        if self.arrived is None:
            return self.values
        self.arrived.synchronize()
        return self.values.clone()
