"""Kernels of a training step and of its views, counted without a GPU: python tests/support/kernels.py

A step is forward, backward, AdamW (fused) and the teacher's move, of a ViT of 12 blocks; how wide it is and how large
its images are makes no other kernels. Forward and the teacher are counted on a device that is not there, backward and
AdamW on the CPU, where an operation is a kernel too. What is drawn on the host is counted apart.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from fake_device import Count, FakeDevice, moved, on_device
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.dino import DINO
from sslvit.objectives.mae import MAE
from sslvit.objectives.moco_v3 import MoCoV3
from sslvit.objectives.mpp import MPP
from sslvit.objectives.objective import Batch, Objective
from sslvit.objectives.supervised import Supervised
from sslvit.views.pretraining import ContrastivePair, CropFlip, MultiCrop
from sslvit.views.supervised import SupervisedView

SIZE, SMALL, IMAGES = 32, 16, 4
VIEWS = {
    "MAE's view": lambda: CropFlip(224),
    "MoCo v3's pair": lambda: ContrastivePair(224),
    "DINO's ten crops": lambda: MultiCrop(224, 96),
    "DeiT's view": lambda: SupervisedView.deit(224),
}


class Counted(NamedTuple):
    kernels: int
    host: int
    faults: int


def vit(**changes) -> ViT:
    sizes = {"image_size": SIZE, "patch_size": 8, "width": 24, "depth": 12, "heads": 3}
    return ViT(ViTConfig(**(sizes | changes)))


OBJECTIVES = {
    "supervised": lambda: Supervised(vit(), classes=10),
    "mpp": lambda: MPP(vit()),
    "mae": lambda: MAE(vit(position="sincos_mae"), decoder_width=24, decoder_heads=3),
    "moco_v3": lambda: MoCoV3(vit(), hidden=32, dimension=16),
    "dino": lambda: DINO(vit(), drop_path=0.0, outputs=64, hidden=32, bottleneck=16),
}


def sizes_of(name: str) -> list[int]:
    return [SIZE] * (2 if name in ("moco_v3", "dino") else 1) + [SMALL] * (8 if name == "dino" else 0)


def views_counted(name: str, images: int = 8, strict: bool = True) -> Counted:
    view, key = VIEWS[name](), rng.key(0, "views", torch.arange(images))
    view(torch.zeros(2, 3, 256, 256, dtype=torch.uint8), key[:2])  # tables that are made once
    with FakeDevice(strict=strict) as device:
        view(torch.empty(images, 3, 256, 256, dtype=torch.uint8, device="cuda"), key)
    return Counted(device.kernels.total(), device.host.total(), len(device.faults))


def backward_and_optimizer(trained: nn.Module, loss: Callable[[], Tensor]) -> tuple[int, int]:
    """The kernels of the second step: of its forward pass, and of the rest."""
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4, fused=True)
    for _ in range(2):  # AdamW makes its moments in the first
        optimizer.zero_grad()
        with Count() as forward:
            value = loss()
        with Count() as rest:
            value.backward()
            optimizer.step()
    return forward.kernels.total(), rest.kernels.total()


def timms_step() -> int:
    model = VisionTransformer(SIZE, 8, embed_dim=24, depth=12, num_heads=3, num_classes=0).train()
    images = torch.rand(IMAGES, 3, SIZE, SIZE)
    return sum(backward_and_optimizer(model, lambda: model(images).mean()))


def batch_of(name: str) -> Batch:
    views = tuple(torch.rand(IMAGES, 3, size, size) for size in sizes_of(name))
    return Batch(views, rng.key(0, torch.arange(IMAGES)), torch.arange(IMAGES))


def step_counted(name: str, strict: bool = True, host_keys: bool = True) -> Counted:
    objective: Objective = OBJECTIVES[name]().train()
    batch = batch_of(name)
    _, rest = backward_and_optimizer(objective, lambda: objective(batch, 0.5)[0])
    objective = OBJECTIVES[name]().train()
    with FakeDevice(strict=strict) as device:
        moved(objective)
        key = batch.key if host_keys else on_device(batch.key)
        there = Batch(on_device(batch.views), key, on_device(batch.labels))
        device.kernels.clear()
        device.host.clear()
        objective(there, 0.5)
        objective.after_step(0.5)
    return Counted(device.kernels.total() + rest, device.host.total(), len(device.faults))


def main(strict: bool = True) -> None:
    bare = timms_step()
    print(f"{'timm, bare':18} {bare:6,} kernels")
    for name in OBJECTIVES:
        counted = step_counted(name, strict, host_keys=strict)
        print(
            f"step of {name:10} {counted.kernels:6,} kernels, {counted.kernels / bare:.2f} of timm's; "
            f"{counted.host:,} on the host, {counted.faults} faults"
        )
    for name in VIEWS:
        counted = views_counted(name, strict=strict)
        print(f"{name:18} {counted.kernels:6,} kernels; {counted.host:,} on the host, {counted.faults} faults")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(strict="--all" not in sys.argv)
