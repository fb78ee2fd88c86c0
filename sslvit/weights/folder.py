"""The folder of a trained backbone: model.safetensors and config.json, for us, for timm and for transformers.

`timm.create_model("local-dir:PATH", pretrained=True)` reads it, and transformers' AutoModel through timm. What timm has
no word for (positions inside the blocks or by coordinate, group norm as in Google's code) it must not open, because it
would compute something else with the same weights: then `architecture` says so, and timm refuses it by that name.
The section `sslvit` is ours: the arguments that rebuild the backbone, and the size and hash of the weights. The whole
is sealed (sslvit.storage.sealed).
A model that was trained on labels keeps its head: then timm opens a classifier, and we a classifier or its backbone.
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
from sslvit.models.readout import Classifier
from sslvit.models.resnet import BiT, BiTConfig
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.runs.files import CHECKPOINTS
from sslvit.runs.public import last_name, markdown, public
from sslvit.storage import checkpoint, durable, sealed
from sslvit.views.pretraining import default_eval_crop

log = logging.getLogger(__name__)

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
# What building a backbone of a damaged description raises, the last two of huge numbers.
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError)
BACKBONES: dict[str, Callable[..., ViT | BiT]] = {
    "ViT": lambda **config: ViT(ViTConfig(**config)),
    "BiT": lambda **config: BiT(BiTConfig(**config)),
}
LISTS = ("head", "classes", "notes")  # of what is said of a model, these
# Any of timm's plain ViTs would do, since model_args say everything; these make a listing readable.
ARCHITECTURES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
# By the ResNet in front; the sizes of the transformer are model_args too.
HYBRIDS = {
    "R": "vit_tiny_r_s16_p8_224",
    "R26": "vit_small_r26_s32_224",
    "R50": "vit_base_r50_s16_224",
    "R50-4stage": "vit_large_r50_s32_224",
}
FIRST_CONV = {name: f"patch_embed.backbone.{'' if name == 'R' else 'stem.'}conv" for name in HYBRIDS}
TIMM_OPENS = (*ARCHITECTURES.values(), *HYBRIDS.values())


def save_backbone(
    backbone: ViT | BiT, folder: str | Path, extra: dict[str, Any], *, head: dict[str, Tensor] | None = None
) -> None:
    """Writes the folder, whole or not at all; an older one of ours is replaced.

    extra: what else to say about it, at least its `readout`: timm's pooling is set to that. head: a classifier's
    fc_norm, pre_logits and head.
    """
    folder, head = Path(folder), head or {}
    if extra.get("readout") not in backbone.readouts:
        raise ValueError(f"readout {extra.get('readout')!r} is none of this backbone's {backbone.readouts}")
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
    """All of a model but its weights: in the config.json of its folder, and in the checkpoints of a run."""
    ours = {"version": __version__, "backbone": type(backbone).__name__, "config": asdict(backbone.config)}
    return ours | {"head": list(head)} | told(extra)


def write_model(backbone: ViT | BiT, folder: Path, extra: dict[str, Any], head: dict[str, Tensor]) -> None:
    """The files of a model, into an empty folder."""
    written = durable.write(folder / WEIGHTS, durable.tensor_pieces(backbone.state_dict() | head))
    ours = written_about(backbone, sorted(head), extra) | {"files": {WEIGHTS: written}}
    extra = told(extra)
    config = _timm_config(backbone, extra["readout"], head) | {"sslvit": ours}
    durable.write(folder / CONFIG, [sealed.text(config, indent=2)])
    about = [f"{name}: {extra[name]}" for name in ("objective", "data", "layout", "file") if extra.get(name)]
    text = card(backbone.name, about, extra["readout"], config["architecture"])
    durable.write(folder / CARD, [text.encode("utf-8", "backslashreplace")])


def told(about: dict[str, Any]) -> dict[str, Any]:
    """What is written about a model, as others may know it: data and file are named without where they lie."""
    known = {name: public(value) if isinstance(value, str) else value for name, value in about.items()}
    return known | ({"file": last_name(about["file"])} if about.get("file") else {})


def card(name: str, about: Sequence[str], readout: str, architecture: str, tables: Sequence[str] = ()) -> str:
    """By the Hugging Face Hub's form. about: sentences. A run's report puts a longer one in the place of the first."""
    by_timm = architecture in TIMM_OPENS
    timm = ["import timm", "", 'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # standardise first']
    hf = [
        "from transformers import AutoModel  # with timm installed",
        "",
        'model = AutoModel.from_pretrained("FOLDER")',
    ]
    lines = [
        "---",
        f"library_name: {'timm' if by_timm else 'sslvit'}",
        "tags: [sslvit, vision-transformer, image-feature-extraction]",
        "---",
        f"# {markdown(name)}",
        "",
        *(f"- {markdown(text)}" for text in about),
        f"- The readout to use is {readout}. In sslvit images are in [0, 1].",
        "",
        *tables,
        "How to load it:",
        "",
        "```python",
        "from sslvit.weights.hub import load_model",
        "",
        'vit = load_model("FOLDER_OR_OWNER/NAME")  # cls, patches = vit(images)',
        *(["", *timm, "", *hf] if by_timm else []),
        "```",
        "",
    ]
    return "\n".join(lines)


def load_backbone(folder: str | Path) -> ViT | BiT:
    """The backbone, in evaluation mode. Raises DataError, a ValueError, if anything is not as it was saved."""
    return _load(folder)[0]


def load_described(folder: str | Path) -> tuple[ViT | BiT, dict[str, Any]]:
    """The backbone and what is written about it, which are of one step also while a run goes on."""
    return _load(folder)[:2]


def load_classifier(folder: str | Path) -> Classifier:
    """The backbone with the head that was trained on it, in evaluation mode."""
    backbone, ours, head = _load(folder)
    if "head.bias" not in head:
        raise DataError(f"{folder} is a backbone without a head: only training on labels leaves one")
    hidden = len(head["pre_logits.bias"]) if "pre_logits.bias" in head else None
    classifier = Classifier(
        backbone,
        readout=ours["readout"],
        classes=len(head["head.bias"]),
        representation=hidden,
        fresh_norm="fc_norm.bias" in head,
    )
    load_strictly(classifier, {f"backbone.{name}": t for name, t in backbone.state_dict().items()} | head, str(folder))
    return classifier.eval()


def described(folder: str | Path) -> dict[str, Any]:
    """What is written about the model: its objective, its readout, what it was trained on."""
    return told(_load(folder)[1])


def _load(folder: str | Path) -> tuple[ViT | BiT, dict[str, Any], dict[str, Tensor]]:
    """The backbone, what is said of it, and the weights of its head. A run's folder stands for its model's, or, before
    the run has ended, for its newest checkpoint."""
    folder = Path(folder)
    if (run := unfinished_run(folder)) is not None:
        return _of_checkpoint(run)
    folder = folder / "model" if (folder / "model" / CONFIG).exists() else folder
    try:
        ours = config_of(folder)["sslvit"]
        build, config, written = BACKBONES[ours["backbone"]], ours["config"], ours["files"][WEIGHTS]
        # The Hub's cache is made of links, of which the files that they point to are read.
        contents = durable.read((folder / WEIGHTS).resolve(), written=written)
        durable.check_header(contents)
        tensors = load_safetensors(contents)
        del contents
        if wrong := [name for name in LISTS if not isinstance(ours.get(name) or [], list)]:
            raise ValueError(f"its {wrong[0]!r} is no list")
        if config.get("depth", 0) + sum(config.get("blocks", ())) > len(tensors):  # which would take for ever to build
            raise ValueError("it says to have more blocks than there are weights")
        float(config.get("epsilon", EPSILON))  # which no layer looks at before it computes
        head = {name: tensors.pop(name) for name in ours.get("head", ())}
        backbone = build(**config)
        if ours["readout"] not in backbone.readouts:
            raise ValueError(f"its readout {ours['readout']!r} is none of {backbone.readouts}")
    except OSError as error:
        kind = NoInput if isinstance(error, FileNotFoundError) else DataError
        raise kind(f"{folder}: no model can be read: {error.strerror} ({error.filename})") from error
    except DataError:
        raise
    except (safetensors.SafetensorError, *DAMAGED) as error:
        raise DataError(f"{folder} is not a model folder as sslvit writes it: {error!r}") from error
    load_strictly(backbone, tensors, str(folder))
    newest = checkpoint.newest_step(folder.parent / CHECKPOINTS) if folder.name == "model" else None
    if newest is not None and isinstance(ours.get("steps"), int) and newest > ours["steps"]:
        log.warning(
            "%s: the run has gone on to step %d; this is its model of step %d, where it had ended",
            folder,
            newest,
            ours["steps"],
        )
    return backbone.eval(), ours, head


def unfinished_run(path: str | Path) -> Path | None:
    """The folder of a run that has checkpoints and no model yet, if this is one, or the model that it will have."""
    path = Path(path)
    path = path.parent if path.name == "model" and not path.exists() else path
    has_model = (path / "model" / CONFIG).exists() or _is_ours(path)
    return path if not has_model and checkpoint.newest_step(path / CHECKPOINTS) is not None else None


def _of_checkpoint(run: Path) -> tuple[ViT | BiT, dict[str, Any], dict[str, Tensor]]:
    """Of the newest one that verifies. It is read only, so the run may be going on meanwhile."""
    found = checkpoint.latest(run / CHECKPOINTS)
    if found is None:
        raise NoInput(f"{run}: its checkpoints are gone")
    ours = found.state.get("model")
    if ours is None:
        raise DataError(
            f"{run} has not ended, and its checkpoint of step {found.step} is of a version of sslvit that did not "
            "write down there what the model is: --resume goes on with the run, and its next checkpoint says it"
        )
    try:
        backbone = BACKBONES[ours["backbone"]](**ours["config"])
        head = {name: found.tensors[f"objective.{name}"] for name in ours["head"]}
        prefix = "objective.backbone."
        weights = {n.removeprefix(prefix): t for n, t in found.tensors.items() if n.startswith(prefix)}
    except DAMAGED as error:
        raise DataError(f"{found.path} does not say what its model is: {error!r}") from error
    load_strictly(backbone, weights, str(found.path))
    log.warning(
        "%s has not ended: its model is taken from the checkpoint of step %d of %s", run, found.step, ours["steps"]
    )
    return backbone.eval(), ours | {"step": found.step}, head


def config_of(folder: Path) -> dict[str, Any]:
    """All of its config.json, what timm reads and the section `sslvit`, if it is as it was written."""
    try:
        return sealed.read(folder / CONFIG, sslvit=dict)
    except ValueError as error:
        raise DataError(
            f"{folder / CONFIG} is not as sslvit writes it: {error}. Restore what is damaged from a copy"
        ) from error


def load_strictly(backbone: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """All weights are there, nothing else, in the right shapes; else nothing is assigned and all faults are listed."""
    expected = backbone.state_dict()
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
    backbone.load_state_dict(tensors, strict=True)


def _is_ours(folder: Path) -> bool:
    try:
        return "sslvit" in json.loads(durable.read((folder / CONFIG).resolve(), longest=sealed.LONGEST))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _timm_config(backbone: ViT | BiT, readout: str, head: dict[str, Tensor]) -> dict[str, Any]:
    """What timm needs to build the same function, or an architecture that it will refuse by name."""
    classes = len(head["head.bias"]) if head else 0
    if reason := _unknown_to_timm(backbone, readout, head):
        return {"architecture": f"sslvit only ({reason})", "num_classes": 0}
    assert isinstance(backbone, ViT)  # since a BiT is unknown to it
    config, patch_size = backbone.config, backbone.patch_size
    if hybrid := config.hybrid or "":  # of the ResNet's features, not of pixels
        patch_size = tuple(pixels // backbone.patch_embed.backbone.stride for pixels in patch_size)
    return {
        "architecture": HYBRIDS.get(hybrid) or ARCHITECTURES.get(backbone.width, "vit_base_patch16_224"),
        "num_classes": classes,
        "num_features": backbone.width,
        "model_args": {
            "img_size": list(backbone.image_size),
            "patch_size": list(patch_size),
            "in_chans": backbone.channels,
            "embed_dim": backbone.width,
            "depth": backbone.depth,
            "num_heads": backbone.heads,
            "mlp_ratio": _mlp_ratio(backbone.width, config.mlp_width),
            "qkv_bias": config.qkv_bias,
            "init_values": config.layer_scale,
            "class_token": config.class_token,
            "reg_tokens": config.registers,
            "no_embed_class": not config.class_position,
            "pos_embed": "none" if config.position == "none" else "learn",
            "act_layer": "gelu" if config.gelu == "exact" else "gelu_tanh",
            # In here, not beside it: only then can a model without a class token be built. fc_norm: timm would
            # otherwise move the norm behind the mean and look for other names.
            "global_pool": "token" if readout == "cls" else "avg",
            "fc_norm": "fc_norm.bias" in head,
        },
        "pretrained_cfg": {
            "input_size": [backbone.channels, *backbone.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": default_eval_crop(backbone.image_size),
            "crop_mode": "center",
            "mean": list(config.mean),
            "std": list(config.std),
            "num_classes": classes,
            "first_conv": FIRST_CONV.get(hybrid, "patch_embed.proj"),
            "classifier": "head",
        },
    }


def _unknown_to_timm(backbone: ViT | BiT, readout: str, head: dict[str, Tensor]) -> str | None:
    if isinstance(backbone, BiT):
        return "timm's ResNets have other constants in their norms"
    config = backbone.config
    if config.hybrid is not None and config.hybrid_epsilons != "timm":
        return "timm's hybrids have other epsilons in their ResNet"
    if config.position in ("learned_2d", "relative") or config.position_at != "stem":
        return f"timm has no position {config.position} at {config.position_at}"
    if config.epsilon != EPSILON:
        return "timm's configuration has no epsilon of norms"
    if config.final_norm == ("fc_norm.bias" in head):
        return "timm has one norm, before its pooling or after it"
    if "pre_logits.bias" in head:
        return "timm has no hidden layer in its head"
    return None if readout != "both" else "timm has no readout of class token and mean"


def _mlp_ratio(width: int, mlp_width: int) -> float:
    """timm takes int(width * ratio), which must not be cut to one less: 1152 * (4304 / 1152) could be 4303.99..."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width
