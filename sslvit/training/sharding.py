"""Training whose weights, gradients and moments are split among the processes (FSDP2), for models that need it.

The loop trains a sharded copy; the objective that it was given stays whole, and takes the copy's weights before it is
evaluated or saved. So a checkpoint is the same with and without, and either goes on from the other's.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from sslvit.config import TrainConfig
from sslvit.models.blocks import Block
from sslvit.objectives.objective import Batch, Objective
from sslvit.processes import collectives


def wanted(config: TrainConfig, accelerator: Accelerator) -> bool:
    """By --shard or by `accelerate launch`, and possible."""
    if not (config.shard or collectives.launched_to_shard()):
        return False
    if accelerator.mixed_precision == "fp16":
        raise ValueError("--shard with --precision fp16 would need one scale for all shares: use bf16, or no")
    if accelerator.num_processes == 1:
        accelerator.print("warning: --shard has no effect with a single process")
        return False
    return True


def sharded(objective: Objective, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Objective:
    """A copy of the objective, of which every process holds its share: each block by itself, the rest together. From
    here on the optimizer, with the moments that it has, moves the copy."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Of the devices that train: without a mesh torch takes a machine's GPUs, also for a run on its CPU.
    mesh, parts = init_device_mesh(accelerator.device.type, (accelerator.num_processes,)), copy.deepcopy(objective)
    for module in parts.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(parts, mesh=mesh)
    # Inside the hooks of FSDP, which a wrapper around the module would be outside of.
    parts.forward = partial(under_autocast, parts.forward, accelerator)  # type: ignore[method-assign]
    names = {parameter: name for name, parameter in objective.named_parameters()}
    shares = dict(parts.named_parameters())
    for parameter in list(optimizer.state):
        share = shares[names[parameter]]
        optimizer.state[share] = {key: like(share, value) for key, value in optimizer.state.pop(parameter).items()}
    for group in optimizer.param_groups:
        group["params"] = [shares[names[parameter]] for parameter in group["params"]]
    return parts


def is_split(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync")


def like(share: Any, value: Tensor) -> Tensor:
    """This process's share of a moment; counts of steps stay whole."""
    from torch.distributed.tensor import distribute_tensor

    if value.shape != share.shape:
        return value
    return distribute_tensor(value, share.device_mesh, share.placements, src_data_rank=None)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which everybody may have a share, for the first process: whole, and in its main memory, one by one.
    Called by all processes, or by none; others get only what is whole anyway. What nobody splits stays as it is."""
    if not any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
        return tensors
    gathered = {}
    # Everybody must gather the same one at a time, and tensors that were read from a file have no order of their own.
    for name, tensor in sorted(tensors.items()):
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if full is tensor or collectives.rank() == 0:
            gathered[name] = full.cpu()
    return gathered


def under_autocast(forward: Callable, accelerator: Accelerator, batch: Batch, progress: float) -> Any:
    with accelerator.autocast():
        return forward(batch, progress)


def evaluate_whole(evaluate: Callable, trained: Objective, objective: Objective) -> dict[str, float]:
    collect(trained, objective)
    return evaluate(objective.backbone)


def collect(parts: Objective, into: Objective) -> None:
    """Weights and buffers of the copy, one by one, on every process."""
    if parts is into:
        return
    targets = into.state_dict()
    for name, tensor in sorted(parts.state_dict().items()):
        targets[name].copy_(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)


def clip(parameters: Sequence[nn.Parameter], most: float, each: float) -> Tensor:
    """Scales gradients down to a global norm of `most`, then each to a norm of `each`, unless that is 0. Returns the
    global norm as it was. (torch's own, on shares, is off by 2e-4 where a parameter has fewer rows than there are
    processes.)"""
    shares = [p.grad.to_local() for p in parameters]
    squares = torch.stack([share.float().square().sum() for share in shares])
    dist.all_reduce(squares)
    norm = squares.sum().sqrt()
    scale = (most / (norm + 1e-6)).clamp(max=1)
    torch._foreach_mul_(shares, scale)
    if each:
        torch._foreach_mul_(shares, [(each / (n + 1e-6)).clamp(max=1) for n in squares.sqrt() * scale])
    return norm
