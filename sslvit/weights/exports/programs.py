"""A backbone or a classifier as a program without sslvit, by torch.export or ONNX.

It takes batches of any length of images in [0, 1], which it standardises itself.
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

LARGEST_SIDE = 64  # in patches, of a program for any size


class Reading(nn.Module):
    """The outputs of a program for images in [0, 1]: the readout and the patches, or a classifier's scores."""

    def __init__(self, model: nn.Module, readout: str):
        super().__init__()
        self.model, self.readout = model, readout

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.model, Classifier):
            return (self.model(images),)
        encoded = self.model(images)
        return read(encoded, self.readout), encoded.patches


def program(model: ViT | BiT | Classifier, readout: str, any_size: bool) -> tuple[Reading, Tensor, dict, list[Tensor]]:
    """The program, an example of its input, the example's free dimensions, and images to compare outputs for."""
    backbone = model.backbone if isinstance(model, Classifier) else model
    free = {0: torch.export.Dim("batch", min=1, max=1 << 16)}
    example = sample(backbone, backbone.image_size, 2)
    trials = [sample(backbone, backbone.image_size, count) for count in (1, 5)]
    if any_size:
        lacks = {"ResNets": isinstance(backbone, BiT)}
        if isinstance(backbone, ViT):
            in_blocks = backbone.position == "relative" or backbone.position_at != "stem"
            lacks["positions in the blocks"] = in_blocks and backbone.position != "rope"
            lacks["positions that are resized as in DINO"] = backbone.config.position_resize == "bicubic_offset"
        refuse(backbone, "a program for any size", lacks)
        (p, q), (h, w) = backbone.patch_size, backbone.grid
        free[2] = p * torch.export.Dim("height", min=2, max=LARGEST_SIDE)
        free[3] = q * torch.export.Dim("width", min=2, max=LARGEST_SIDE)
        example = sample(backbone, (p * (h + 2), q * (w + 1)), 2)
        trials += [sample(backbone, (p * (h + 1), q * (w + 3))), sample(backbone, (2 * p, 3 * q))]
    return Reading(model, readout).eval(), example, {"images": free}, trials


def described(model: ViT | BiT | Classifier, readout: str, any_size: bool) -> dict[str, Any]:
    backbone = model.backbone if isinstance(model, Classifier) else model
    size = f"any multiple of the patch, 2 to {LARGEST_SIDE} patches a side" if any_size else list(backbone.image_size)
    description = {
        "model": backbone.name,
        "inputs": {"images": f"b {backbone.channels} H W in [0, 1]"},
        "outputs": ["scores"] if isinstance(model, Classifier) else ["features", "patches"],
        "readout": readout,
        "image_size": size,
    }
    return description | ({"patch_size": list(backbone.patch_size)} if isinstance(backbone, ViT) else {})


def as_torch_export(model: ViT | BiT | Classifier, about: dict[str, Any], folder: Path, *, any_size: bool) -> str:
    reading, example, free, trials = program(model, about["readout"], any_size)
    exported = torch.export.export(reading, (example,), dynamic_shapes=free)
    written = io.BytesIO()  # since on a full disk torch's own writing ends the process
    torch.export.save(exported, written)
    durable.write(folder / "model.pt2", [written.getvalue()])
    peer = torch.export.load(folder / "model.pt2").module()
    worst = max(compare(reading(images), peer(images), CLOSE, "the exported program") for images in trials)
    sealed.write(folder / "model.json", described(model, about["readout"], any_size))
    return (
        f"{{out}}/model.pt2: torch.export.load('{{out}}/model.pt2').module()(images in [0, 1]), any batch; it computes "
        f"the same to {worst:.0e}. Its inputs and outputs are in model.json."
    )


def as_onnx(model: ViT | BiT | Classifier, about: dict[str, Any], folder: Path, *, any_size: bool) -> str:
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]:
        raise ValueError(f"--to onnx needs {', '.join(missing)}: pip install 'sslvit[onnx]'")
    import onnxruntime

    reading, example, free, trials = program(model, about["readout"], any_size)
    description = described(model, about["readout"], any_size)
    for noisy in ("onnxscript", "onnx_ir"):  # they log constants that they do not fold
        logging.getLogger(noisy).setLevel(logging.ERROR)
    exported = torch.onnx.export(
        reading,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=description["outputs"],
        dynamic_shapes=free,
    )
    exported.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])

    def peer(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))

    worst = max(compare(reading(images), peer(images), CLOSE_ONNX, "the ONNX program") for images in trials)
    sealed.write(folder / "model.json", description)
    return (
        f"{{out}}/model.onnx takes images in [0, 1], any batch; onnxruntime computes the same to {worst:.0e}. Its "
        "inputs and outputs are in model.json."
    )
