"""A backbone or a classifier as a program that needs none of our code: torch.export's, and ONNX.

It takes images in [0, 1], which it standardises itself, in batches of any size.
"""

import io
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslvit.models.readout import Classifier, read
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.storage import durable, sealed
from sslvit.weights.exports.checks import CLOSE, CLOSE_ONNX, compare, refuse, sample

ANY_SIZE = 64  # patches to a side, of a program for any size


class Reading(nn.Module):
    """What a program computes of images in [0, 1]: the readout and the patches, or a classifier's scores."""

    def __init__(self, model: nn.Module, readout: str):
        super().__init__()
        self.model, self.readout = model, readout

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.model, Classifier):
            return (self.model(images),)
        encoded = self.model(images)
        return read(encoded, self.readout), encoded.patches


def shapes(backbone: ViT | BiT, any_size: bool) -> tuple[Tensor, dict[int, Any], list[Tensor]]:
    """An example, what of it is free, and images to try the program on."""
    free = {0: torch.export.Dim("batch", min=1, max=1 << 16)}
    trials = [sample(backbone, backbone.image_size, count) for count in (1, 5)]
    if not any_size:
        return sample(backbone, backbone.image_size, 2), free, trials
    refuse(backbone, "a program for any size", {"ResNets": isinstance(backbone, BiT)})
    inside = backbone.position == "relative" or backbone.position_at != "stem"
    refuse(backbone, "a program for any size", {"positions in the blocks": inside})
    offset = backbone.position_resize == "bicubic_offset"
    refuse(backbone, "a program for any size", {"positions that are resized as in DINO": offset})
    (p, q), (h, w) = backbone.patch_size, backbone.grid
    free[2] = p * torch.export.Dim("height", min=2, max=ANY_SIZE)
    free[3] = q * torch.export.Dim("width", min=2, max=ANY_SIZE)
    trials += [sample(backbone, (p * (h + 1), q * (w + 3))), sample(backbone, (2 * p, 3 * q))]
    return sample(backbone, (p * (h + 2), q * (w + 1)), 2), free, trials


def program(model: nn.Module, readout: str, any_size: bool) -> tuple[Reading, Tensor, dict, list[Tensor]]:
    backbone = model.backbone if isinstance(model, Classifier) else model
    example, free, trials = shapes(backbone, any_size)
    return Reading(model, readout).eval(), example, {"images": free}, trials


def described(model: nn.Module, reading: Reading, any_size: bool) -> dict[str, Any]:
    backbone = model.backbone if isinstance(model, Classifier) else model
    outputs = ["scores"] if isinstance(model, Classifier) else ["features", "patches"]
    size = f"any multiple of the patch, 2 to {ANY_SIZE} patches a side" if any_size else list(backbone.image_size)
    about = {"model": backbone.name, "inputs": {"images": f"b {backbone.channels} H W in [0, 1]"}, "outputs": outputs}
    patch = {"patch_size": list(backbone.patch_size)} if isinstance(backbone, ViT) else {}
    return about | {"readout": reading.readout, "image_size": size} | patch


def as_torch_export(model: nn.Module, readout: str, folder: Path, any_size: bool) -> str:
    reading, example, free, trials = program(model, readout, any_size)
    made = torch.export.export(reading, (example,), dynamic_shapes=free)
    written = io.BytesIO()  # torch's own writing to a full disk ends the process
    torch.export.save(made, written)
    durable.write(folder / "model.pt2", [written.getvalue()])
    found = torch.export.load(folder / "model.pt2").module()
    worst = max(compare(reading(images), found(images), CLOSE, "the exported program") for images in trials)
    sealed.write(folder / "model.json", described(model, reading, any_size))
    return (
        f"{{out}}/model.pt2: torch.export.load('{{out}}/model.pt2').module()(images in [0, 1]), any batch; it computes "
        f"the same to {worst:.0e}. What goes in and comes out is in model.json."
    )


def as_onnx(model: nn.Module, readout: str, folder: Path, any_size: bool) -> str:
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]:
        raise ValueError(f"--to onnx needs {', '.join(missing)}: pip install 'sslvit[onnx]'")
    import onnxruntime

    reading, example, free, trials = program(model, readout, any_size)
    outputs = described(model, reading, any_size)["outputs"]
    given = {"input_names": ["images"], "output_names": outputs, "dynamic_shapes": free}
    for noisy in ("onnxscript", "onnx_ir"):  # they tell of constants that they do not fold
        logging.getLogger(noisy).setLevel(logging.ERROR)
    made = torch.onnx.export(reading, (example,), dynamo=True, verbose=False, **given)
    made.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])

    def found(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))

    worst = max(compare(reading(images), found(images), CLOSE_ONNX, "the ONNX program") for images in trials)
    sealed.write(folder / "model.json", described(model, reading, any_size))
    return (
        f"{{out}}/model.onnx takes images in [0, 1], any batch; onnxruntime computes the same to {worst:.0e}. What "
        "goes in and comes out is in model.json."
    )
