"""Objectives trained by several processes of gloo, each on its rows of each batch."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import preloaded
import torch
import torch.distributed as dist
from objectives_zoo import OBJECTIVES, batch_of
from torch.nn.parallel import DistributedDataParallel

from sslvit.objectives.objective import Batch


class Plan(NamedTuple):
    names: tuple[str, ...]  # of OBJECTIVES
    processes: int
    images: int  # of a batch over all of them
    steps: int
    device: str = "cpu"  # of all of them


def trained_together(plan: Plan, folder: Path) -> dict[str, list[float]]:
    """The losses of each objective by step, means over processes."""
    preloaded.spawn(train, (tuple(plan), folder), nprocs=plan.processes)  # unpickled before this is imported
    return json.loads((folder / "losses.json").read_text())


def train(rank: int, numbers: tuple, folder: Path) -> None:
    """In float64: some objectives make 1e-5 of float32's rounding within these steps."""
    torch.set_num_threads(1)
    plan = Plan(*numbers)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=plan.processes)
    losses = {}
    for name in plan.names:
        case = OBJECTIVES[name]
        objective = case.make(0).double().to(plan.device)
        model = DistributedDataParallel(objective)
        optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
        losses[name] = []
        for step in range(plan.steps):
            batch = batch_of(case, step, plan.images, torch.float64, plan.device)
            mine = slice(rank * plan.images // plan.processes, (rank + 1) * plan.images // plan.processes)
            part = Batch(tuple(view[mine] for view in batch.views), batch.key[mine], batch.labels[mine])
            loss, _ = model(part, step / plan.steps)
            loss.backward()
            for parameter in objective.frozen_parameters(step / plan.steps):
                parameter.grad = None
            optimizer.step()
            optimizer.zero_grad()
            objective.after_step((step + 1) / plan.steps)
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses[name].append(total.item() / plan.processes)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()
    os._exit(0)  # threads of torch can abort a process while its interpreter is taken down
