"""Checks of every export: what its layout lacks is refused, and what is read back must compute the same."""

import torch
from torch import Tensor

from sslvit.errors import DataError
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT

CLOSE, CLOSE_ONNX = 1e-5, 1e-4  # relative to the largest output


def compare(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], limit: float, what: str) -> float:
    """The largest difference, relative to the largest output; an error if it is above the limit."""
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        if mine.shape != other.shape:
            raise DataError(f"{what} has outputs of shape {tuple(other.shape)}, not {tuple(mine.shape)}: not written")
        if not other.isfinite().all():
            raise DataError(f"{what}, read back, has outputs that are not finite: not written")
        worst = max(worst, ((mine - other).abs().max() / mine.abs().max().clamp(min=1e-12)).item())
    if not worst <= limit:
        raise DataError(f"{what}, read back, differs by {worst:.1e} of the largest output: not written")
    return worst


def sample(backbone: ViT | BiT, size: tuple[int, int], count: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(count, backbone.channels, *size, generator=draw)


def elsewhere(backbone: ViT, theirs: str, rule: str) -> str:
    """A note if other code resizes positions by another rule."""
    resize = backbone.config.position_resize
    if backbone.position in ("none", "relative") or resize == rule:
        return ""
    return f" At other image sizes {theirs} resizes positions its own way, this model {resize}."


def refuse(backbone: ViT | BiT, layout: str, lacks: dict[str, bool]) -> None:
    """lacks: features that the layout does not have, and whether this backbone needs them."""
    if reasons := [reason for reason, needed in lacks.items() if needed]:
        raise ValueError(f"{layout} has no {', no '.join(reasons)}, which this {backbone.name} needs")
