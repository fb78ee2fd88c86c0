"""The cost of training, shown beside every result: images, seconds, floating-point operations, memory."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from sslvit import rng
from sslvit.data.loader import Views
from sslvit.data.source import Samples
from sslvit.objectives.objective import Batch, Objective
from sslvit.processes.system import resource
from sslvit.storage import sealed
from sslvit.storage.sealed import NUMBER
from sslvit.training.state import RunState

IMAGES = 2  # batch norm and mixing need two
# The entries of cost.json that a comparison reads.
COST: dict[str, Any] = {
    "images": NUMBER,
    "seconds": NUMBER,
    "flops": NUMBER | None,
    "peak_memory_bytes": NUMBER,
    "device": str,
}


def counting() -> FlopCounterMode:
    """Counts FLOPs inside its `with` block. Some releases of torch (2.14.1) count none for a CPU's fused attention."""

    def forward(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * 2 * query.numel() * key[-2]  # two products

    def backward(grad: torch.Size, query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
        return 5 * 2 * query.numel() * key[-2]  # the first product again, and two for each

    fused = "_scaled_dot_product_flash_attention_for_cpu"
    formulas = {fused: forward, f"{fused}_backward": backward}
    known = {getattr(torch.ops.aten, name): one for name, one in formulas.items() if hasattr(torch.ops.aten, name)}
    return FlopCounterMode(display=False, custom_mapping=known)


def flops_per_image(objective: Objective, views: Views, samples: Samples, device: torch.device) -> float | None:
    """Of a step's forward and backward passes, teachers included: matrix products, convolutions and attention, with
    multiplications and additions counted separately. Counted on a copy; None if the device has no memory for it."""
    key = rng.key(0, torch.arange(IMAGES))
    rows = torch.arange(IMAGES) % len(samples.pixels)
    extents = None if samples.extents is None else samples.extents[rows]
    labels = None if samples.labels is None else samples.labels[rows].to(device)
    try:
        measured = copy.deepcopy(objective).train()
        with counting() as counter:
            loss, _ = measured(Batch(views(samples.pixels[rows].to(device), key, extents), key, labels), 0.0)
            loss.backward()
    except torch.OutOfMemoryError:
        return None
    return counter.get_total_flops() / IMAGES


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has used at most: on the GPU if it trains there, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # a process inherits its parent's ru_maxrss
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        scale = 1 if os.uname().sysname == "Darwin" else 1024
        return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_cost(file: Path, images: int, state: RunState, accelerator: Accelerator) -> None:
    device, seconds, flops = accelerator.device, state.seconds, state.flops
    cost: dict[str, Any] = {
        "images": images,
        "seconds": seconds,
        "images_per_second": images / seconds if seconds else None,
        "flops_per_image": flops,
        "flops": None if flops is None else flops * images,
        "peak_memory_bytes": state.memory,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
    }
    sealed.write(file, cost)
