"""The layout of a file, the backbone in it, and its weights under timm's names, which are ours.

Every tensor of a file belongs to the backbone, or is left behind and reported, or is an error.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sslvit.errors import DataError, shortened
from sslvit.weights.foreign.joined import joined

# Each layout is recognised by one weight, wherever in the file it lies.
MARKS = {
    "patch_embed.proj.weight": "timm",
    "conv_proj.weight": "torchvision",
    "embeddings.patch_embeddings.projection.weight": "transformers",
    "embeddings.patch_embeddings.weight": "transformers DINOv3",
    "embeddings.patch_embedding.weight": "transformers CLIP",  # and SigLIP
    "visual.conv1.weight": "CLIP",  # OpenAI's and open_clip's
    "embedding/kernel": "google",
    "root_block/standardized_conv2d/kernel": "bit npz",
    "stem.conv.weight": "bit",  # last: a hybrid has it too
}
DEFAULTS = ("teacher", "base_encoder")  # evaluated by DINO and MoCo v3, which save a student and a momentum encoder too
LACKING = {
    r"\.attn\.[qk]_norm\.": "norms of queries and keys",
    r"\.attn\.wq\.": "queries that share their keys, as in Sapiens2",
    r"rel(ative)?_pos": "relative positions other than BEiT's",
    r"q_bias": "biases of q and v alone beside a table of positions",
    r"patch_embed\.proj\.0\.|conv_proj\.conv_bn": "a convolutional stem",
    r"\.(attn\.norm|mlp\.norm)\.": "norms inside its branches",
    r"masked_embed": "a mask inside its backbone, as in iBOT",
}
# Trained on labels: the head of a linear probe or a fine-tuned classifier, the norm and the hidden layer before it.
CLASSIFIER = re.compile(
    r"(?:.*[./ ])?(?:\w*classif\w*(?:\.\w+)?|\w*linear\w*(?:\.\w+)?|\w*logits\w*(?:\.fc)?|\w*probe\w*(?:\.\w+)?|"
    r"(?:cls|mlp|task)?_?heads?(?:_dist)?(?:\.\d+|\.fc|\.head|/conv2d)?|heads\.pre_logits|fc|lin|output|fc_norm)"
    r"[./](?:weight|bias|kernel|running_mean)"
)
# Not, although their names are like it: MoCo v3's projector, DINO's head, MAE's decoder, and all of other backbones.
NO_CLASSIFIER = re.compile(
    r"(?:.*[./ ])?(?:(?:base_encoder|momentum_encoder)\.head\.\d+|predictor\.\d+|head\.(?:mlp\.\d+|last_layer)|"
    r"decoder\w*(?:\..*)?|(?:blocks|layers?|encoder|text_model)\..*)\.\w+"
)
TABLE = "relative_position_bias_table"
TIMM_REST = re.compile(
    r"(head|head_dist|pre_logits|fc_norm|attn_pool|decoder\w*|mask_token|projectors|local_cls_norm|lm_head|"
    r"cls_pt_layers)(\..*)?"
)
# BEiT's tables of offsets, under names that differ by words alone: of each block, or of all.
BIAS_OF_BLOCK = re.compile(rf"blocks\.(\d+)\.(?:attn\.)?(?:attention\.)?(?:relative_position_bias\.)?{TABLE}")
BIAS_OF_ALL = re.compile(rf"(?:rel_pos_bias|encoder\.relative_position_bias|shared_position_bias)\.{TABLE}")
# Files of what no backbone is, by the names that they have.
OTHERS = {
    r"(^|\.)(text_model\.|token_embedding|text_projection|transformer\.resblocks|word_embeddings)": (
        "a text tower: the images' one is another file, or was left out"
    ),
    r"(^|\.)(stages\.\d+|layer[1-4]\.\d+|downsample_layers)\.": "a network of convolutions, and no ViT",
    r"(^|\.)((dino|ibot)_head|head|heads|classifier|last_layer|fc)\.": "a head without the backbone below it",
}

# Their names and ours, replaced in this order; exports use these tables backwards.
TORCHVISION = (
    ("class_token", "cls_token"),
    ("conv_proj.", "patch_embed.proj."),
    ("encoder.pos_embedding", "pos_embed"),
    ("encoder.layers.encoder_layer_", "blocks."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".self_attention.in_proj_", ".attn.qkv."),
    (".self_attention.out_proj.", ".attn.proj."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.3.", ".mlp.fc2."),
    ("encoder.ln.", "norm."),
)
TORCHVISION_OLD = ((".mlp.linear_1.", ".mlp.fc1."), (".mlp.linear_2.", ".mlp.fc2."))
TRANSFORMERS = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."),
    (".attention.output.dense.", ".attn.proj."),
    (".attention.attention.query.", ".attn.query."),
    (".attention.attention.key.", ".attn.key."),
    (".attention.attention.value.", ".attn.value."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    ("layernorm.", "norm."),
)
TRANSFORMERS_VIT = (  # but not DINOv2
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
)
TRANSFORMERS_BEIT = ((".lambda_1", ".ls1.gamma"), (".lambda_2", ".ls2.gamma"))  # and data2vec's
TRANSFORMERS_DINOV3 = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "reg_token"),
    ("embeddings.patch_embeddings.", "patch_embed.proj."),
    ("model.layer.", "layer."),  # in memory
    ("layer.", "blocks."),
    (".attention.o_proj.", ".attn.proj."),
    (".attention.", ".attn."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
)
TRANSFORMERS_CLIP = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("encoder.layers.", "blocks."),
    (".self_attn.out_proj.", ".attn.proj."),
    (".self_attn.", ".attn."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    ("pre_layrnorm.", "norm_pre."),  # so spelt
    ("post_layernorm.", "norm."),
)
CLIP = (
    ("visual.class_embedding", "cls_token"),
    ("visual.positional_embedding", "pos_embed"),
    ("visual.conv1.", "patch_embed.proj."),
    ("visual.transformer.resblocks.", "blocks."),
    ("visual.ln_pre.", "norm_pre."),
    ("visual.ln_post.", "norm."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
TRANSFORMERS_IN_MEMORY = (  # of version 5
    ("embeddings.distillation_token", "dist_token"),
    ("layers.", "blocks."),
    (".attention.o_proj.", ".attn.proj."),
    (".attention.", ".attn."),
)
RULES = {
    "torchvision": TORCHVISION + TORCHVISION_OLD,
    "transformers": TRANSFORMERS + TRANSFORMERS_VIT + TRANSFORMERS_BEIT + TRANSFORMERS_IN_MEMORY,
    "transformers DINOv3": TRANSFORMERS_DINOV3,
    "transformers CLIP": TRANSFORMERS_CLIP,
    "CLIP": CLIP,
    "timm": (("storage_tokens", "reg_token"),),  # DINOv3's own
}


class Located(NamedTuple):
    """A backbone in a file."""

    layout: str
    part: str  # the keys before the backbone's own names, "state_dict: module.base_encoder."
    family: str | None  # the release, where names imply it
    weights: dict[str, Tensor]
    left_behind: dict[str, Tensor]
    heads: int | None = None  # where the shapes of kernels show it
    facts: dict[str, Any] = {}  # noqa: RUF012 - that names show, such as swiglu


def locate(state_dicts: dict[str, dict[str, Tensor]], wanted: str | None, file: str) -> Located:
    """The one backbone in a file, or the one that is `wanted` by a word of its path: teacher, model_ema."""
    # Some of BiT's files number layers that need no number.
    state_dicts = {
        path: {re.sub(r"standardized_conv2d_\d+/", "standardized_conv2d/", name): t for name, t in tensors.items()}
        for path, tensors in state_dicts.items()
    }
    places = _places(state_dicts)
    names = sorted(f"{path}: {name}" if path else name for path, tensors in state_dicts.items() for name in tensors)
    if not places:
        refuse_what_we_lack(names, file)
        if what := next((what for pattern, what in OTHERS.items() if any(re.search(pattern, n) for n in names)), None):
            raise DataError(f"{file} holds {what}: it has {len(names)} tensors, {', '.join(names[:5])}, ...")
        raise DataError(
            f"{file} holds no ViT and no BiT in a layout that is known (a linear probe holds none either): it has "
            f"{len(names)} tensors, {', '.join(names[:5])}, ..."
        )
    layout, path, prefix = _chosen(places, wanted, file)
    weights = {name.removeprefix(prefix): t for name, t in state_dicts[path].items() if name.startswith(prefix)}
    rest = {name: t for name, t in state_dicts[path].items() if not name.startswith(prefix)}
    for other, tensors in state_dicts.items():
        rest |= {f"{other}: {name}": t for name, t in tensors.items() if other != path}
    family = _family(layout, re.split(r"[./]", f"{path}.{prefix}"), weights, rest)
    return Located(layout, f"{path}: {prefix}" if path else prefix, family, weights, rest)


def _places(state_dicts: dict[str, dict[str, Tensor]]) -> list[tuple[str, str, str]]:
    """Layout, path of the state dict, and prefix of names, for each backbone."""
    places = []
    for path, tensors in state_dicts.items():
        for name in tensors:
            for mark, layout in MARKS.items():
                if name == mark or name.endswith((f".{mark}", f"/{mark}")):
                    places.append((layout, path, name.removesuffix(mark)))
                    break
    # A hybrid of timm's has a ResNet inside.
    hybrids = [(path, prefix) for layout, path, prefix in places if layout == "timm"]
    return [
        (layout, path, prefix)
        for layout, path, prefix in places
        if layout != "bit" or not any(path == other and prefix.startswith(start) for other, start in hybrids)
    ]


def _chosen(places: Sequence[tuple[str, str, str]], wanted: str | None, file: str) -> tuple[str, str, str]:
    words = [set(re.split(r"[./]", f"{path}.{prefix}")) for _, path, prefix in places]
    if wanted is None and len(places) > 1:
        wanted = next((word for word in DEFAULTS if sum(word in w for w in words) == 1), None)
    fitting = [place for place, w in zip(places, words, strict=True) if wanted is None or wanted in w]
    if len(fitting) != 1:
        all_of_them = shortened(str([f"{path}: {prefix} ({layout})" for layout, path, prefix in places]))
        raise ValueError(f"{file} holds the backbones {all_of_them}: say part= one word that only the wanted one has")
    return fitting[0]


def _family(layout: str, words: list[str], weights: dict[str, Tensor], rest: dict[str, Tensor]) -> str | None:
    """words: of the backbone's path."""
    if layout != "timm":
        return {"torchvision": "torchvision", "google": "google", "bit": "bit", "bit npz": "bit"}.get(layout)
    if {"base_encoder", "momentum_encoder"} & set(words):
        return "moco_v3"
    if "decoder_embed.weight" in weights and "mask_token" in weights:
        return "mae"
    if "storage_tokens" in weights:
        return "dinov3"
    if "mask_token" in weights and any(name.endswith("ls1.gamma") for name in weights):
        return "dinov2"
    if "dist_token" in weights or {"blocks.0.gamma_1", "pos_embed"} <= weights.keys():  # timm's DINOv3 has gamma_1 too
        return "deit"
    is_dino = {"student", "teacher"} & set(words) and any("head.last_layer." in name for name in rest)
    return "dino" if is_dino else None


def refuse_what_we_lack(names: Sequence[str], file: str) -> None:
    for pattern, what in LACKING.items():
        if name := next((name for name in names if re.search(pattern, name)), None):
            raise DataError(f"{file} has {what} ({name}), which this ViT lacks: it would compute something else")


def to_timm(located: Located, file: str) -> Located:
    """A torch layout's weights under timm's names; those that no backbone has are left behind."""
    renamed: dict[str, Tensor] = {}
    if located.layout == "CLIP":
        text = {name for name in located.weights if not name.startswith("visual.") or name == "visual.proj"}
        left = {name: tensor for name, tensor in located.weights.items() if name in text}
        located = located._replace(
            weights={name: tensor for name, tensor in located.weights.items() if name not in text},
            left_behind=located.left_behind | left,
        )
    for name, tensor in located.weights.items():
        for theirs, ours in RULES.get(located.layout, ()):
            name = name.replace(theirs, ours)
        # DeiT III's name, and DINOv2's blocks in chunks, as it trains them.
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        renamed[re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)] = tensor
    if len(renamed) != len(located.weights):
        raise DataError(f"{file}: two of its tensors have the same place, {sorted(located.weights)[:5]}, ...")
    facts: dict[str, Any] = {}
    if located.layout in ("CLIP", "transformers CLIP"):
        renamed = _with_axes(renamed)
    if located.layout.startswith(("timm", "transformers")):
        renamed, facts = joined(renamed, file)
        located, renamed, by_offset = _with_offsets(located, renamed)
        facts |= by_offset
    refuse_what_we_lack(list(renamed), file)
    others = {
        "torchvision": r"heads\..*",
        "transformers": r"(pooler|classifier|decoder)\..*|mask_token",
        "transformers DINOv3": r"mask_token",
        "transformers CLIP": r"head\..*|embeddings\.position_ids",
        "bit": r"head\..*",
    }
    pattern = re.compile(others[located.layout]) if located.layout in others else TIMM_REST
    left = {name: renamed.pop(name) for name in list(renamed) if pattern.fullmatch(name)}
    return located._replace(weights=renamed, left_behind=located.left_behind | left, facts=facts)


def _with_offsets(located: Located, weights: dict[str, Tensor]) -> tuple[Located, dict[str, Tensor], dict[str, Any]]:
    """BEiT's tables of offsets under our names, with the heads and the rule of resizing that they imply."""
    renamed = {}
    for name, tensor in weights.items():
        if block := BIAS_OF_BLOCK.fullmatch(name):
            renamed[f"relative_bias.{block[1]}"] = tensor
        elif BIAS_OF_ALL.fullmatch(name):
            renamed["relative_bias"] = tensor.unsqueeze(0)
        elif not name.endswith("relative_position_index"):
            renamed[name] = tensor
    tables = [tensor for name, tensor in renamed.items() if name.startswith("relative_bias")]
    if not tables:
        return located, weights, {}
    left = located.left_behind | {n: t for n, t in weights.items() if n.endswith("relative_position_index")}
    if "lm_head.weight" in left and "norm.weight" not in renamed:  # transformers has it beside what predicts tokens
        renamed |= {f"norm.{kind}": left.pop(f"layernorm.{kind}") for kind in ("weight", "bias")}
    resize = "geometric" if located.layout == "timm" else "bilinear"
    return located._replace(heads=tables[0].shape[-1], left_behind=left), renamed, {"resize": resize}


def _with_axes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's class token and positions, which are a vector and a matrix."""
    shaped = {name: weights[name] for name in ("cls_token", "pos_embed") if name in weights}
    return weights | {name: tensor.view(1, -1, tensor.shape[-1]) for name, tensor in shaped.items()}


def with_our_tokens(located: Located, file: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tokens before the patches as a class token and registers, which compute the same, and notes about it."""
    weights, notes = dict(located.weights), []
    if "register_tokens" in weights and {"cls_token", "pos_embed"} <= weights.keys():
        # In DINOv2 the class token has a position and registers have none. Added to the token, no position is needed.
        token, (position, patches) = weights["cls_token"], weights["pos_embed"].tensor_split([1], dim=1)
        if token.shape != position.shape:
            raise DataError(f"{file}: cls_token of shape {tuple(token.shape)}, its position {tuple(position.shape)}")
        weights["reg_token"] = weights.pop("register_tokens")
        weights |= {"cls_token": token + position, "pos_embed": patches}
    if "dist_token" in weights:  # the other tokens were trained to see it
        weights["reg_token"] = weights.pop("dist_token")
        notes.append("the distillation token became a register: the class token and the patches are unchanged")
    return weights, notes


def classifiers(located: Located) -> list[str]:
    """Names of weights that were trained on labels."""
    prefix = located.part.rpartition(" ")[2]  # by which MoCo v3's projector is recognised
    full = {name: name if ":" in name else f"{prefix}{name}" for name in located.left_behind}
    return sorted(n for n, f in full.items() if CLASSIFIER.fullmatch(n) and not NO_CLASSIFIER.fullmatch(f))


def summary(left_behind: dict[str, Tensor]) -> list[str]:
    """The weights that were left behind, "decoder_blocks (12)" for twelve tensors of that name."""
    counts = Counter(re.split(r"[./](?![^:]*:)", name)[0] for name in left_behind)
    return [f"{name} ({count})" for name, count in sorted(counts.items())]
