"""A step of DINO with chosen images, and the folder that is kept of it when it is not finite."""

from pathlib import Path

import torch

from sslvit import rng
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.dino import DINO
from sslvit.objectives.objective import Batch, Objective
from sslvit.training.bad_steps import save_bad_step


def vit(**changes) -> ViT:
    return ViT(ViTConfig(**({"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 3} | changes)))


def dino(seed: int = 0) -> DINO:
    return DINO(vit(seed=seed), outputs=32, hidden=32, bottleneck=16, seed=seed)


def part(first: int = 0, b: int = 4) -> tuple[torch.Tensor, Batch]:
    ids = torch.arange(first, first + b)
    views = tuple(rng.uniform(rng.key(view, ids), 3, size, size) for view, size in enumerate((16, 16, *[8] * 10)))
    return 100 + ids, Batch(views, rng.key("forward", ids), ids % 3)


def bad_step(objective: Objective, parts: list, out: Path, step: int = 7, **facts) -> tuple[Path | None, float]:
    losses = [objective(batch, 0.25)[0] for _, batch in parts]
    torch.stack(losses).sum().backward()
    loss = sum(loss.item() for loss in losses) / len(losses)
    return save_bad_step(out, objective, parts, step=step, progress=0.25, seed=3, loss=loss, **facts), loss
