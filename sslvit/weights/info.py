"""What a file or folder is: layout, variant, objective, data, cost, evaluation; and how it becomes something else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from sslvit.weights.foreign.facts import Unsaid
from sslvit.weights.foreign.open import is_ours, load_foreign, open_backbone
from sslvit.weights.foreign.options import facts


def about(path: Path, foreign: tuple[str, ...] = ()) -> str:
    """For a terminal. foreign: what another's file does not say."""
    if found := _program(path) or _checkpoint(path):
        return _text({"file": str(path)} | found)
    said = facts(foreign)
    try:
        if is_ours(path):
            backbone, written = open_backbone(path, **said)
        else:  # what is asked for is what it is, not what its backbone was trained on
            backbone, written = load_foreign(path, **({"leave_head": True} | said))
    except Unsaid as unsaid:
        told = unsaid.told | _indented(unsaid.told["known"]) | {"known": ""}
        return _text({"file": str(path)} | told | {"to open it": str(unsaid)})
    lines = {"file": str(path)} | _of_model(backbone, written)
    run = path if (path / "cost.json").exists() else path.parent
    if (run / "cost.json").exists() and (run / "model").exists():
        try:
            lines |= _of_run(run)
        except (OSError, ValueError, LookupError, TypeError) as error:
            lines["run"] = f"its cost.json or metrics.jsonl is damaged: {type(error).__name__}: {error}"
    return _text(lines)


def _text(lines: dict[str, str]) -> str:
    return "\n".join(f"{name:11} {text}" for name, text in lines.items() if text)


def _program(path: Path) -> dict[str, str]:
    """Of a folder that `convert` made of a model for onnx or torch.export."""
    file = path / "model.json" if path.is_dir() else path.with_name("model.json")
    if not file.is_file() or (path.is_file() and path.suffix not in (".onnx", ".pt2")):
        return {}
    try:
        said = sealed.read(file, model=str, inputs=dict, outputs=list)
    except ValueError as error:
        raise DataError(f"{file} is not as sslvit writes it: {error}") from error
    return {"layout": "a program"} | {name: str(value) for name, value in said.items()}


def _checkpoint(path: Path) -> dict[str, str]:
    """Of a checkpoint of ours, from which a run goes on. Its tensors are not looked at."""
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
    lines = {
        "layout": f"sslvit {written['version']}" if "version" in written else written.get("layout", ""),
        "made of": written.get("layout", "") if "version" in written else "",
        "variant": f"{backbone.name}, {millions:.1f} million parameters",
        "stem": f"the ResNet {hybrid}" if hybrid else "",
        "images": f"{backbone.channels} channels of {size} px, {_numbers(backbone)}",
    }
    if isinstance(backbone, ViT):
        config = backbone.config
        tokens = ["a class token" if config.class_token else "no class token", f"{backbone.registers} registers"]
        lines["heads"] = f"{backbone.heads}, GELU {config.gelu}, epsilon {config.epsilon:g}"
        lines["tokens"] = ", ".join(tokens[: 1 + bool(backbone.registers)])
        lines["positions"] = f"{config.position} at {config.position_at}, resized {config.position_resize}"
    lines["objective"], lines["data"] = written.get("objective", ""), written.get("data", "")
    lines["readout"] = f"{written['readout']}, of {', '.join(backbone.readouts)}"
    lines["head"] = f"{len(written['classes'])} classes" if written.get("head") and written.get("classes") else ""
    lines |= _indented(written.get("known"))
    if "step" in written:
        lines["steps"] = f"{written['step']:,} of {written['steps']:,}: the run has not ended"
    lines["left behind"] = str(written.get("left_behind") or "")
    lines["note"] = "; ".join(map(str, written.get("notes") or ()))
    return lines


def _numbers(backbone: ViT | BiT) -> str:
    constants = {"mean": backbone.mean.flatten().tolist(), "std": backbone.std.flatten().tolist()}
    return ", ".join(f"{name} {' '.join(f'{value:g}' for value in values)}" for name, values in constants.items())


def _of_run(run: Path) -> dict[str, str]:
    cost = sealed.read(run / "cost.json", images=NUMBER, seconds=NUMBER, device=str)
    seen = f"{cost['images']:,} images in {duration(cost['seconds'])} on {cost['device']}"
    log = read_lines(run / "metrics.jsonl")
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
    image_size: Size = 0
    """Resize the positions for images of this size (of a side, or height and width), for good; 0 leaves them."""
    any_size: bool = False
    """Of a program (onnx, torch_export): images of any size that is a multiple of the patch."""
    head: bool = False
    """Of a fine-tuned model, as a program: the scores of its classes instead of features. A model folder has its head
    anyway, unless --readout is another."""
    foreign: tuple[str, ...] = ()
    """What another's checkpoint does not say of itself, e.g. family=mae, or heads=6 gelu=exact mean=.5,.5,.5
    std=.5,.5,.5; leave_head=true takes the backbone of a classifier."""


def convert(config: Convert) -> str:
    """Says what was written."""
    backbone, written = open_backbone(config.model, **facts(config.foreign))
    readout, weights = config.readout, tensors_hash(backbone.state_dict())
    readout = written["readout"] if readout == "declared" else readout
    if readout not in backbone.readouts:
        raise ValueError(f"--readout {readout}: this {backbone.name} has {', '.join(backbone.readouts)}")
    sides = to_pair(config.image_size)
    shown = f"--image_size {' '.join(map(str, dict.fromkeys(sides)))}"
    if sides != (0, 0) and not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise ValueError(f"{shown}: it must be from 1 to {LARGEST_SIDE}, or 0 to leave it")
    if sides != (0, 0):
        if isinstance(backbone, BiT):
            raise ValueError(f"{shown}: a {backbone.name} takes images of any size as it is")
        backbone = backbone.resized(sides)
    has = bool(written.get("head")) and "version" in written
    if config.head and not has:
        raise DataError(f"--head: {config.model} is no model of sslvit that was trained on labels, with a head")
    if config.head and readout != written["readout"]:
        raise ValueError(f"--head: its classes are read from {written['readout']}: leave --readout {readout} out")
    model, takes = backbone, has and (config.head or (config.to == "timm" and readout == written["readout"]))
    if takes:
        model = load_classifier(config.model)
        if tensors_hash(model.backbone.state_dict()) != weights:
            raise DataError(f"{config.model} went on training meanwhile: the same command takes its newest weights")
        model.backbone = backbone
    dropped = {"version", "backbone", "config", "files", "head"} | (set() if takes else {"classes"})
    kept = {name: value for name, value in written.items() if name not in dropped}
    said = export(model, kept | {"readout": readout}, config.out, config.to, any_size=config.any_size)
    return f"{said} Its head of classes stays behind." if has and not takes else said
