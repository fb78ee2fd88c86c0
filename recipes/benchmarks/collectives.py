"""What the processes of a step tell each other: how many collectives, and how many bytes each process puts into them.

    python recipes/benchmarks/collectives.py --processes 64 --batch-size 4096

Counted on one CPU core with torch's fake process group, which talks to nobody: every objective takes a step as rank 0
of so many processes, with the paper's heads and a tiny backbone, since what is exchanged beside gradients depends on
heads and batch alone. Gradients are of all trained weights: 4 bytes each, which DDP averages once per step in pieces of
25 MB; the table of backbones is arithmetic.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch.testing._internal.distributed.fake_pg import FakeStore

from sslvit import rng
from sslvit.models.vit import ViT
from sslvit.models.vit_config import variant
from sslvit.objectives.data2vec import Data2Vec
from sslvit.objectives.dino import DINO
from sslvit.objectives.dinov2 import DINOv2
from sslvit.objectives.ibot import IBOT
from sslvit.objectives.ijepa import IJEPA
from sslvit.objectives.lejepa import LeJEPA
from sslvit.objectives.mae import MAE
from sslvit.objectives.moco_v3 import MoCoV3
from sslvit.objectives.mpp import MPP
from sslvit.objectives.objective import Batch, Objective
from sslvit.objectives.simclr import SimCLR
from sslvit.objectives.simmim import SimMIM
from sslvit.objectives.supervised import Supervised
from sslvit.objectives.vicreg import VICReg
from sslvit.processes.collectives import Means
from sslvit.reports.run import markdown_table

SIZE, SMALL = 64, 32
COUNTED = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor")
DINO_HEADS: dict[str, Any] = {"hidden": 2048, "bottleneck": 256, "outputs": 65536}


def vit(**changes: Any) -> ViT:
    return ViT.variant("mu/8", image_size=SIZE, **changes)


CASES: dict[str, tuple[Callable[[], Objective], tuple[int, ...]]] = {
    "mpp": (lambda: MPP(vit()), (SIZE,)),
    "mae": (lambda: MAE(vit(position="sincos_mae")), (SIZE,)),
    "simmim": (lambda: SimMIM(vit()), (SIZE,)),
    "moco_v3": (lambda: MoCoV3(vit()), (SIZE, SIZE)),
    "simclr": (lambda: SimCLR(vit()), (SIZE, SIZE)),
    "vicreg": (lambda: VICReg(vit(), dimension=8192), (SIZE, SIZE)),
    "lejepa": (lambda: LeJEPA(vit()), (SIZE,) * 2 + (SMALL,) * 6),
    "dino": (lambda: DINO(vit(), drop_path=0.0, **DINO_HEADS), (SIZE,) * 2 + (SMALL,) * 8),
    "ibot": (lambda: IBOT(vit(), **DINO_HEADS), (SIZE,) * 2 + (SMALL,) * 8),
    "dinov2, Sinkhorn": (lambda: DINOv2(vit(), assignment="sinkhorn", **DINO_HEADS), (SIZE,) * 2 + (SMALL,) * 8),
    "ijepa": (lambda: IJEPA(vit(class_token=False, position="sincos_mae")), (SIZE,)),
    "data2vec": (lambda: Data2Vec(vit()), (SIZE,)),
    "supervised": (lambda: Supervised(vit(), classes=1000), (SIZE,)),
}


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that this process puts into each collective inside."""
    sizes: list[int] = []

    def counting(name: str, real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            mine = args[1] if name.startswith(("all_gather", "reduce_scatter")) else args[0]
            sizes.append(mine.numel() * mine.element_size())
            return real(*args, **kwargs)

        return call

    before = {name: getattr(dist, name) for name in COUNTED}
    for name, real in before.items():
        setattr(dist, name, counting(name, real))
    try:
        yield sizes
    finally:
        for name, real in before.items():
            setattr(dist, name, real)


def step(name: str, images: int) -> tuple[int, int, int]:
    """Collectives of a step beside gradients, their bytes, and the bytes of the heads' gradients."""
    make, sizes = CASES[name]
    objective = make().train()
    views = tuple(torch.rand(images, 3, size, size) for size in sizes)
    batch = Batch(views, rng.key(0, torch.arange(images)), torch.arange(images))
    with counted() as found:
        loss, metrics = objective(batch, 0.5)
        loss.backward()
        objective.after_step(0.5)
        Means({"loss": loss.detach()} | metrics).read()  # as the loop does once per step
    learner = {id(p) for p in objective.learner.parameters()}
    heads = sum(p.numel() for p in objective.parameters() if p.requires_grad and id(p) not in learner)
    return len(found), sum(found), 4 * heads


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.3g}" if size < 1e9 else f"{size / 1e6:,.0f}"


def main(processes: int = 64, batch_size: int = 4096) -> None:
    """Print the two tables."""
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    rows = []
    for name in CASES:
        number, size, heads = step(name, batch_size // processes)
        rows.append([name, str(number), megabytes(size), megabytes(heads)])
    header = ["objective", "collectives per step", "MB that a process puts in", "MB of its heads' gradients"]
    print("\n".join(markdown_table(header, rows)), end="\n\n")
    rows = []
    for name in ("S/16", "B/16", "L/16", "H/14"):
        weights = sum(p.numel() for p in on_no_device(name).parameters())
        rows.append([name, f"{weights / 1e6:,.0f}", megabytes(4 * weights), megabytes(8 * weights + 4 * weights)])
    header = ["backbone", "million weights", "DDP: MB of gradients", "FSDP2: MB of weights, twice, and gradients"]
    print("\n".join(markdown_table(header, rows)))
    dist.destroy_process_group()


def on_no_device(name: str) -> ViT:
    with torch.device("meta"):
        return ViT(variant(name, image_size=224))


if __name__ == "__main__":
    tyro.cli(main)
