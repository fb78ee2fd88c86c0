"""Which layout a file has, where in it the backbone is, and its weights under timm's names, which are ours.

Everything in a file is accounted for: it belongs to the backbone, or it is left behind and named, or it is an error.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sslvit.errors import DataError, shortened

# Each layout has one weight by which it is known, wherever in the file it lies.
MARKS = {
    "patch_embed.proj.weight": "timm",
    "conv_proj.weight": "torchvision",
    "embeddings.patch_embeddings.projection.weight": "transformers",
    "embedding/kernel": "google",
    "root_block/standardized_conv2d/kernel": "bit npz",
    "stem.conv.weight": "bit",  # last: a hybrid has it too
}
DEFAULTS = ("teacher", "base_encoder")  # what DINO and MoCo v3 evaluate, beside a student and a momentum encoder
LACKING = {
    r"(^|\.)norm_pre\.": "a norm before the blocks, as in CLIP",
    r"\.attn\.[qk]_norm\.": "norms of queries and keys",
    r"\.mlp\.(w12|weights_in|fc1_g|gate_proj)\.": "SwiGLU",
    r"rel(ative)?_pos|q_bias": "relative positions or biases of q and v alone, as in BEiT",
    r"patch_embed\.proj\.0\.|conv_proj\.conv_bn": "a convolutional stem",
    r"\.(attn\.norm|mlp\.norm)\.": "norms inside its branches",
    r"masked_embed": "a mask inside its backbone, as in iBOT",
}
# Trained on labels: a linear probe's head, a fine-tuned classifier's, with the norm and the hidden layer before it.
CLASSIFIER = re.compile(
    r"(?:.*[./ ])?(?:\w*classif\w*(?:\.\w+)?|\w*linear\w*(?:\.\w+)?|\w*logits\w*(?:\.fc)?|\w*probe\w*(?:\.\w+)?|"
    r"(?:cls|mlp|task)?_?heads?(?:_dist)?(?:\.\d+|\.fc|\.head|/conv2d)?|heads\.pre_logits|fc|lin|output|fc_norm)"
    r"[./](?:weight|bias|kernel|running_mean)"
)
# What is like one by its name: MoCo v3's projector, DINO's head, MAE's decoder, and all of other backbones.
NO_CLASSIFIER = re.compile(
    r"(?:.*[./ ])?(?:(?:base_encoder|momentum_encoder)\.head\.\d+|predictor\.\d+|head\.(?:mlp\.\d+|last_layer)|"
    r"decoder\w*(?:\..*)?|(?:blocks|layers?|encoder)\..*)\.\w+"
)
TIMM_REST = re.compile(r"(head|head_dist|pre_logits|fc_norm|attn_pool|decoder\w*|mask_token)(\..*)?")

TORCHVISION = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.", "patch_embed.proj."),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"encoder\.ln\.", "norm."),
)
# As on disk, and as version 5 has them in memory.
TRANSFORMERS = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(?:attention\.)?(query|key|value|[qkv]_proj)\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)


class Found(NamedTuple):
    layout: str
    part: str  # the keys before the backbone's own names, "state_dict: module.base_encoder."
    family: str | None  # the release, where names give it away
    weights: dict[str, Tensor]
    left_behind: dict[str, Tensor]
    heads: int | None = None  # where the shapes of kernels say it


def find(parts: dict[str, dict[str, Tensor]], wanted: str | None, file: str) -> Found:
    """The one backbone in a file, or the one that is `wanted` by a word of its path: teacher, model_ema."""
    places = []
    # Some of BiT's files number what needs no number.
    numbered = re.compile(r"standardized_conv2d_\d+/")
    parts = {
        part: {numbered.sub("standardized_conv2d/", name): t for name, t in tensors.items()}
        for part, tensors in parts.items()
    }
    for part, tensors in parts.items():
        for name in tensors:
            for mark, layout in MARKS.items():
                if name == mark or name.endswith((f".{mark}", f"/{mark}")):
                    places.append((layout, part, name.removesuffix(mark)))
                    break
    # A hybrid of timm's has a ResNet inside.
    inside = [(part, prefix) for layout, part, prefix in places if layout == "timm"]
    places = [
        (layout, part, prefix)
        for layout, part, prefix in places
        if layout != "bit" or not any(part == other and prefix.startswith(start) for other, start in inside)
    ]
    names = sorted(f"{part}: {name}" if part else name for part, tensors in parts.items() for name in tensors)
    if not places:
        refuse_what_we_lack(names, file)
        raise DataError(
            f"{file} holds no ViT and no BiT in a layout that is known (a linear probe holds none either): it has "
            f"{len(names)} tensors, {', '.join(names[:5])}, ..."
        )
    layout, part, prefix = _chosen(places, wanted, file)
    weights = {name.removeprefix(prefix): t for name, t in parts[part].items() if name.startswith(prefix)}
    rest = {name: t for name, t in parts[part].items() if not name.startswith(prefix)}
    for other, tensors in parts.items():
        rest |= {f"{other}: {name}": t for name, t in tensors.items() if other != part}
    family = _family(layout, part, prefix, weights, rest)
    return Found(layout, f"{part}: {prefix}" if part else prefix, family, weights, rest)


def _chosen(places: Sequence[tuple[str, str, str]], wanted: str | None, file: str) -> tuple[str, str, str]:
    words = [set(re.split(r"[./]", f"{part}.{prefix}")) for _, part, prefix in places]
    if wanted is None and len(places) > 1:
        wanted = next((word for word in DEFAULTS if sum(word in w for w in words) == 1), None)
    fitting = [place for place, w in zip(places, words, strict=True) if wanted is None or wanted in w]
    if len(fitting) != 1:
        there = shortened(str([f"{part}: {prefix} ({layout})" for layout, part, prefix in places]))
        raise ValueError(f"{file} holds the backbones {there}: say part= one word that only the wanted one has")
    return fitting[0]


def _family(layout: str, part: str, prefix: str, weights: dict[str, Tensor], rest: dict[str, Tensor]) -> str | None:
    if layout != "timm":
        return {"torchvision": "torchvision", "google": "google", "bit": "bit", "bit npz": "bit"}.get(layout)
    if "base_encoder" in prefix or "momentum_encoder" in prefix:
        return "moco_v3"
    if "decoder_embed.weight" in weights and "mask_token" in weights:
        return "mae"
    if "mask_token" in weights and any(name.endswith("ls1.gamma") for name in weights):
        return "dinov2"
    if "dist_token" in weights or "blocks.0.gamma_1" in weights:
        return "deit"
    whose = {"student", "teacher"} & set(re.split(r"[./]", f"{part}.{prefix}"))
    return "dino" if whose and any("head.last_layer." in name for name in rest) else None


def refuse_what_we_lack(names: Sequence[str], file: str) -> None:
    for pattern, what in LACKING.items():
        if name := next((name for name in names if re.search(pattern, name)), None):
            raise DataError(f"{file} has {what} ({name}), which this ViT has not: its weights would compute otherwise")


def to_timm(found: Found, file: str) -> Found:
    """A torch layout's weights under timm's names, and what no backbone has among those left behind."""
    rules = {"torchvision": TORCHVISION, "transformers": TRANSFORMERS}.get(found.layout, ())
    renamed = {}
    for name, tensor in found.weights.items():
        for old, new in rules:
            name = re.sub(old, new, name)
        # DeiT III's name, and DINOv2's blocks in chunks, as it trains them.
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        renamed[re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)] = tensor
    if len(renamed) != len(found.weights):
        raise DataError(f"{file}: two of its tensors have the same place, {sorted(found.weights)[:5]}, ...")
    if found.layout == "transformers":
        renamed = _joined(renamed)
    refuse_what_we_lack(list(renamed), file)
    others = {
        "torchvision": r"heads\..*",
        "transformers": r"(pooler|classifier|decoder)\..*|mask_token",
        "bit": r"head\..*",
    }
    pattern = re.compile(others[found.layout]) if found.layout in others else TIMM_REST
    left = {name: t for name, t in renamed.items() if pattern.fullmatch(name)}
    weights = {name: t for name, t in renamed.items() if name not in left}
    return found._replace(weights=weights, left_behind=found.left_behind | left)


def _joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' queries, keys and values as one matrix."""
    result, first = dict(weights), re.compile(r"(.*\.attn\.)(?:query|q_proj)\.(weight|bias)")
    for name in weights:
        if match := first.fullmatch(name):
            same = [
                name.replace("query", which).replace("q_proj", f"{which[0]}_proj")
                for which in ("query", "key", "value")
            ]
            if all(other in weights for other in same):
                result[f"{match[1]}qkv.{match[2]}"] = torch.cat([result.pop(other) for other in same])
    return result


def with_our_tokens(found: Found, drop_distillation: bool, file: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tokens before the patches as our ViT has them, the same function: a class token, and registers."""
    weights, notes = dict(found.weights), []
    if "register_tokens" in weights and {"cls_token", "pos_embed"} <= weights.keys():
        # In DINOv2 the class token has a position and registers have none: added once for all, it has none either.
        token, (position, patches) = weights["cls_token"], weights["pos_embed"].tensor_split([1], dim=1)
        if token.shape != position.shape:
            raise DataError(f"{file}: cls_token of shape {tuple(token.shape)}, its position {tuple(position.shape)}")
        weights["reg_token"] = weights.pop("register_tokens")
        weights |= {"cls_token": token + position, "pos_embed": patches}
    if drop_distillation and "dist_token" not in weights:
        raise ValueError(f"{file} has no distillation token to drop")
    if drop_distillation:
        del weights["dist_token"]
        weights["pos_embed"] = torch.cat([weights["pos_embed"][:, :1], weights["pos_embed"][:, 2:]], 1)
        notes.append("the distillation token was dropped, as you said: no token is what it was")
    elif "dist_token" in weights:
        weights["reg_token"] = weights.pop("dist_token")
        notes.append("the distillation token is kept as a register: the class token and the patches are what they were")
    return weights, notes


def classifiers(found: Found) -> list[str]:
    """Names of what was trained on labels."""
    inside = found.part.rpartition(" ")[2]  # of a prefix, so that MoCo v3's own head can be told by it
    full = {name: name if ":" in name else f"{inside}{name}" for name in found.left_behind}
    return sorted(n for n, f in full.items() if CLASSIFIER.fullmatch(n) and not NO_CLASSIFIER.fullmatch(f))


def summary(left_behind: dict[str, Tensor]) -> list[str]:
    """What was left behind, "decoder_blocks (12)" for twelve tensors of that name."""
    counts = Counter(re.split(r"[./](?![^:]*:)", name)[0] for name in left_behind)
    return [f"{name} ({count})" for name, count in sorted(counts.items())]
