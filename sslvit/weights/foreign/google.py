"""Google's .npz: ViTs and hybrids of vision_transformer and big_vision, and BiT, under timm's names.

https://github.com/google-research/vision_transformer (vit_jax/models_vit.py), https://github.com/google-research/
big_vision (models/vit.py, models/bit.py), https://github.com/google-research/big_transfer. flax keeps kernels as
(in, out), convolutions as (height, width, in, out), and attention as (width, heads, width of a head) and back. The two
codes count their layers differently: big_vision's attention is number 0, the older one's 1. And big_vision adds
positions before the class token comes, so that this has none.
"""

import re

import torch
from torch import Tensor

from sslvit.errors import DataError
from sslvit.weights.foreign.names import Found

# Those that end with a slash are followed by kernel, scale or bias.
VIT = (
    (r"embedding/", "patch_embed.proj/"),
    (r"cls", "cls_token"),
    (r"(?:Transformer/(?:posembed_input/)?)?pos_embedding", "pos_embed"),
    (r"Transformer/encoder_norm/", "norm/"),
    (r"Transformer/encoderblock_(\d+)/LayerNorm_0/", r"blocks.\1.norm1/"),
    (r"Transformer/encoderblock_(\d+)/LayerNorm_[12]/", r"blocks.\1.norm2/"),
    (r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_0/", r"blocks.\1.mlp.fc1/"),
    (r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_1/", r"blocks.\1.mlp.fc2/"),
    (r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/(query|key|value)/", r"blocks.\1.attn.\2/"),
    (r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/out/", r"blocks.\1.attn.proj/"),
    (r"conv_root/", "patch_embed.backbone.stem.conv/"),
    (r"gn_root/", "patch_embed.backbone.stem.norm/"),
    (r"block(\d+)/unit(\d+)/(conv|gn)(\d|_proj)/", None),  # see _stage
)
KIND = r"(?P<kind>kernel|scale|bias)"
LEFT = re.compile(r"(head|pre_logits|MAPHead_0)/.*")


def vit(found: Found, file: str) -> Found:
    weights, left, heads = {}, {}, set()
    for name, tensor in _unstacked(found.weights).items():
        if LEFT.fullmatch(name):
            left[name] = tensor
            continue
        base, kind = _place(name, file)
        place = base + {"kernel": ".weight", "scale": ".weight", "bias": ".bias", "": ""}[kind]
        if place in weights:
            raise DataError(f"{file} has {name} and another array in its place")
        weights[place] = _turned(base, kind, tensor, file)
        if place.endswith("attn.query.weight"):
            heads.add(tensor.shape[1])
    if len(heads) != 1:
        raise DataError(f"{file}: its queries' kernels have {sorted(heads)} heads, not one number of them")
    for base in {name[: -len("query.weight")] for name in weights if name.endswith("attn.query.weight")}:
        for kind in ("weight", "bias"):
            same = [f"{base}{which}.{kind}" for which in ("query", "key", "value")]
            if all(name in weights for name in same):
                weights[f"{base}qkv.{kind}"] = torch.cat([weights.pop(name) for name in same])
    if "patch_embed.backbone.stem.conv.weight" in weights and not any(".stages." in name for name in weights):
        # timm nests the root only where stages follow it.
        weights = {name.replace(".stem.", "."): tensor for name, tensor in weights.items()}
    return found._replace(weights=weights, left_behind=found.left_behind | left, heads=heads.pop())


def _place(name: str, file: str) -> tuple[str, str]:
    """timm's name, but for its last word: kernel, scale or bias, if it has one."""
    for pattern, new in VIT:
        if match := re.fullmatch(f"{pattern}{KIND if pattern.endswith('/') else ''}", name):
            base = match.expand(new) if new else _stage(*match.groups()[:4])
            return base.rstrip("/"), match.groupdict().get("kind", "")
    raise DataError(f"{file} has {name}, which no ViT of vision_transformer or big_vision has")


def _unstacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """big_vision can keep all blocks in one array, of which the first axis is depth."""
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.startswith("Transformer/encoderblock/") and tensor.ndim > 1:
            rest = name.removeprefix("Transformer/encoderblock")
            result |= {f"Transformer/encoderblock_{i}{rest}": part for i, part in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


def _stage(block: str, unit: str, layer: str, which: str) -> str:
    layer = "norm" if layer == "gn" else layer
    layer = f"downsample.{layer}" if which == "_proj" else f"{layer}{which}"
    return f"patch_embed.backbone.stages.{int(block) - 1}.blocks.{int(unit) - 1}.{layer}"


def _turned(base: str, kind: str, tensor: Tensor, file: str) -> Tensor:
    if kind == "kernel" and tensor.ndim not in ((3,) if ".attn." in base else (2, 4)):
        raise DataError(f"{file}: the kernel of {base} has shape {tuple(tensor.shape)}, which no such layer has")
    if base.endswith((".query", ".key", ".value")):
        return tensor.flatten(1).T if kind == "kernel" else tensor.flatten()
    if kind == "kernel" and base.endswith("attn.proj"):
        return tensor.flatten(0, 1).T
    if kind == "kernel":
        return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
    return tensor.flatten() if kind else tensor  # a group norm's scale can be (1, 1, 1, channels)


BIT = (
    (r"root_block/standardized_conv2d/kernel", "stem.conv.weight"),
    (r"group_norm/(gamma|beta)", r"norm.\1"),
    (r"block(\d+)/unit(\d+)/a/proj/standardized_conv2d/kernel", r"\1.\2.downsample.conv.weight"),
    (r"block(\d+)/unit(\d+)/([abc])/standardized_conv2d/kernel", r"\1.\2.conv\3.weight"),
    (r"block(\d+)/unit(\d+)/([abc])/group_norm/(gamma|beta)", r"\1.\2.norm\3.\4"),
)


def bit(found: Found, file: str) -> Found:
    weights, left = {}, {}
    for name, tensor in found.weights.items():
        if name.startswith("head/"):
            left[name] = tensor
            continue
        for pattern, new in BIT:
            if match := re.fullmatch(pattern, name):
                place = match.expand(new).replace("gamma", "weight").replace("beta", "bias")
                place = re.sub(r"\.(conv|norm)([abc])\.", lambda m: f".{m[1]}{'abc'.index(m[2]) + 1}.", place)
                if stage := re.match(r"(\d+)\.(\d+)\.", place):
                    place = f"stages.{int(stage[1]) - 1}.blocks.{int(stage[2]) - 1}.{place[stage.end() :]}"
                weights[place] = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.flatten()
                break
        else:
            raise DataError(f"{file} has {name}, which no BiT of big_transfer has")
    return found._replace(weights=weights, left_behind=found.left_behind | left)
