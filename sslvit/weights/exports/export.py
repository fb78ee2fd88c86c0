"""A backbone in the layouts of others: transformers' own, torchvision's, ONNX, torch.export.

timm's layout is the model folder itself (sslvit.weights.folder). Nothing counts as written before it has been read back
and has computed what the backbone computes.
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
from sslvit.weights.exports.layouts import as_timm, as_torchvision, as_transformers
from sslvit.weights.exports.programs import as_onnx, as_torch_export

FORMATS: dict[str, Callable[..., str] | None] = {
    "timm": None,
    "transformers": as_transformers,
    "torchvision": as_torchvision,
    "onnx": as_onnx,
    "torch_export": as_torch_export,
}


def export(
    model: ViT | BiT | Classifier, about: dict[str, Any], out: str | Path, to: str, *, any_size: bool = False
) -> str:
    """Writes a new folder, and says what is in it and how near it came. about: as open_backbone gives it.

    to: one of FORMATS. any_size: a program (onnx, torch_export) for images of any size that is a multiple of the patch.
    """
    out = Path(out).resolve()  # or `new/../old` would name a folder that is looked for elsewhere
    if to not in FORMATS:
        raise ValueError(f"--to {to}: choose one of {', '.join(FORMATS)}")
    if any_size and to not in ("onnx", "torch_export"):
        raise ValueError(f"--any_size is for onnx and torch_export: a model in {to}'s layout resizes by its own rules")
    if isinstance(model, Classifier) and to in ("transformers", "torchvision"):
        raise ValueError(f"{to}: a classifier's head has no place there yet; export it to onnx or torch_export")
    model = model.eval()
    try:
        if out.exists() and (not out.is_dir() or os.listdir(out)):
            raise CannotWrite(f"{out} exists: choose another place")
        with durable.whole_folder(out, replace=False) as folder, torch.no_grad():
            if (write := FORMATS[to]) is None:
                return as_timm(model, about, folder).replace("{out}", str(out))
            return write(model, about["readout"], folder, any_size).replace("{out}", str(out))
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(f"{out}: the export was not written: {error.strerror or error}") from error
