"""What every export is held to: what it cannot hold is refused, what is read back computes the same."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslvit.errors import DataError
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.storage import durable

CLOSE, CLOSE_ONNX = 1e-5, 1e-4  # of the largest output


def compare(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], limit: float, what: str) -> float:
    """The largest difference, in parts of the largest output; an error if it is above the limit."""
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        if mine.shape != other.shape:
            raise DataError(f"{what} gives outputs of shape {tuple(other.shape)}, not {tuple(mine.shape)}: not written")
        if not other.isfinite().all():
            raise DataError(f"{what}, read back, gives numbers that are not finite: not written")
        worst = max(worst, ((mine - other).abs().max() / mine.abs().max().clamp(min=1e-12)).item())
    if not worst <= limit:
        raise DataError(f"{what}, read back, computes otherwise by {worst:.1e} of the largest output: not written")
    return worst


def sample(backbone: ViT | BiT, size: tuple[int, int], count: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(count, backbone.channels, *size, generator=draw)


def elsewhere(backbone: ViT, theirs: str, rule: str) -> str:
    """What is the same only at the size of the images it was trained on."""
    if backbone.position in ("none", "relative") or backbone.position_resize == rule:
        return ""
    return f" At other image sizes {theirs} resizes positions its own way, this model {backbone.position_resize}."


def refuse(backbone: ViT | BiT, layout: str, lacks: dict[str, bool]) -> None:
    """lacks: what a layout does not have, and whether this backbone needs it."""
    if reasons := [reason for reason, needed in lacks.items() if needed]:
        raise ValueError(f"{layout} has no {', no '.join(reasons)}, which this {backbone.name} needs")


def write_json(file: Path, content: dict[str, Any]) -> None:
    durable.write(file, [(json.dumps(content, indent=2) + "\n").encode()])
