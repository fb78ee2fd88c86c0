"""A model folder: model.safetensors and config.json, for sslvit, timm and transformers.

`timm.create_model("local-dir:PATH", pretrained=True)` opens it, and through timm transformers' AutoModel. A model that
timm would compute differently (positions in the blocks or by coordinate, group norm as in Google's code) has an
`architecture` that timm refuses. The section `sslvit` has the arguments that rebuild the backbone, and the size and
hash of the weights. The whole is sealed (sslvit.storage.sealed).
A model that was trained on labels keeps its head: timm opens it as a classifier, sslvit as one or as its backbone.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from sslvit import __version__
from sslvit.errors import CannotWrite, DataError, NoInput
from sslvit.models.blocks import EPSILON
from sslvit.models.partial import merged_state
from sslvit.models.readout import Classifier
from sslvit.models.resnet import BiT, BiTConfig
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.runs.files import CHECKPOINTS
from sslvit.runs.public import last_name, public
from sslvit.storage import checkpoint, durable, sealed
from sslvit.weights.card import card
from sslvit.weights.timm_config import timm_config

log = logging.getLogger(__name__)

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
# Raised when a backbone is built of a damaged description, the last two by huge numbers.
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError)
BACKBONES: dict[str, Callable[..., ViT | BiT]] = {
    "ViT": lambda **config: ViT(ViTConfig(**config)),
    "BiT": lambda **config: BiT(BiTConfig(**config)),
}
LISTS = ("head", "classes", "notes")  # entries of the section `sslvit`


def save_backbone(
    backbone: ViT | BiT, folder: str | Path, extra: dict[str, Any], *, head: dict[str, Tensor] | None = None
) -> None:
    """Writes the folder, whole or not at all; an older model of sslvit is replaced.

    extra: further entries, at least its `readout`, to which timm's pooling is set. head: a classifier's fc_norm,
    pre_logits and head.
    """
    folder, head = Path(folder), head or {}
    if extra.get("readout") not in backbone.readouts:
        raise ValueError(f"readout {extra.get('readout')!r} is not one of this backbone's {backbone.readouts}")
    try:
        if folder.exists() and (not folder.is_dir() or (os.listdir(folder) and not _is_ours(folder))):
            raise CannotWrite(f"{folder} exists and is no model of sslvit: choose another place")
        with durable.whole_folder(folder) as temporary:
            write_model(backbone, temporary, extra, head)
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(f"{folder}: the model was not written: {error.strerror or error}") from error


def written_about(backbone: ViT | BiT, head: Sequence[str], extra: dict[str, Any]) -> dict[str, Any]:
    """The description of a model without its weights, for the config.json of its folder and a run's checkpoints."""
    ours = {"version": __version__, "backbone": type(backbone).__name__, "config": asdict(backbone.config)}
    return ours | {"head": list(head)} | publishable(extra)


def write_model(backbone: ViT | BiT, folder: Path, extra: dict[str, Any], head: dict[str, Tensor]) -> None:
    """The files of a model, into an empty folder."""
    written = durable.write(folder / WEIGHTS, durable.tensor_pieces(backbone.state_dict() | head))
    ours = written_about(backbone, sorted(head), extra) | {"files": {WEIGHTS: written}}
    config = timm_config(backbone, ours["readout"], head) | {"sslvit": ours}
    durable.write(folder / CONFIG, [sealed.text(config, indent=2)])
    about = [f"{name}: {ours[name]}" for name in ("objective", "data", "layout", "file") if ours.get(name)]
    text = card(backbone.name, about, ours["readout"], config["architecture"])
    durable.write(folder / CARD, [text.encode("utf-8", "backslashreplace")])


def publishable(about: dict[str, Any]) -> dict[str, Any]:
    """The description of a model, in which local paths are reduced to their last name."""
    result = {name: public(value) if isinstance(value, str) else value for name, value in about.items()}
    return result | ({"file": last_name(about["file"])} if about.get("file") else {})


def load_backbone(folder: str | Path) -> ViT | BiT:
    """The backbone, in evaluation mode. Raises DataError, a ValueError, if anything is not as it was saved."""
    return _load(folder)[0]


def load_described(folder: str | Path) -> tuple[ViT | BiT, dict[str, Any]]:
    """The backbone and its description, both of one step even while a run is training."""
    return _load(folder)[:2]


def described(folder: str | Path) -> dict[str, Any]:
    """The description of the model: its objective, its readout, its training data."""
    return publishable(_load(folder)[1])


def load_classifier(folder: str | Path) -> Classifier:
    """The backbone with the head that was trained on it, in evaluation mode."""
    backbone, ours, head = _load(folder)
    if "head.bias" not in head:
        raise DataError(f"{folder} is a backbone without a head: only training on labels leaves one")
    classifier = Classifier(
        backbone,
        readout=ours["readout"],
        classes=len(head["head.bias"]),
        representation=len(head["pre_logits.bias"]) if "pre_logits.bias" in head else None,
        fresh_norm="fc_norm.bias" in head,
    )
    load_strictly(classifier, {f"backbone.{name}": t for name, t in backbone.state_dict().items()} | head, str(folder))
    return classifier.eval()


def _load(folder: str | Path) -> tuple[ViT | BiT, dict[str, Any], dict[str, Tensor]]:
    """The backbone, its description, and the weights of its head. A run's folder stands for its model or, before the
    run has ended, for its newest checkpoint."""
    run = unfinished_run(folder)
    source, ours, tensors = _read_folder(Path(folder)) if run is None else _read_checkpoint(run)
    try:
        if wrong := [name for name in LISTS if not isinstance(ours.get(name) or [], list)]:
            raise ValueError(f"its {wrong[0]!r} is not a list")
        config = ours["config"]
        if config.get("depth", 0) + sum(config.get("blocks", ())) > len(tensors):  # which would take forever to build
            raise ValueError("it describes more blocks than there are weights")
        float(config.get("epsilon", EPSILON))  # layers do not check it before they compute
        head = {name: tensors.pop(name) for name in ours.get("head", ())}
        backbone = BACKBONES[ours["backbone"]](**config)
        if ours["readout"] not in backbone.readouts:
            raise ValueError(f"its readout {ours['readout']!r} is not one of {backbone.readouts}")
    except DAMAGED as error:
        raise DataError(f"{source} is not a model as sslvit writes it: {error!r}") from error
    load_strictly(backbone, tensors, str(source))
    return backbone.eval(), ours, head


def _read_folder(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """The model's folder, the section `sslvit`, and all weights."""
    folder = folder / "model" if (folder / "model" / CONFIG).exists() else folder
    try:
        ours = config_of(folder)["sslvit"]
        # Resolved, since the Hub's cache consists of links.
        contents = durable.read((folder / WEIGHTS).resolve(), written=ours["files"][WEIGHTS])
        durable.check_header(contents)
        tensors = load_safetensors(contents)
    except OSError as error:
        kind = NoInput if isinstance(error, FileNotFoundError) else DataError
        raise kind(f"{folder}: no model can be read: {error.strerror} ({error.filename})") from error
    except DataError:
        raise
    except (safetensors.SafetensorError, *DAMAGED) as error:
        raise DataError(f"{folder} is not a model as sslvit writes it: {error!r}") from error
    newest = checkpoint.newest_step(folder.parent / CHECKPOINTS) if folder.name == "model" else None
    if newest is not None and isinstance(ours.get("steps"), int) and newest > ours["steps"]:
        log.warning(
            "%s: the run has gone on to step %d; this is its model of step %d, where it had ended",
            folder,
            newest,
            ours["steps"],
        )
    return folder, ours, tensors


def _read_checkpoint(run: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """The same from the newest intact checkpoint, which is only read: the run may still be training."""
    newest = checkpoint.latest(run / CHECKPOINTS)
    if newest is None:
        raise NoInput(f"{run}: its checkpoints are gone")
    ours = newest.state.get("model")
    if ours is None:
        raise DataError(
            f"{run} has not ended, and its checkpoint of step {newest.step} is of a version of sslvit that did not "
            "write down there what the model is: --resume goes on with the run, and its next checkpoint says it"
        )
    try:
        prefix = "objective.backbone."
        tensors = {name.removeprefix(prefix): t for name, t in newest.tensors.items() if name.startswith(prefix)}
        tensors = merged_state(tensors)
        tensors |= {name: newest.tensors[f"objective.{name}"] for name in ours["head"]}
        steps = ours["steps"]
    except DAMAGED as error:
        raise DataError(f"{newest.path} does not describe its model: {error!r}") from error
    log.warning("%s has not ended: its model is taken from the checkpoint of step %d of %s", run, newest.step, steps)
    return newest.path, ours | {"step": newest.step}, tensors


def unfinished_run(path: str | Path) -> Path | None:
    """The folder of a run with checkpoints but no model yet, if path is that or the place of its future model."""
    path = Path(path)
    path = path.parent if path.name == "model" and not path.exists() else path
    has_model = (path / "model" / CONFIG).exists() or _is_ours(path)
    return path if not has_model and checkpoint.newest_step(path / CHECKPOINTS) is not None else None


def config_of(folder: Path) -> dict[str, Any]:
    """Its config.json, of timm and of sslvit, if it is as it was written."""
    try:
        return sealed.read(folder / CONFIG, sslvit=dict)
    except ValueError as error:
        raise DataError(
            f"{folder / CONFIG} is not as sslvit writes it: {error}. Restore what is damaged from a copy"
        ) from error


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Loads exactly the module's weights, in their shapes; otherwise loads nothing and lists all faults."""
    expected = module.state_dict()
    faults = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    faults += [f"unexpected {name}" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        mine, theirs = expected[name], tensors[name]
        if mine.shape != theirs.shape:
            faults.append(f"{name} of shape {tuple(theirs.shape)} instead of {tuple(mine.shape)}")
        elif mine.is_floating_point() != theirs.is_floating_point():
            faults.append(f"{name} of {theirs.dtype} instead of {mine.dtype}")
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise DataError(f"{source}: the weights do not fit the backbone: {'; '.join(sorted(faults)[:20])}{more}")
    module.load_state_dict(tensors, strict=True)


def _is_ours(folder: Path) -> bool:
    try:
        return "sslvit" in json.loads(durable.read((folder / CONFIG).resolve(), longest=sealed.LONGEST))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
