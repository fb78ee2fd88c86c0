"""What weights compute and do not say: heads, GELU, epsilon, the images' mean and deviation, how positions are resized.

Two models with the same names and shapes can be different functions: MoCo v3's ViT-S has 12 heads and DINO's 6,
Google's code has the tanh GELU and the others' the exact one. So each fact comes from somewhere: from the shapes, from
the config file beside the weights, from the release that the names give away, or from the user. None is guessed, and
two that contradict each other stop the loading.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sslvit.errors import DataError
from sslvit.models.vit_config import IMAGENET_MEAN, IMAGENET_STD

HALF = (0.5, 0.5, 0.5)
TI, S, B, L, H = (192, 12), (384, 12), (768, 12), (1024, 24), (1280, 32)


class Family(NamedTuple):
    """A release, or the code that all models with its names run in."""

    heads: dict[tuple[int, int], int]  # by width and depth, of what was published
    gelu: str = "exact"
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    resize: str = "bicubic_plain"  # see sslvit.models.positions
    readout: str = "cls"
    epsilon: float = 1e-6


FAMILIES = {
    # https://github.com/facebookresearch/deit, also version III. (512, 12) is its ViT-M.
    "deit": Family({TI: 3, S: 6, (512, 12): 8, B: 12, L: 16, H: 16}),
    # https://github.com/facebookresearch/moco-v3, vits.py. It resizes nothing itself: DeiT's code fine-tunes it.
    "moco_v3": Family({S: 12, B: 12, L: 16, H: 16}),
    "dino": Family({TI: 3, S: 6, B: 12}, resize="bicubic_offset"),  # https://github.com/facebookresearch/dino
    "mae": Family({B: 12, L: 16, H: 16}),  # https://github.com/facebookresearch/mae
    # https://github.com/facebookresearch/dinov2; its models with registers resize with antialias and no offset.
    "dinov2": Family({S: 6, B: 12, L: 16, (1536, 40): 24}, resize="bicubic_offset"),
    # Google's weights in timm (https://arxiv.org/abs/2106.10270), whose GELU is not the one they were trained with.
    "augreg": Family({TI: 3, S: 6, B: 12, L: 16}, mean=HALF, std=HALF, resize="bicubic"),
    "torchvision": Family({B: 12, L: 16, H: 16}, resize="bicubic_corners"),
    # https://github.com/google-research/vision_transformer and big_vision: the shapes of its kernels say the heads.
    "google": Family({}, gelu="tanh", mean=HALF, std=HALF, resize="bilinear_corners"),
    "bit": Family({}, mean=HALF, std=HALF, readout="mean"),
}
NEEDED = ("heads", "gelu", "epsilon", "mean", "std", "resize")

# timm's plain ViTs: what is in a name decides the heads, and all of these have the exact GELU and epsilon 1e-6.
ARCHITECTURE = re.compile(
    r"(?:(?:vit|deit|deit3)_(tiny|small|medium|base|large|huge)(?:_distilled)?_patch\d+(?:_reg4)?_(?:\d+|dinov2)"
    r"|vit_(tiny|small|base|large)_r(?:26|50)?_s\d+(?:_p8)?_\d+)"
)
TIMM_HEADS = {"tiny": 3, "small": 6, "medium": 8, "base": 12, "large": 16, "huge": 16}
TIMM_DEPTH = {"tiny": 12, "small": 12, "medium": 12, "base": 12, "large": 24, "huge": 32}
TIMM_GELU = {"gelu": "exact", "gelu_tanh": "tanh", "gelu_pytorch_tanh": "tanh"}
# Of timm's arguments, those that shapes and names tell anyway, those of training, and those of the head.
TIMM_PLAIN = {
    "patch_size", "in_chans", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "init_values", "class_token", "reg_tokens",
    "no_embed_class", "dynamic_img_size", "num_classes", "global_pool", "fc_norm", "final_norm", "drop_rate",
    "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init",
}  # fmt: skip
TRANSFORMERS_GELU = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
TRANSFORMERS = {"vit", "deit", "vit_mae", "dinov2", "dinov2_with_registers"}


def claims(config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json of timm or transformers says about shapes, which the weights must show."""
    if "architecture" in config:
        arguments = config.get("model_args") or {}
        found = ARCHITECTURE.fullmatch(str(config["architecture"]))
        said = {"depth": arguments.get("depth", TIMM_DEPTH.get(found[1] or found[2]) if found else None)}
        said |= {"width": arguments.get("embed_dim")}
        said |= {"patch_size": None if found and found[2] else arguments.get("patch_size")}  # of hybrids, of features
        said |= {"registers": arguments.get("reg_tokens"), "qkv_bias": arguments.get("qkv_bias")}
        if "init_values" in arguments:
            said["layer_scale"] = arguments["init_values"] is not None
    else:
        kind = config.get("model_type")
        said = {"depth": config.get("num_hidden_layers"), "width": config.get("hidden_size")}
        said |= {"patch_size": config.get("patch_size"), "mlp_width": config.get("intermediate_size")}
        said |= {"qkv_bias": config.get("qkv_bias")}
        if kind in ("dinov2", "dinov2_with_registers"):
            said |= {"layer_scale": True, "mlp_width": None, "registers": config.get("num_register_tokens", 0)}
    return {name: value for name, value in said.items() if value is not None}


def check_claims(name: str, config: dict[str, Any], shows: dict[str, Any]) -> None:
    """shows: the arguments of the ViT that was built of the weights."""
    shown = {name: shows[name] for name in ("depth", "width", "mlp_width", "registers", "qkv_bias")}
    shown |= {"patch_size": tuple(shows["patch_size"]), "layer_scale": shows["layer_scale"] is not None}
    wrong = []
    for what, said in claims(config).items():
        said = pair(said) if what == "patch_size" else said
        if said != shown[what]:
            wrong.append(f"{what} {said} (the weights: {shown[what]})")
    if wrong:
        raise DataError(
            f"{name}: the config.json beside it says {', '.join(wrong)}: weights are missing, or it belongs to others"
        )


class Facts:
    """Each fact with where it is from; a second source may agree, and must not say something else."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}

    def add(self, source: str, **facts: Any) -> None:
        for fact, value in facts.items():
            if value is None:
                continue
            check_number(self.name, fact, value, source)
            value = value if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
            if fact == "resize" and fact in self.values:
                continue  # a habit of code, not of weights: timm resizes the positions of DeiT in its own way
            if fact in self.values and self.values[fact] != value:
                raise ValueError(
                    f"{self.name}: {fact} is {self.values[fact]} by {self.sources[fact]}, and {value} by {source}. "
                    "With the wrong one the weights would load, and compute something else"
                )
            self.values[fact] = value
            self.sources.setdefault(fact, source)

    def missing(self, needed: Sequence[str] = NEEDED) -> list[str]:
        return [fact for fact in needed if fact not in self.values]

    def require(self, weights: dict[str, Tensor], told: dict[str, Any]) -> None:
        """What a ViT is made of beside its weights; else one sentence with all that is to be said.

        told: what else is known of the file, `layout` at least.
        """
        width, depth = weights["patch_embed.proj.weight"].shape[0], depth_of(weights)
        if missing := self.missing():
            told = {"layout": told["layout"]} | shapes(weights) | told | {"known": self.as_text()}
            known = {name: f.heads[width, depth] for name, f in FAMILIES.items() if (width, depth) in f.heads}
            raise Unsaid(
                f"{self.name} (width {width}, depth {depth}): nothing in it says {', '.join(missing)}. Say them "
                f"({', '.join(f'{name}=...' for name in missing)}), or say which release it is from, family= one of "
                f"{', '.join(FAMILIES)}. Published heads of this size: {known or 'none'}",
                told | {"not known": ", ".join(missing)},
            )

    def as_text(self) -> dict[str, str]:
        return {fact: f"{value} ({self.sources[fact]})" for fact, value in self.values.items()}


def check_number(name: str, fact: str, value: Any, source: str) -> None:
    """Whatever a file says, these are numbers that a model can have."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    positive = fact in ("heads", "epsilon", "std", "image_size")
    if fact not in ("gelu", "resize") and not all(
        isinstance(one, int | float) and math.isfinite(one) and (one > 0 or not positive) for one in values
    ):
        raise DataError(f"{name}: {fact} is {value!r} by {source}, which no model has")


def add_family(facts: Facts, family: str, weights: dict[str, Tensor], said: dict[str, Any]) -> None:
    """said: by the user, where names alone gave the family away. They give away the code, and so what it computes; the
    constants of images are those of what was published, and may be others of what somebody else trained with it."""
    chosen = FAMILIES[family]
    constants = {
        name: getattr(chosen, name) for name in ("mean", "std") if said.get(name) is None and name not in facts.values
    }
    if family == "bit":
        facts.add("the bit release", **constants)
        return
    size = weights["patch_embed.proj.weight"].shape[0], depth_of(weights)
    resize = "bicubic" if family == "dinov2" and "register_tokens" in weights else chosen.resize
    told = {"gelu": chosen.gelu, "epsilon": chosen.epsilon, "resize": resize} | constants
    facts.add(f"the {family} release", heads=chosen.heads.get(size), **told)


class Unsaid(ValueError):
    """Not all is known that a file's weights need to become a model; `told` is what is."""

    def __init__(self, sentence: str, told: dict[str, Any]):
        super().__init__(sentence)
        self.told = told


def shapes(weights: dict[str, Tensor]) -> dict[str, str]:
    """What weights under timm's names say of themselves."""
    kernel, millions = weights["patch_embed.proj.weight"], sum(tensor.numel() for tensor in weights.values()) / 1e6
    sizes = f"width {kernel.shape[0]}, depth {depth_of(weights)}, {millions:.1f} million parameters"
    registers = f"{weights['reg_token'].shape[1]} registers" if "reg_token" in weights else ""
    hybrid = any(name.startswith("patch_embed.backbone.") for name in weights)
    patches = " x ".join(map(str, kernel.shape[2:]))
    return {
        "variant": f"{sizes}{', a ResNet as its stem' if hybrid else ''}",
        "images": "" if hybrid else f"{kernel.shape[1]} channels, in patches of {patches} px",
        "tokens": ", ".join(filter(None, ["a class token" if "cls_token" in weights else "no class token", registers])),
        "positions": f"a table of {weights['pos_embed'].shape[1]} rows" if "pos_embed" in weights else "no table",
    }


def depth_of(weights: dict[str, Tensor]) -> int:
    return 1 + max((int(m[1]) for name in weights if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)


def add_timm_config(facts: Facts, config: dict[str, Any], is_bit: bool) -> None:
    """The config.json of a timm model. Raises DataError for an architecture or option whose function is not known."""
    name, arguments = str(config["architecture"]), config.get("model_args") or {}
    found = re.fullmatch(r"resnetv2_\d+x\d+_bit(m?)()", name) if is_bit else ARCHITECTURE.fullmatch(name)
    if found is None:
        raise DataError(
            f"{facts.name}: timm's architecture {name!r} is none of those whose function is known here. If you know it "
            "to be a plain ViT, copy the file to where no config.json is, under another name, and say what it needs"
        )
    unknown = set(arguments) - TIMM_PLAIN - {"img_size", "num_heads", "act_layer", "pos_embed"}
    if unknown or arguments.get("pos_embed", "learn") != "learn":
        raise DataError(f"{facts.name}: its model_args have {sorted(unknown) or 'pos_embed'}, which is not known here")
    act = arguments.get("act_layer") or "gelu"
    if act not in TIMM_GELU:
        raise DataError(f"{facts.name}: its act_layer {act!r} is none of {sorted(TIMM_GELU)}, which this ViT has")
    cfg = config.get("pretrained_cfg") or {}
    size = arguments.get("img_size") or (cfg.get("input_size") or [None])[1:]
    facts.add(f"{name} in its config.json", mean=cfg.get("mean"), std=cfg.get("std"), image_size=pair(size))
    if not is_bit:
        heads = arguments.get("num_heads") or TIMM_HEADS[found[1] or found[2]]
        facts.add(f"{name} in its config.json", heads=heads, gelu=TIMM_GELU[act], epsilon=1e-6, resize="bicubic")


def add_transformers_config(facts: Facts, config: dict[str, Any], preprocessor: dict[str, Any] | None) -> None:
    kind, act = config.get("model_type"), config.get("hidden_act", "gelu")
    if kind not in TRANSFORMERS:
        raise DataError(f"{facts.name}: transformers' model_type {kind!r} is none of {sorted(TRANSFORMERS)}")
    if act not in TRANSFORMERS_GELU:
        raise DataError(f"{facts.name}: its hidden_act {act!r} is none of {sorted(TRANSFORMERS_GELU)}")
    facts.add(
        "its config.json",
        heads=config.get("num_attention_heads"),
        gelu=TRANSFORMERS_GELU[act],
        epsilon=config.get("layer_norm_eps"),
        image_size=pair(config.get("image_size")),
        resize="bicubic" if kind == "dinov2_with_registers" else "bicubic_plain",
    )
    if preprocessor is not None:
        rescales = preprocessor.get("do_rescale", True)
        if rescales and abs(preprocessor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise DataError(f"{facts.name}: its preprocessor_config.json has a rescale_factor other than 1/255")
        normal, most = preprocessor.get("do_normalize", True), 1 if rescales else 255
        mean, std = (
            (preprocessor.get("image_mean"), preprocessor.get("image_std")) if normal else ((0.0,) * 3, (1.0,) * 3)
        )
        mean, std = (values and tuple(value / most for value in values) for values in (mean, std))
        facts.add("its preprocessor_config.json", mean=mean, std=std)


def pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if not size:
        return None
    try:
        height, width = (size, size) if isinstance(size, int) else size
    except (TypeError, ValueError) as error:
        raise DataError(f"a size of {size!r} is neither one number nor height and width") from error
    return height, width
