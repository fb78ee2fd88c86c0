"""Models of which every weight is random, so that none can be mistaken for another."""

from typing import Any

import torch

from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig

ABOUT = {"readout": "mean", "objective": "MPP", "data": "noise"}
SMALL = {"image_size": 16, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}


def vit(**changes) -> ViT:
    """With weights unlike any start's: LayerScale, norms and registers too."""
    made = ViT(ViTConfig(**({"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 4} | changes)))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return made.eval()


def make(readout: str = "cls", **changes: Any) -> tuple[ViT, str]:
    """Every weight at random, so that none can be mistaken for another."""
    vit = ViT(ViTConfig(**(SMALL | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return vit.eval(), readout
