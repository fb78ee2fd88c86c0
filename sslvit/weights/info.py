"""`info`: layout, variant, objective, data, cost and evaluation of a model; `convert`: the model in another layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from sslvit.config import LARGEST_SIDE
from sslvit.errors import DataError
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.runs.log import duration
from sslvit.storage import checkpoint, sealed
from sslvit.storage.checkpoint import NAME
from sslvit.storage.durable import tensors_hash
from sslvit.storage.jsonl import read_lines
from sslvit.storage.sealed import NUMBER
from sslvit.views.batching import Size, to_pair
from sslvit.weights.exports.export import export
from sslvit.weights.folder import load_classifier
from sslvit.weights.foreign.facts import MissingFacts
from sslvit.weights.foreign.open import is_ours, load_foreign, open_backbone
from sslvit.weights.foreign.options import facts


def about(path: Path, foreign: tuple[str, ...] = ()) -> str:
    """For a terminal. foreign: facts that another's file lacks."""
    lines = _program(path) or _checkpoint(path)
    if not lines:
        try:
            if is_ours(path):
                backbone, written = open_backbone(path, **facts(foreign))
            else:  # a classifier can be described without being asked for
                backbone, written = load_foreign(path, **({"leave_head": True} | facts(foreign)))
            lines = _of_model(backbone, written) | _of_run(path if (path / "cost.json").exists() else path.parent)
        except MissingFacts as missing:
            known = missing.known | _indented(missing.known["known"]) | {"known": ""}
            lines = known | {"to open it": str(missing)}
    return "\n".join(f"{name:11} {text}" for name, text in ({"file": str(path)} | lines).items() if text)


def _program(path: Path) -> dict[str, str]:
    """A folder that `convert` wrote for onnx or torch.export."""
    file = path / "model.json" if path.is_dir() else path.with_name("model.json")
    if not file.is_file() or (path.is_file() and path.suffix not in (".onnx", ".pt2")):
        return {}
    try:
        description = sealed.read(file, model=str, inputs=dict, outputs=list)
    except ValueError as error:
        raise DataError(f"{file} is not as sslvit writes it: {error}") from error
    return {"layout": "a program"} | {name: str(value) for name, value in description.items()}


def _checkpoint(path: Path) -> dict[str, str]:
    """A checkpoint of a run. Its tensors are not read."""
    folder = (path if path.is_dir() else path.parent).resolve()
    named = NAME.fullmatch(folder.name)
    if not named or not (folder / checkpoint.MANIFEST).is_file():
        return {}
    try:
        state, versions = checkpoint.read_state(folder, int(named[1]))
        progress, config = state["progress"], state["config"]
        seconds, step = duration(progress["seconds"]), f"{progress['step']:,}"
        size = (folder / checkpoint.TENSORS).stat().st_size / 1e6
        version, start = versions["sslvit"], config.get("init_from") or config.get("start")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{folder} is no whole checkpoint: {type(error).__name__}: {error}") from error
    run = folder.parent.parent
    return {
        "layout": f"a checkpoint of sslvit {version}, from which a run goes on, of {size:.1f} MB",
        "variant": f"that of {start}" if start else str(config.get("model", "")),
        "data": str(config.get("data", "")),
        "steps": f"{step}, after {seconds}",
        "the model": f"{run / 'model'}" if (run / "model").exists() else f"not written yet; until then it is {run}",
    }


def _indented(known: Any) -> dict[str, str]:
    return {f"  {name}": text for name, text in known.items()} if isinstance(known, dict) else {}


def _of_model(backbone: ViT | BiT, written: dict[str, Any]) -> dict[str, str]:
    millions = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    hybrid = backbone.config.hybrid if isinstance(backbone, ViT) else None
    size = " x ".join(map(str, dict.fromkeys(backbone.image_size)))
    mean, std = (" ".join(f"{x:g}" for x in values.flatten().tolist()) for values in (backbone.mean, backbone.std))
    lines = {
        "layout": f"sslvit {written['version']}" if "version" in written else written.get("layout", ""),
        "made of": written.get("layout", "") if "version" in written else "",
        "variant": f"{backbone.name}, {millions:.1f} million parameters",
        "stem": f"the ResNet {hybrid}" if hybrid else "",
        "images": f"{backbone.channels} channels of {size} px, mean {mean}, std {std}",
    }
    if isinstance(backbone, ViT):
        config = backbone.config
        lines["heads"] = (
            f"{backbone.heads}, {'SwiGLU' if config.swiglu else f'GELU {config.gelu}'}, epsilon {config.epsilon:g}"
        )
        lines["tokens"] = "a class token" if config.class_token else "no class token"
        lines["tokens"] += f", {backbone.registers} registers" if backbone.registers else ""
        resized = "" if config.position == "rope" else f", resized {config.position_resize}"
        lines["positions"] = f"{config.position} at {config.position_at}{resized}"
    lines["objective"], lines["data"] = written.get("objective", ""), written.get("data", "")
    lines["readout"] = f"{written['readout']}, of {', '.join(backbone.readouts)}"
    lines["head"] = f"{len(written['classes'])} classes" if written.get("head") and written.get("classes") else ""
    lines |= _indented(written.get("known"))
    if "step" in written:
        lines["steps"] = f"{written['step']:,} of {written['steps']:,}: the run has not ended"
    lines["left behind"] = str(written.get("left_behind") or "")
    lines["note"] = "; ".join(map(str, written.get("notes") or ()))
    return lines


def _of_run(run: Path) -> dict[str, str]:
    if not (run / "cost.json").exists() or not (run / "model").exists():
        return {}
    try:
        cost = sealed.read(run / "cost.json", images=NUMBER, seconds=NUMBER, device=str)
        log = read_lines(run / "metrics.jsonl")
        evaluated = [line for line in log if any(name.startswith("eval/") for name in line)]
        last = {name: x for name, x in evaluated[-1].items() if name.startswith("eval/")} if evaluated else {}
        return {
            "cost": f"{cost['images']:,} images in {duration(cost['seconds'])} on {cost['device']}",
            "evaluation": ", ".join(f"{name.removeprefix('eval/')} {100 * x:.1f}%" for name, x in last.items()),
            "steps": f"{log[-1]['step']:,}" if log else "",
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return {"run": f"its cost.json or metrics.jsonl is damaged: {type(error).__name__}: {error}"}


@dataclass(frozen=True)
class Convert:
    """Write a model in another layout, which is read back and compared."""

    group: ClassVar[str] = "Model"
    positional: ClassVar[tuple[str, ...]] = ("model", "out")  # as leading words too
    model: Path
    """A run, a model, or a checkpoint. A run's folder (finished or not), a model folder, or a file of timm,
    torchvision, transformers, Google, MoCo v3, DINO, MAE, DINOv2 or DINOv3."""
    out: Path
    """A new folder."""
    to: Literal["timm", "transformers", "torchvision", "onnx", "torch_export"] = "timm"
    """The layout. timm's is a model folder, which sslvit opens too."""
    readout: Literal["declared", "cls", "mean", "both"] = "declared"
    """The readout that is recorded, and that a program returns."""
    image_size: Size = 0
    """Resize positions for images of this size; 0 leaves them. One side, or height and width."""
    any_size: bool = False
    """Programs (onnx, torch_export): accept images of any size. A side must be a multiple of the patch."""
    head: bool = False
    """Programs of fine-tuned models: return the classes' scores. Not features; a model folder has its
    head anyway, unless --readout is another."""
    foreign: tuple[str, ...] = ()
    """Facts that such a checkpoint lacks, e.g. family=mae; or heads=6 gelu=exact mean=.5,.5,.5 std=.5,.5,.5;
    leave_head=true takes the backbone of a classifier."""


def convert(config: Convert) -> str:
    """Returns a sentence about what was written."""
    backbone, written = open_backbone(config.model, **facts(config.foreign))
    weights = tensors_hash(backbone.state_dict())
    readout = written["readout"] if config.readout == "declared" else config.readout
    if readout not in backbone.readouts:
        raise ValueError(f"--readout {readout}: this {backbone.name} has {', '.join(backbone.readouts)}")
    has_head = bool(written.get("head")) and "version" in written
    if config.head and not has_head:
        raise DataError(f"--head: {config.model} is no model of sslvit that was trained on labels, with a head")
    if config.head and readout != written["readout"]:
        raise ValueError(f"--head: its classes are read from {written['readout']}: leave --readout {readout} out")
    backbone = _resized(backbone, config.image_size)
    model, with_head = backbone, has_head and (config.head or (config.to == "timm" and readout == written["readout"]))
    if with_head:
        model = load_classifier(config.model)
        if tensors_hash(model.backbone.state_dict()) != weights:
            raise DataError(f"{config.model} went on training meanwhile: the same command takes its newest weights")
        model.backbone = backbone
    dropped = {"version", "backbone", "config", "files", "head"} | (set() if with_head else {"classes"})
    description = {name: value for name, value in written.items() if name not in dropped} | {"readout": readout}
    report = export(model, description, config.out, config.to, any_size=config.any_size)
    return f"{report} Its head of classes stays behind." if has_head and not with_head else report


def _resized(backbone: ViT | BiT, image_size: Size) -> ViT | BiT:
    sides = to_pair(image_size)
    if sides == (0, 0):
        return backbone
    shown = f"--image_size {' '.join(map(str, dict.fromkeys(sides)))}"
    if not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise ValueError(f"{shown}: it must be from 1 to {LARGEST_SIDE}, or 0 to leave it")
    if isinstance(backbone, BiT):
        raise ValueError(f"{shown}: a {backbone.name} takes images of any size as it is")
    return backbone.resized(sides)
