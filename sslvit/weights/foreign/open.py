"""Other people's pretrained weights as our backbones, with the same function.

    backbone, about = load_foreign("dino_deitsmall16_pretrain_full_checkpoint.pth")  # everything is known
    backbone, about = load_foreign("mae_pretrain_vit_base.pth", family="mae")  # its names do not show the release
    backbone, about = load_foreign("my.safetensors", heads=6, gelu="exact", mean=..., std=...)
    backbone, about = open_backbone("runs/mpp")  # ours, or any of these

Names show the layout: timm's (ViT, AugReg, DeiT, BEiT, hybrids, BiT, DINOv3), torchvision's, transformers' (ViT, DeiT,
MAE, BEiT, data2vec, DINOv2, DINOv3, image towers of CLIP and SigLIP), the releases of MoCo v3, DINO, MAE, BEiT, DINOv2,
DINOv3 and CLIP, Google's .npz of ViT, hybrids, big_vision and BiT. Facts that names and shapes do not show
(sslvit.weights.foreign.facts) come from the release, a config.json or arguments. `about` lists the weights that are
left behind. A file with a classifier was trained on labels, which needs leave_head=True.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sslvit.errors import DataError
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.processes import collectives
from sslvit.weights.channels import with_channels
from sslvit.weights.folder import load_described, unfinished_run
from sslvit.weights.foreign import build, files, google
from sslvit.weights.foreign.facts import (
    FAMILIES,
    Facts,
    add_family,
    add_timm_config,
    add_transformers_config,
    check_config,
    pair,
)
from sslvit.weights.foreign.names import Located, classifiers, locate, summary, to_timm, with_our_tokens

Size = int | Sequence[int]


def open_backbone(path: str | Path, **facts: Any) -> tuple[ViT | BiT, dict[str, Any]]:
    """The backbone, in evaluation mode, and its description, which has at least its `readout`. path: a run's folder, a
    model folder of sslvit, or another's file or folder, with facts as for load_foreign."""
    if not is_ours(path):
        return load_foreign(path, **facts)
    if facts:
        raise ValueError(f"{path} is a model of sslvit, which says everything itself: leave out {', '.join(facts)}")
    folder = Path(path).parent if Path(path).is_file() else path  # with the config.json that belongs to it
    return load_described(folder)


def is_ours(path: str | Path) -> bool:
    """Whether this is a run's folder, finished or not, its model's, or the file in that."""
    if unfinished_run(path) is not None:
        return True
    folder = Path(path) / "model" if (Path(path) / "model" / "config.json").exists() else Path(path)
    if folder.name == "model.safetensors" and folder.is_file():
        folder = folder.parent
    return "sslvit" in (files.config_of(folder) or {})


def start_from(folder: str, *, image_size: Size, channels: int, inflate: str = "") -> ViT | BiT:
    """The model given by --init_from, for this run's images."""
    return fitted(as_it_is(folder), folder, image_size, channels, inflate)


def fitted(backbone: ViT | BiT, folder: str, image_size: Size, channels: int, inflate: str) -> ViT | BiT:
    """What --init_from names, opened before, resized to a run's images."""
    backbone = with_channels(backbone, channels, inflate, f"--init_from {folder}")
    if isinstance(backbone, ViT) and backbone.image_size != pair(image_size):
        backbone = backbone.resized(image_size)
    return backbone.train()


class HoldsClassifier(DataError):
    """A file was trained on labels, which leave_head=True must confirm."""

    def __init__(self, what: str):
        self.what = what
        super().__init__(f"{what}. For its backbone alone, give leave_head=True (--foreign leave_head=true)")


def as_it_is(folder: str, *, leave_head: bool = False) -> ViT | BiT:
    """The model of --init_from. Facts that another's file lacks can be said to `convert`. leave_head: take a
    classifier's backbone, and say so."""
    try:
        backbone, about = open_backbone(folder, **{"leave_head": True} if leave_head and not is_ours(folder) else {})
        if leave_head and collectives.rank() == 0:
            for note in about.get("notes", ()):
                print(f"note: --init_from {folder}: {note}")
        return backbone
    except ValueError as error:
        if isinstance(error, DataError) and not isinstance(error, HoldsClassifier):
            raise
        facts = "leave_head=true" if isinstance(error, HoldsClassifier) else "NAME=VALUE ..."
        command = f"sslvit convert {shlex.quote(folder)} NEW --foreign {facts}"
        kind = DataError if isinstance(error, DataError) else ValueError
        what = error.what if isinstance(error, HoldsClassifier) else error
        raise kind(f"{what}. For --init_from, run `{command}`, then give --init_from NEW") from error


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
    periods: str | None = None,
    leave_head: bool = False,
) -> tuple[ViT | BiT, dict[str, Any]]:
    """The backbone, in evaluation mode, and its description.

    family: the release, one of FAMILIES, if names do not show it. part: which of several backbones in a file, by a word
    of its path; by default DINO's teacher and MoCo v3's base encoder. image_size: in training, if the table of
    positions does not show it. periods: "exact" replaces the rounded rotary periods in Meta's files of DINOv3 by those
    that timm and transformers compute. leave_head: take the backbone of a classifier.
    """
    contents = files.read(path)
    name = str(contents.file)
    options = {
        "heads": heads,
        "gelu": gelu,
        "epsilon": epsilon,
        "mean": mean,
        "std": std,
        "image_size": pair(image_size),
    }
    try:
        located = _translated(locate(contents.state_dicts, part, name), name)
        head = classifiers(located)
        if head and not leave_head:
            raise HoldsClassifier(
                f"{name} holds a classifier ({', '.join(head[:3])}): a linear probe's, or it was trained on labels"
            )
        facts = _known(contents, located, family, options, periods)
        if located.family == "bit":
            if any(option is not None for option in (heads, gelu, epsilon)):
                raise ValueError(f"{name} is a BiT: it has no heads, no gelu and no epsilon")
            notes: list[str] = []
            backbone = build.bit(located.weights, facts.values, name, located.layout)
        else:
            weights, notes = with_our_tokens(located, name)
            facts.require(weights, {"layout": located.layout, "left behind": str(summary(located.left_behind) or "")})
            backbone = build.vit(weights, facts.values, name, located)
            if (
                contents.config
                and located.layout.startswith(("timm", "transformers"))
                and "dist_token" not in located.weights
            ):
                check_config(name, contents.config, backbone.config)
    except (LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{name}: its weights have shapes that no such model has: {error!r}") from error
    notes += build.differences(backbone, located)
    trained = "a linear probe's, or it was trained on labels"
    notes += [f"its classifier ({head[0]}) is left out: {trained}"] if head else []
    return backbone, _about(backbone, contents, located, facts, family, notes)


def _about(
    backbone: ViT | BiT, contents: files.Contents, located: Located, facts: Facts, family: str | None, notes: list[str]
) -> dict[str, Any]:
    """The description, which sslvit.weights.folder.save_backbone takes as its `extra`."""
    release, config = located.family or family, contents.config or contents.torchvision or {}
    readout = FAMILIES[release].readout if release else "cls"
    pooling = (config.get("model_args") or {}).get("global_pool") or config.get("global_pool")
    by_mean = isinstance(backbone, ViT) and (
        not backbone.config.final_norm or (backbone.position == "relative_bias" and pooling != "token")
    )  # which is what BEiT, data2vec and their classifiers read
    if pooling == "avg" or by_mean:
        readout = "mean"
    readout = config.get("sslvit_readout") or readout  # of our exports
    return {
        "readout": readout if readout in backbone.readouts else "mean",
        "file": facts.name,
        "layout": located.layout,
        "part": located.part,
        "known": facts.as_text(),
        "left_behind": summary(located.left_behind),
        "notes": notes,
    }


def _translated(located: Located, name: str) -> Located:
    """Under timm's names, in float32."""
    weights = {n: t.float() if t.is_floating_point() else t for n, t in located.weights.items()}
    # transformers' DINOv3 without registers has an empty tensor of them, and Meta's masked bias may be no number.
    weights = {n: t for n, t in weights.items() if t.numel() or not n.endswith("register_tokens")}
    masked = {n for n in weights if f"{n}_mask" in weights}
    if bad := [n for n, t in weights.items() if not t.numel() or not (t.isfinite().all() or n in masked)]:
        raise DataError(f"{name} has weights that are empty or not finite: {', '.join(bad[:5])}")
    translate = {"google": google.vit, "bit npz": google.bit}.get(located.layout, to_timm)
    return translate(located._replace(weights=weights), name)


def _known(
    contents: files.Contents, located: Located, family: str | None, options: dict[str, Any], periods: str | None
) -> Facts:
    """Facts from shapes, the config file, the release, the user, and last the habits of all code with such names."""
    name, config, beside = str(contents.file), contents.config or {}, contents.torchvision or {}
    facts = Facts(name)
    facts.add("the shape of its kernels", heads=located.heads)
    if periods not in (None, "exact"):
        raise ValueError(f"periods must be exact, or be left out for those in the file, got {periods!r}")
    shown = {name: value for name, value in located.facts.items() if name != "rope_periods" or not periods}
    facts.add("its names", **shown)
    if "architecture" in config and located.layout in ("timm", "bit"):
        add_timm_config(facts, config, is_bit=located.layout == "bit")
    if "model_type" in config and located.layout.startswith("transformers"):
        add_transformers_config(facts, config, contents.preprocessor)
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if family is not None and located.family not in (None, family):
        raise ValueError(f"{name} has the names of {located.family}, not of family {family!r}")
    if "VisionTransformer" in beside and located.layout == "torchvision":
        heads = beside["VisionTransformer"].get("num_heads")
        facts.add("its torchvision.json", heads=heads, mean=beside.get("mean"), std=beside.get("std"))
    if release := located.family or family:
        add_family(facts, release, located.weights, options if family is None else {})
    facts.add("you", **options)
    if located.layout == "timm" and "epsilon" not in facts.values:
        facts.add("timm, whose names it has", epsilon=1e-6)
    facts.add("the code of such names", resize="bicubic" if located.layout == "timm" else "bicubic_plain")
    return facts
