"""Other people's pretrained weights as our backbones, with the same function.

    backbone, about = load_foreign("dino_deitsmall16_pretrain_full_checkpoint.pth")  # everything is known
    backbone, about = load_foreign("mae_pretrain_vit_base.pth", family="mae")  # its names do not say whose it is
    backbone, about = load_foreign("my.safetensors", heads=6, gelu="exact", mean=..., std=...)
    backbone, about = open_backbone("runs/mpp")  # ours, or any of these

Layouts are told by names: timm's (ViT, AugReg, DeiT, hybrids, BiT), torchvision's, transformers' (ViT, DeiT, ViTMAE,
Dinov2), the releases of MoCo v3, DINO, MAE and DINOv2, Google's .npz of ViT, hybrids, big_vision and BiT. What names
and shapes do not say (sslvit.weights.foreign.facts) is known from the release or a config.json, or must be said. What
is left behind is told in `about`. A file with a classifier was trained on labels, which must be meant: leave_head=True.
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sslvit.errors import DataError
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.objectives.mae import MAE
from sslvit.weights.folder import load_described, load_strictly, unfinished_run
from sslvit.weights.foreign import build, files, google
from sslvit.weights.foreign.facts import (
    FAMILIES,
    Facts,
    add_family,
    add_timm_config,
    add_transformers_config,
    check_claims,
    pair,
)
from sslvit.weights.foreign.names import Found, classifiers, find, summary, to_timm, with_our_tokens

Size = int | Sequence[int]


def open_backbone(path: str | Path, **said: Any) -> tuple[ViT | BiT, dict[str, Any]]:
    """A run's folder, a model folder of ours, or anybody's file or folder, for which see load_foreign. In evaluation
    mode, with what is written about it: at least its `readout`."""
    if not is_ours(path):
        return load_foreign(path, **said)
    if said:
        raise ValueError(f"{path} is a model of sslvit, which says everything itself: leave out {', '.join(said)}")
    folder = Path(path).parent if Path(path).is_file() else path  # with the config.json that belongs to it
    return load_described(folder)


def is_ours(path: str | Path) -> bool:
    """A run's folder, also of one that has not ended, its model's, or the file in that."""
    if unfinished_run(path) is not None:
        return True
    folder = Path(path) / "model" if (Path(path) / "model" / "config.json").exists() else Path(path)
    if folder.name == "model.safetensors" and folder.is_file():
        folder = folder.parent
    return "sslvit" in (files.config_of(folder) or {})


def start_from(folder: str, *, image_size: Size, channels: int) -> ViT | BiT:
    """The model given by --init_from, resized to this run's images."""
    backbone = _as_it_is(folder)
    if backbone.channels != channels:
        raise ValueError(f"--init_from {folder} takes images of {backbone.channels} channels, these have {channels}")
    if isinstance(backbone, ViT) and backbone.image_size != pair(image_size):
        backbone = backbone.resized(image_size)
    return backbone.train()


class HoldsClassifier(DataError):
    """A file was trained on labels, and leave_head does not say that this is meant."""

    def __init__(self, what: str):
        self.what = what
        super().__init__(f"{what}. If its backbone is what you want, say leave_head=True (--foreign leave_head=true)")


def _as_it_is(folder: str) -> ViT | BiT:
    """Of --init_from, beside which nothing can be said of another's file; `convert` is where that can be said."""
    command = f"python -m sslvit convert {shlex.quote(folder)} NEW --foreign"
    try:
        return open_backbone(folder)[0]
    except HoldsClassifier as error:
        raise DataError(
            f"{error.what}. For --init_from, run `{command} leave_head=true`, then say --init_from NEW"
        ) from error
    except DataError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{error}. For --init_from, run `{command} NAME=VALUE ...`, then say --init_from NEW"
        ) from error


def load_foreign(
    path: str | Path,
    *,
    family: str | None = None,
    part: str | None = None,
    heads: int | None = None,
    gelu: str | None = None,
    epsilon: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: Size | None = None,
    resize_to: Size | None = None,
    leave_head: bool = False,
    drop_distillation: bool = False,
) -> tuple[ViT | BiT, dict[str, Any]]:
    """The backbone, in evaluation mode, and what is known about it.

    family: the release that a file is from, if its names do not say (one of FAMILIES). part: which of several backbones
    in a file, by a word of its path; without, DINO's teacher and MoCo v3's base encoder. image_size: as it was trained,
    where the table of positions does not tell. resize_to: resizes that table for good; for other images it is resized
    as they come, in both cases as the code does that it is from. drop_distillation: without, DeiT's token is
    kept, as a register, since the other tokens were trained to see it.
    """
    contents = files.read(path)
    name = str(contents.file)
    said = {"heads": heads, "gelu": gelu, "epsilon": epsilon, "mean": mean, "std": std, "image_size": pair(image_size)}
    try:
        found = _translated(find(contents.parts, part, name), name)
        head = classifiers(found)
        if head and not leave_head:
            raise HoldsClassifier(
                f"{name} holds a classifier ({', '.join(head[:3])}): it is a linear probe's or was trained on labels"
            )
        facts = _known(contents, found, family, said)
        if found.family == "bit":
            if drop_distillation or any(option is not None for option in (heads, gelu, epsilon, resize_to)):
                raise ValueError(f"{name} is a BiT: it has neither heads, gelu and epsilon nor positions and tokens")
            notes: list[str] = []
            backbone = build.bit(found.weights, facts.values, name, found.layout)
        else:
            weights, notes = with_our_tokens(found, drop_distillation, name)
            facts.require(weights, {"layout": found.layout, "left behind": str(summary(found.left_behind) or "")})
            backbone = build.vit(weights, facts.values, pair(resize_to), name, found)
            if contents.config and found.layout in ("timm", "transformers") and "dist_token" not in found.weights:
                check_claims(name, contents.config, asdict(backbone.config))
    except (LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{name}: its weights have shapes that no such model has: {error!r}") from error
    notes += build.differences(backbone, found)
    notes += [f"it came with a classifier ({head[0]}): a linear probe's, or it was trained on labels"] if head else []
    return backbone, _about(backbone, contents, found, facts, family, notes)


def mae_from(
    path: str | Path,
    *,
    mask_ratio: float = 0.75,
    decoder_heads: int = 16,
    norm_pix_loss: bool = True,
    part: str | None = None,
    **said: Any,
) -> MAE:
    """A pretraining checkpoint of MAE's official code as the objective that it was trained by, decoder included, to
    train on or to see what it predicts. decoder_heads and norm_pix_loss: nothing in the file says them; the code's
    defaults are 16 heads, and normalised targets are the paper's better models. said: as for load_foreign."""
    backbone, _ = load_foreign(path, family="mae", part=part, **said)
    contents = files.read(path)
    rest = _translated(find(contents.parts, part, str(path)), str(path)).left_behind
    decoder = {name: t for name, t in rest.items() if name.startswith(("decoder_", "mask_token"))}
    if "decoder_embed.weight" not in decoder:
        raise DataError(f"{path} has no decoder: it is MAE's encoder alone, or fine-tuned. load_foreign opens it")
    depth = 1 + max((int(name.split(".")[1]) for name in decoder if name.startswith("decoder_blocks.")), default=-1)
    objective = MAE(
        backbone,
        mask_ratio=mask_ratio,
        decoder_width=len(decoder["decoder_embed.weight"]),
        decoder_depth=depth,
        decoder_heads=decoder_heads,
        norm_pix_loss=norm_pix_loss,
    )
    table = decoder.pop("decoder_pos_embed", None)
    if table is not None and not torch.allclose(table[:, 1:], objective.decoder_pos_embed, atol=1e-5):
        raise DataError(f"{path}: the positions of its decoder are not those of MAE's code")
    encoder = {f"backbone.{name}": t for name, t in backbone.state_dict().items()}
    load_strictly(objective, encoder | decoder, str(path))
    return objective


def _about(
    backbone: ViT | BiT, contents: files.Contents, found: Found, facts: Facts, family: str | None, notes: list[str]
) -> dict[str, Any]:
    """What can be written beside it as it is: sslvit.weights.folder.save_backbone takes this as its `extra`."""
    release, config = found.family or family, contents.config or contents.torchvision or {}
    readout = FAMILIES[release].readout if release else "cls"
    pooling = (config.get("model_args") or {}).get("global_pool") or config.get("global_pool")
    if pooling == "avg" or (isinstance(backbone, ViT) and not backbone.config.final_norm):
        readout = "mean"
    readout = config.get("sslvit_readout") or readout  # which an export of ours wrote
    return {
        "readout": readout if readout in backbone.readouts else "mean",
        "file": facts.name,
        "layout": found.layout,
        "part": found.part,
        "known": facts.as_text(),
        "left_behind": summary(found.left_behind),
        "notes": notes,
    }


def _translated(found: Found, name: str) -> Found:
    """Under timm's names, in float32."""
    found = found._replace(weights={n: t.float() if t.is_floating_point() else t for n, t in found.weights.items()})
    if bad := [n for n, t in found.weights.items() if not t.numel() or not t.isfinite().all()]:
        raise DataError(f"{name} has weights that are empty or not finite: {', '.join(bad[:5])}")
    translate = {"google": google.vit, "bit npz": google.bit}.get(found.layout, to_timm)
    return translate(found, name)


def _known(contents: files.Contents, found: Found, family: str | None, said: dict[str, Any]) -> Facts:
    """From shapes, the config beside the file, the release, the user, and last what all code with such names does."""
    name, config, beside = str(contents.file), contents.config or {}, contents.torchvision or {}
    facts = Facts(name)
    facts.add("the shape of its kernels", heads=found.heads)
    if "architecture" in config and found.layout in ("timm", "bit"):
        add_timm_config(facts, config, is_bit=found.layout == "bit")
    if "model_type" in config and found.layout == "transformers":
        add_transformers_config(facts, config, contents.preprocessor)
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family {family!r} is none of {', '.join(FAMILIES)}")
    if family is not None and found.family not in (None, family):
        raise ValueError(f"{name} has the names of {found.family}, not of family {family!r}")
    if "VisionTransformer" in beside and found.layout == "torchvision":
        heads = {"heads": beside["VisionTransformer"].get("num_heads")}
        facts.add("its torchvision.json", **heads, mean=beside.get("mean"), std=beside.get("std"))
    if release := found.family or family:
        add_family(facts, release, found.weights, said if family is None else {})
    facts.add("you", **said)
    if found.layout == "timm" and "epsilon" not in facts.values:
        facts.add("timm, whose names it has", epsilon=1e-6)
    facts.add("the code of such names", resize="bicubic" if found.layout == "timm" else "bicubic_plain")
    return facts
