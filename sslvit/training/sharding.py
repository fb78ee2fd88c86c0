"""Training whose weights, gradients and moments are split among the processes (FSDP2), for models that need it.

The loop trains a sharded copy; the original objective stays whole, and takes the copy's weights before it is evaluated
or saved. So checkpoints are the same with and without sharding, and either continues from the other's.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from sslvit.config import TrainConfig
from sslvit.models.blocks import Block
from sslvit.objectives.objective import Objective
from sslvit.processes import collectives


def wanted(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Whether --shard or `accelerate launch` asks for it, and it is possible."""
    if not (config.shard or collectives.launched_to_shard()):
        return False
    if accelerator.mixed_precision == "fp16":
        raise ValueError("--shard with --precision fp16 would need one scale for all shards: use bf16, or no")
    if accelerator.num_processes == 1:
        accelerator.print("warning: --shard has no effect with a single process")
        return False
    return True


def sharded(objective: Objective, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Objective:
    """A copy of the objective, split among the processes: each block by itself, the rest together. From here on the
    optimizer, with its moments, moves the copy."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Of the devices that train: without a mesh torch takes a machine's GPUs, also for a run on its CPU.
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    trained = copy.deepcopy(objective)
    for module in trained.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(trained, mesh=mesh)
    # Inside the hooks of FSDP: a wrapper around the module would be outside of them.
    trained.forward = accelerator.autocast()(trained.forward)  # type: ignore[method-assign]
    names = {parameter: name for name, parameter in objective.named_parameters()}
    shards = dict(trained.named_parameters())
    for parameter in list(optimizer.state):
        shard = shards[names[parameter]]
        optimizer.state[shard] = {key: like(shard, value) for key, value in optimizer.state.pop(parameter).items()}
    for group in optimizer.param_groups:
        group["params"] = [shards[names[parameter]] for parameter in group["params"]]
    return trained


def like(shard: Any, value: Tensor) -> Tensor:
    """This process's shard of a moment; counts of steps stay whole."""
    from torch.distributed.tensor import distribute_tensor

    if value.shape != shard.shape:
        return value
    return distribute_tensor(value, shard.device_mesh, shard.placements, src_data_rank=None)


def full(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor  # which takes a second

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those that are split whole, in main memory and for the first process only; the others as they are.
    Called by all processes."""
    if collectives.processes() == 1:
        return tensors
    # All processes must gather the same one at a time, and tensors that were read from a file come in any order.
    gathered = {}
    for name, tensor in sorted(tensors.items()):
        complete = full(tensor)
        if complete is tensor:
            gathered[name] = tensor
        elif collectives.rank() == 0:
            gathered[name] = complete.cpu()
        del complete  # one at a time
    return gathered


def collect(trained: Objective, objective: Objective) -> None:
    """Takes the weights and buffers of the copy, one by one, on every process."""
    if trained is objective:
        return
    targets = objective.state_dict()
    for name, tensor in sorted(trained.state_dict().items()):
        targets[name].copy_(full(tensor))


def clip(parameters: Sequence[nn.Parameter], most: float, each: float) -> Tensor:
    """Scales gradients down to a global norm of `most`, then each to a norm of `each`, unless that is 0. Returns the
    global norm as it was. (torch's own is off by 2e-4 on shards where a parameter has fewer rows than there are
    processes.)"""
    shards = [p.grad.to_local() for p in parameters]
    squares = torch.stack([shard.float().square().sum() for shard in shards])
    dist.all_reduce(squares)
    norm = squares.sum().sqrt()
    scale = (most / (norm + 1e-6)).clamp(max=1)
    torch._foreach_mul_(shards, scale)
    if each:
        torch._foreach_mul_(shards, [(each / (n + 1e-6)).clamp(max=1) for n in squares.sqrt() * scale])
    return norm
