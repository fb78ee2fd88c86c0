"""What a file or folder is: layout, variant, objective, data, cost, evaluation; and how it becomes something else."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslvit.errors import DataError
from sslvit.exports import export
from sslvit.model_folder import described, load_classifier
from sslvit.records import duration
from sslvit.resnet import BiT
from sslvit.vit import ViT
from sslvit.weights import open_backbone
from sslvit.weights.given import facts


def about(path: Path, foreign: tuple[str, ...] = ()) -> str:
    """For a terminal. foreign: what another's file does not say."""
    backbone, written = open_backbone(path, **facts(foreign))
    lines = {"file": str(path)} | _of_model(backbone, written)
    run = path if (path / "cost.json").exists() else path.parent
    if (run / "cost.json").exists() and (run / "model").exists():
        lines |= _of_run(run)
    return "\n".join(f"{name:11} {text}" for name, text in lines.items() if text)


def _of_model(backbone: ViT | BiT, written: dict[str, Any]) -> dict[str, str]:
    millions = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    config = backbone.config
    size = " x ".join(map(str, dict.fromkeys(backbone.image_size)))
    lines = {
        "layout": written.get("layout", f"sslvit {written['version']}" if "version" in written else ""),
        "variant": f"{backbone.name}, {millions:.1f} million parameters",
        "images": f"{backbone.channels} channels of {size} px, mean {config['mean']}, std {config['std']}",
    }
    if isinstance(backbone, ViT):
        tokens = ["a class token" if config["class_token"] else "no class token", f"{backbone.registers} registers"]
        lines["heads"] = f"{backbone.heads}, GELU {config['gelu']}, epsilon {config['epsilon']:g}"
        lines["tokens"] = ", ".join(tokens[: 1 + bool(backbone.registers)])
        lines["positions"] = f"{config['position']} at {config['position_at']}, resized {config['position_resize']}"
    lines["objective"], lines["data"] = written.get("objective", ""), written.get("data", "")
    lines["readout"] = f"{written['readout']}, of {', '.join(backbone.readouts)}"
    lines["head"] = f"{len(written['classes'])} classes" if written.get("head") and written.get("classes") else ""
    for name, text in written.get("known", {}).items():
        lines[f"  {name}"] = text
    lines["left behind"] = str(written.get("left_behind") or "")
    lines["note"] = "; ".join(written.get("notes", ()))
    return lines


def _of_run(run: Path) -> dict[str, str]:
    cost = json.loads((run / "cost.json").read_text())
    seen = f"{cost['images']:,} images in {duration(cost['seconds'])} on {cost['device']}"
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in log if any(name.startswith("eval/") for name in line)]
    last = evaluated[-1] if evaluated else {}
    numbers = [f"{name.removeprefix('eval/')} {100 * x:.1f} %" for name, x in last.items() if name.startswith("eval/")]
    return {"cost": seen, "evaluation": ", ".join(numbers), "steps": f"{log[-1]['step']:,}" if log else ""}


@dataclass(frozen=True)
class Convert:
    """Write a model in another's layout, read back and compared before it counts as written."""

    model: Path
    """A run's folder, a model folder, or a checkpoint of timm, torchvision, transformers, Google, MoCo v3, DINO, MAE
    or DINOv2."""
    out: Path
    """A new folder."""
    to: Literal["timm", "transformers", "torchvision", "onnx", "torch_export"] = "timm"
    """timm: a model folder, which sslvit opens too."""
    readout: Literal["declared", "cls", "mean", "both"] = "declared"
    """What is recorded as to be read, and what a program gives."""
    image_size: int = 0
    """Resize the positions for images of this size, for good; 0 leaves them."""
    any_size: bool = False
    """Of a program (onnx, torch_export): images of any size that is a multiple of the patch."""
    head: bool = False
    """Of a fine-tuned model, as a program: the scores of its classes instead of features."""
    foreign: tuple[str, ...] = ()
    """What another's checkpoint does not say of itself, e.g. family=mae, or heads=6 gelu=exact mean=.5,.5,.5
    std=.5,.5,.5."""


def convert(config: Convert) -> str:
    """Says what was written."""
    backbone, written = open_backbone(config.model, **facts(config.foreign))
    readout = written["readout"] if config.readout == "declared" else config.readout
    if readout not in backbone.readouts:
        raise ValueError(f"--readout {readout}: this {backbone.name} has {', '.join(backbone.readouts)}")
    if config.image_size:
        if isinstance(backbone, BiT):
            raise ValueError(f"--image_size {config.image_size}: a {backbone.name} takes images of any size as it is")
        backbone = backbone.resized(config.image_size)
    model = backbone
    if config.head:
        if "head" not in written or not described(config.model)["head"] or config.image_size:
            raise DataError(f"--head: {config.model} is no fine-tuned model of sslvit at its own --image_size")
        model = load_classifier(config.model)
    kept = {name: value for name, value in written.items() if name not in ("version", "backbone", "config", "files")}
    kept.pop("head", None)
    return export(model, kept | {"readout": readout}, config.out, config.to, any_size=config.any_size)
