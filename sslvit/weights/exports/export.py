"""Exports of a backbone: timm's layout (a model folder), transformers', torchvision's, ONNX and torch.export.

An export is written only if it computes what the backbone computes after it is read back.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sslvit.errors import CannotWrite
from sslvit.models.readout import Classifier
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.storage import durable
from sslvit.weights.exports.clip import as_timm_clip, as_transformers_clip
from sslvit.weights.exports.layouts import as_timm, as_torchvision, as_transformers
from sslvit.weights.exports.offsets import as_timm_beit, as_transformers_beit
from sslvit.weights.exports.programs import as_onnx, as_torch_export
from sslvit.weights.exports.rotary import as_timm_dinov3, as_transformers_dinov3

PROGRAMS: dict[str, Callable[..., str]] = {"onnx": as_onnx, "torch_export": as_torch_export}
FORMATS: dict[str, Callable[..., str]] = {
    "timm": as_timm,
    "transformers": as_transformers,
    "torchvision": as_torchvision,
    **PROGRAMS,
}
ROTARY: dict[str, Callable[..., str]] = {"timm": as_timm_dinov3, "transformers": as_transformers_dinov3}
OFFSETS: dict[str, Callable[..., str]] = {"timm": as_timm_beit, "transformers": as_transformers_beit}
TOWERS: dict[str, Callable[..., str]] = {"timm": as_timm_clip, "transformers": as_transformers_clip}


def export(
    model: ViT | BiT | Classifier, about: dict[str, Any], out: str | Path, to: str, *, any_size: bool = False
) -> str:
    """Writes a new folder, and reports its content and its largest error. about: as from open_backbone.

    to: one of FORMATS. any_size: a program (onnx, torch_export) for images of any size that is a multiple of the patch.
    """
    out = Path(out).resolve()  # or else `new/../old` would be two different folders
    if to not in FORMATS:
        raise ValueError(f"--to must be one of {', '.join(FORMATS)}, got {to}")
    if any_size and to not in PROGRAMS:
        raise ValueError(f"--any_size is for onnx and torch_export: a model in {to}'s layout resizes by its own rules")
    if isinstance(model, Classifier) and to in ("transformers", "torchvision"):
        raise ValueError(f"--to {to}: a classifier's head can only be exported to timm, onnx or torch_export")
    backbone = model.backbone if isinstance(model, Classifier) else model
    write, options = FORMATS[to], {"any_size": any_size} if to in PROGRAMS else {}
    if isinstance(backbone, ViT) and backbone.position == "rope":
        write = ROTARY.get(to, write)
    elif isinstance(backbone, ViT) and backbone.position == "relative_bias":
        write = OFFSETS.get(to, write)
    elif isinstance(backbone, ViT) and backbone.config.stem_norm:
        write = TOWERS.get(to, write)
    try:
        if out.exists() and (not out.is_dir() or os.listdir(out)):
            raise CannotWrite(f"{out} exists: choose another place")
        with durable.whole_folder(out, replace=False) as folder, torch.no_grad():
            return write(model.eval(), about, folder, **options).replace("{out}", str(out))
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(f"{out}: the export was not written: {error.strerror or error}") from error
