"""Facts that a model's weights depend on but do not show: heads, GELU, epsilon, mean and std of images, resizing.

Two models with the same names and shapes can be different functions: MoCo v3's ViT-S has 12 heads and DINO's 6,
Google's code has the tanh GELU and the others' the exact one. So each fact has a source: the shapes, the config file
beside the weights, the release that the names imply, or the user. None is guessed, and two sources that contradict each
other stop the loading.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sslvit.errors import DataError
from sslvit.models.blocks import EPSILON
from sslvit.models.positions import to_pair
from sslvit.models.vit_config import IMAGENET_MEAN, IMAGENET_STD, ViTConfig

HALF = (0.5, 0.5, 0.5)
TI, S, B, L, H = (192, 12), (384, 12), (768, 12), (1024, 24), (1280, 32)


class Family(NamedTuple):
    """A release, or the code of all models with its names."""

    heads: dict[tuple[int, int], int]  # of published models, by width and depth
    gelu: str = "exact"
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    resize: str = "bicubic_plain"  # see sslvit.models.positions
    readout: str = "cls"
    epsilon: float = EPSILON


FAMILIES = {
    # https://github.com/facebookresearch/deit, also version III. (512, 12) is its ViT-M.
    "deit": Family({TI: 3, S: 6, (512, 12): 8, B: 12, L: 16, H: 16}),
    # https://github.com/facebookresearch/moco-v3, vits.py. It resizes nothing itself: DeiT's code fine-tunes it.
    "moco_v3": Family({S: 12, B: 12, L: 16, H: 16}),
    "dino": Family({TI: 3, S: 6, B: 12}, resize="bicubic_offset"),  # https://github.com/facebookresearch/dino
    "mae": Family({B: 12, L: 16, H: 16}),  # https://github.com/facebookresearch/mae
    # https://github.com/facebookresearch/dinov2; its models with registers resize with antialias and no offset.
    "dinov2": Family({S: 6, B: 12, L: 16, (1536, 40): 24}, resize="bicubic_offset"),
    # https://github.com/facebookresearch/dinov3. S+ has the size of S, and (192, 12) is of EUPE, which has its code.
    "dinov3": Family({TI: 3, S: 6, B: 12, L: 16, H: 20, (4096, 40): 32}, resize="bicubic", epsilon=1e-5),
    # https://github.com/microsoft/unilm, beit and beit2. The shapes of their tables show the heads.
    "beit": Family({}, mean=HALF, std=HALF, resize="geometric", readout="mean"),
    "beitv2": Family({}, resize="geometric", readout="mean"),
    # https://github.com/openai/CLIP. Others who trained with open_clip's code mostly have the exact GELU.
    "clip": Family(
        {B: 12, L: 16},
        gelu="sigmoid",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        resize="bicubic",
        epsilon=1e-5,
    ),
    # Google's weights in timm (https://arxiv.org/abs/2106.10270), with another GELU than they were trained with.
    "augreg": Family({TI: 3, S: 6, B: 12, L: 16}, mean=HALF, std=HALF, resize="bicubic"),
    "torchvision": Family({B: 12, L: 16, H: 16}, resize="bicubic_corners"),
    # https://github.com/google-research/vision_transformer and big_vision, whose kernels show the heads.
    "google": Family({}, gelu="tanh", mean=HALF, std=HALF, resize="bilinear_corners"),
    "bit": Family({}, mean=HALF, std=HALF, readout="mean"),
}
NEEDED = ("heads", "gelu", "epsilon", "mean", "std", "resize")

# timm's plain ViTs: the size in the name implies the heads, and all of them have the exact GELU and epsilon 1e-6.
ARCHITECTURE = re.compile(
    r"(?:(?:vit|deit|deit3)_(tiny|small|medium|base|large|huge)(?:_distilled)?_patch\d+(?:_reg4)?_(?:\d+|dinov2)"
    r"|vit_(tiny|small|base|large)_r(?:26|50)?_s\d+(?:_p8)?_\d+|vit_(giant)_patch14(?:_reg4)?_dinov2)"
)
TIMM_HEADS = {"tiny": 3, "small": 6, "medium": 8, "base": 12, "large": 16, "huge": 16, "giant": 24}
TIMM_DEPTH = {"tiny": 12, "small": 12, "medium": 12, "base": 12, "large": 24, "huge": 32, "giant": 40}
# timm's DINOv3, of its class Eva: heads and depth.
TIMM_DINOV3 = re.compile(r"vit_(tiny|small|small_plus|base|large|huge_plus|7b)_patch16_dinov3(?:_qkvb)?")
DINOV3_SIZES = {
    "tiny": (3, 12), "small": (6, 12), "small_plus": (6, 12), "base": (12, 12), "large": (16, 24),
    "huge_plus": (20, 32), "7b": (32, 40),
}  # fmt: skip
TIMM_GELU = {"gelu": "exact", "gelu_tanh": "tanh", "gelu_pytorch_tanh": "tanh"}
# Arguments of timm that shapes and names show anyway, or that concern training or the head.
TIMM_PLAIN = {
    "patch_size", "in_chans", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "init_values", "class_token", "reg_tokens",
    "no_embed_class", "dynamic_img_size", "num_classes", "global_pool", "fc_norm", "final_norm", "drop_rate",
    "pre_norm", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init",
}  # fmt: skip
# timm's image towers of CLIP and SigLIP. Some SigLIPs of its have the exact GELU, and were trained with the other.
TIMM_CLIP = re.compile(r"vit_(base|large|huge)_patch\d+_clip(_quickgelu)?_\d+")
TIMM_SIGLIP = re.compile(r"vit_(base|large|so400m)_patch\d+_siglip_\d+")
SIGLIP_TANH = re.compile(r"vit_(base_patch32|large_patch16_siglip_512|so400m_patch16).*")
TIMM_BEIT = re.compile(r"beit(?:v2)?_(base|large)_patch16_\d+")
BEIT_PLAIN = TIMM_PLAIN | {
    "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias", "use_fc_norm", "head_init_scale",
}  # fmt: skip
EVA_PLAIN = (TIMM_PLAIN - {"reg_tokens", "fc_norm"}) | {
    "num_reg_tokens", "use_fc_norm", "swiglu_mlp", "swiglu_align_to", "rope_temperature", "num_heads", "img_size",
}  # fmt: skip
TRANSFORMERS_GELU = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
DINOV2 = ("dinov2", "dinov2_with_registers")
CLIP = ("clip_vision_model", "siglip_vision_model", "clip", "siglip")  # the last two have a text tower too
BEIT = ("beit", "data2vec-vision")
TRANSFORMERS = {"vit", "deit", "vit_mae", "vit_msn", "ijepa", "dinov3_vit", *DINOV2, *CLIP, *BEIT}
ROPE = {"rope_base": 100.0, "rope_rescale": 2.0}  # of DINOv3 in its own hub and in transformers; timm's moves nothing


class MissingFacts(ValueError):
    """Facts that a file's weights need are not known; `known` has those that are."""

    def __init__(self, message: str, known: dict[str, Any]):
        super().__init__(message)
        self.known = known


class Facts:
    """Each fact with its source. A second source may agree, but not contradict."""

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

    def require(self, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Raises MissingFacts unless all facts of a ViT are known. about: its layout and other entries to report."""
        missing = [fact for fact in NEEDED if fact not in self.values]
        if not missing:
            return
        width, depth = size_of(weights)
        published = {name: f.heads[width, depth] for name, f in FAMILIES.items() if (width, depth) in f.heads}
        known = {"layout": about["layout"]} | shapes(weights) | about | {"known": self.as_text()}
        raise MissingFacts(
            f"{self.name} (width {width}, depth {depth}): nothing in it says {', '.join(missing)}. Say them "
            f"({', '.join(f'{name}=...' for name in missing)}), or say which release it is from, family= one of "
            f"{', '.join(FAMILIES)}. Published heads of this size: {published or 'none'}",
            known | {"not known": ", ".join(missing)},
        )

    def as_text(self) -> dict[str, str]:
        shown = {fact: "as in the file" if fact == "rope_periods" else value for fact, value in self.values.items()}
        return {fact: f"{value} ({self.sources[fact]})" for fact, value in shown.items()}


def check_number(name: str, fact: str, value: Any, source: str) -> None:
    """Raises DataError for numbers that no model can have."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    positive = fact in ("heads", "epsilon", "std", "image_size", "rope_base")
    if fact not in ("gelu", "resize") and not all(
        isinstance(one, int | float) and math.isfinite(one) and (one > 0 or not positive) for one in values
    ):
        raise DataError(f"{name}: {fact} is {value!r} by {source}, which no model has")


def add_family(facts: Facts, family: str, weights: dict[str, Tensor], options: dict[str, Any]) -> None:
    """options: of the user, if names alone imply the family. They imply its code, but mean and std of images may be
    others where somebody else trained with that code."""
    release, source = FAMILIES[family], f"the {family} release"
    if family != "bit":
        registers = {"register_tokens", "reg_token"} & weights.keys()
        resize = "bicubic" if family == "dinov2" and registers else release.resize
        heads = release.heads.get(size_of(weights))
        facts.add(source, heads=heads, gelu=release.gelu, epsilon=release.epsilon, resize=resize)
    if family == "dinov3" and "rope_base" not in facts.values:
        facts.add(source, **ROPE)
    if family == "dinov2" and _is_gated(weights):  # under timm's names, which do not show by what
        facts.add(source, swiglu=True)
    for name in ("mean", "std"):
        if options.get(name) is None and name not in facts.values:
            facts.add(source, **{name: getattr(release, name)})


def _is_gated(weights: dict[str, Tensor]) -> bool:
    into, back = (weights.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    return into is not None and back is not None and len(into) == 2 * back.shape[-1]


def add_timm_config(facts: Facts, config: dict[str, Any], is_bit: bool) -> None:
    """The config.json of a timm model. Raises DataError for an unknown architecture or option."""
    name, arguments = str(config["architecture"]), config.get("model_args") or {}
    if not is_bit and TIMM_DINOV3.fullmatch(name):
        _add_timm_dinov3(facts, config)
        return
    named, constants = None, timm_constants(name)
    if is_bit:
        named, constants = re.fullmatch(r"resnetv2_\d+x\d+_bitm?", name), None
    if named is None and constants is None:
        raise DataError(
            f"{facts.name}: timm's architecture {name!r} is not one of those that are known here. If you know it to be "
            "a plain ViT, copy the file to where no config.json is, under another name, and say what it needs"
        )
    plain = BEIT_PLAIN if TIMM_BEIT.fullmatch(name) else TIMM_PLAIN
    unknown = set(arguments) - plain - {"img_size", "num_heads", "act_layer", "pos_embed"}
    if unknown or arguments.get("pos_embed", "learn") != "learn":
        raise DataError(f"{facts.name}: its model_args have {sorted(unknown) or 'pos_embed'}, which is not known here")
    act = arguments.get("act_layer")
    act = None if act == "silu" and constants and constants.swiglu else act  # the gate's
    gelus = TIMM_GELU | ({"quick_gelu": "sigmoid"} if TIMM_CLIP.fullmatch(name) else {})
    if act and act not in gelus:
        raise DataError(f"{facts.name}: its act_layer must be one of {sorted(gelus)}, got {act!r}")
    cfg, source = config.get("pretrained_cfg") or {}, f"{name} in its config.json"
    size = arguments.get("img_size") or (cfg.get("input_size") or [None])[1:]
    facts.add(source, mean=cfg.get("mean"), std=cfg.get("std"), image_size=pair(size))
    if constants:
        heads, gelu = arguments.get("num_heads") or constants.heads, gelus[act] if act else constants.gelu
        facts.add(source, heads=heads, gelu=gelu, epsilon=constants.epsilon, resize="bicubic")
        facts.add(source, swiglu=constants.swiglu or None)


class Constants(NamedTuple):
    """What an architecture of timm's implies where its arguments say nothing else."""

    heads: int
    depth: int
    gelu: str = "exact"
    epsilon: float = EPSILON
    swiglu: bool = False


def timm_constants(name: str) -> Constants | None:
    """Of a plain ViT, of BEiT, of DINOv2's giant, or of an image tower."""
    if beit := TIMM_BEIT.fullmatch(name):
        return Constants(TIMM_HEADS[beit[1]], TIMM_DEPTH[beit[1]])
    if named := ARCHITECTURE.fullmatch(name):
        size = named[1] or named[2] or named[3]
        return Constants(TIMM_HEADS[size], TIMM_DEPTH[size], swiglu=size == "giant")
    if clip := TIMM_CLIP.fullmatch(name):
        return Constants(TIMM_HEADS[clip[1]], TIMM_DEPTH[clip[1]], "sigmoid" if clip[2] else "exact", 1e-5)
    if siglip := TIMM_SIGLIP.fullmatch(name):
        heads, depth = (16, 27) if siglip[1] == "so400m" else (TIMM_HEADS[siglip[1]], TIMM_DEPTH[siglip[1]])
        return Constants(heads, depth, "tanh" if SIGLIP_TANH.fullmatch(name) else "exact")
    return None


def _add_timm_dinov3(facts: Facts, config: dict[str, Any]) -> None:
    name, arguments, cfg = config["architecture"], config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    if unknown := set(arguments) - EVA_PLAIN:
        raise DataError(f"{facts.name}: its model_args have {sorted(unknown)}, which is not known here")
    size = arguments.get("img_size") or (cfg.get("input_size") or [None])[1:]
    facts.add(
        f"{name} in its config.json",
        mean=cfg.get("mean"),
        std=cfg.get("std"),
        image_size=pair(size),
        heads=arguments.get("num_heads") or DINOV3_SIZES[name.split("_patch16")[0].removeprefix("vit_")][0],
        gelu="exact",
        epsilon=1e-5,
        resize="bicubic",
        key_bias=False,
        rope_base=arguments.get("rope_temperature") or ROPE["rope_base"],
        rope_rescale=ROPE["rope_rescale"],
    )


def add_transformers_config(facts: Facts, config: dict[str, Any], preprocessor: dict[str, Any] | None) -> None:
    kind = config.get("model_type")
    if kind not in TRANSFORMERS:
        raise DataError(f"{facts.name}: transformers' model_type must be one of {sorted(TRANSFORMERS)}, got {kind!r}")
    config = config.get("vision_config") or config if kind in CLIP else config
    default = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}.get(str(kind).partition("_")[0], "gelu")
    act, gated = config.get("hidden_act", default), kind == "dinov3_vit" and config.get("use_gated_mlp")
    known = {"silu": "exact"} if gated else TRANSFORMERS_GELU | ({"quick_gelu": "sigmoid"} if kind in CLIP else {})
    if act not in known:
        raise DataError(f"{facts.name}: its hidden_act must be one of {sorted(known)}, got {act!r}")
    facts.add(
        "its config.json",
        heads=config.get("num_attention_heads"),
        gelu=known[act],
        epsilon=config.get("layer_norm_eps"),
        image_size=pair(config.get("image_size")),
        resize="bicubic" if kind == "dinov2_with_registers" else "bicubic_plain",
    )
    if kind == "dinov3_vit":
        moves = {name: config.get(f"pos_embed_{name}") for name in ("shift", "jitter", "rescale")}
        facts.add(
            "its config.json",
            rope_base=config.get("rope_theta", ROPE["rope_base"]),
            **{f"rope_{name}": value for name, value in moves.items()},
        )
    if preprocessor is None:
        return
    rescales = preprocessor.get("do_rescale", True)
    if rescales and abs(preprocessor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise DataError(f"{facts.name}: its preprocessor_config.json has a rescale_factor other than 1/255")
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    if not preprocessor.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    largest = 1 if rescales else 255  # of a pixel
    mean, std = (values and tuple(value / largest for value in values) for values in (mean, std))
    facts.add("its preprocessor_config.json", mean=mean, std=std)


def check_config(name: str, config: dict[str, Any], vit: ViTConfig) -> None:
    """Raises DataError if a config.json of timm or transformers has other shapes than the weights beside it."""
    claims: dict[str, Any]
    if "architecture" in config:
        arguments, timms = config.get("model_args") or {}, str(config["architecture"])
        named, dinov3, constants = ARCHITECTURE.fullmatch(timms), TIMM_DINOV3.fullmatch(timms), timm_constants(timms)
        depth = DINOV3_SIZES[dinov3[1]][1] if dinov3 else constants and constants.depth
        claims = {
            "depth": arguments.get("depth", depth),
            "width": arguments.get("embed_dim"),
            # Of a hybrid it counts features instead of pixels.
            "patch_size": None if named and named[2] else pair(arguments.get("patch_size")),
            "registers": arguments.get("num_reg_tokens" if dinov3 else "reg_tokens"),
            "qkv_bias": arguments.get("qkv_bias"),
            "layer_scale": arguments["init_values"] is not None if "init_values" in arguments else None,
        }
    else:
        dinov2 = config.get("model_type") in DINOV2
        dino = dinov2 or config.get("model_type") == "dinov3_vit"
        config = config.get("vision_config") or config if config.get("model_type") in CLIP else config
        claims = {
            "depth": config.get("num_hidden_layers"),
            "width": config.get("hidden_size"),
            "patch_size": pair(config.get("patch_size")),
            "mlp_width": None if dinov2 else config.get("intermediate_size"),
            "registers": config.get("num_register_tokens", 0) if dino else None,
            "qkv_bias": config.get("qkv_bias"),
            "layer_scale": True if dino else None,
        }
    shown = {what: getattr(vit, what) for what in claims} | {"layer_scale": vit.layer_scale is not None}
    wrong = [
        f"{what} {claim} (the weights: {shown[what]})"
        for what, claim in claims.items()
        if claim is not None and claim != shown[what]
    ]
    if wrong:
        raise DataError(
            f"{name}: the config.json beside it says {', '.join(wrong)}: weights are missing, or it belongs to others"
        )


def shapes(weights: dict[str, Tensor]) -> dict[str, str]:
    """Sizes that weights under timm's names show, in words."""
    kernel, millions = weights["patch_embed.proj.weight"], sum(tensor.numel() for tensor in weights.values()) / 1e6
    width, depth = size_of(weights)
    hybrid = any(name.startswith("patch_embed.backbone.") for name in weights)
    tokens = ["a class token" if "cls_token" in weights else "no class token"]
    tokens += [f"{weights['reg_token'].shape[1]} registers"] if "reg_token" in weights else []
    patches = " x ".join(map(str, kernel.shape[2:]))
    relative = "a bias of attention by offset" if any(n.startswith("relative_bias") for n in weights) else "no table"
    return {
        "variant": f"width {width}, depth {depth}, {millions:.1f} million parameters"
        + (", a ResNet as its stem" if hybrid else ""),
        "images": "" if hybrid else f"{kernel.shape[1]} channels, in patches of {patches} px",
        "tokens": ", ".join(tokens),
        "positions": f"a table of {weights['pos_embed'].shape[1]} rows" if "pos_embed" in weights else relative,
    }


def size_of(weights: dict[str, Tensor]) -> tuple[int, int]:
    """Width and depth."""
    numbers = [int(m[1]) for name in weights if (m := re.match(r"blocks\.(\d+)\.", name))]
    return weights["patch_embed.proj.weight"].shape[0], 1 + max(numbers, default=-1)


def pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    try:
        return to_pair(size) if size else None
    except (TypeError, ValueError) as error:
        raise DataError(f"a size must be one number or height and width, got {size!r}") from error
