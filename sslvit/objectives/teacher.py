"""Teachers: a frozen copy of a module, moved towards the original by an exponential moving average."""

from copy import deepcopy

import torch
from torch import nn


def frozen_copy(module: nn.Module) -> nn.Module:
    """The same weights, without gradients."""
    return deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameters only: buffers are each network's own."""
    mine, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
    if mine.keys() - theirs.keys():
        raise ValueError(f"the student lacks the teacher's parameters {sorted(mine.keys() - theirs.keys())}")
    torch._foreach_lerp_(list(mine.values()), [theirs[name].detach() for name in mine], 1 - momentum)
