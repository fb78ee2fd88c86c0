"""Google's .npz: ViTs and hybrids of vision_transformer and big_vision, and BiT, under timm's names.

https://github.com/google-research/vision_transformer (vit_jax/models_vit.py), https://github.com/google-research/
big_vision (models/vit.py, models/bit.py), https://github.com/google-research/big_transfer. flax keeps kernels as
(in, out), convolutions as (height, width, in, out), and attention as (width, heads, width of a head) and back. The two
codes number their layers differently: big_vision's attention is 0, the older one's 1. And big_vision's class token has
no position.
"""

import re

import torch
from torch import Tensor

from sslvit.errors import DataError
from sslvit.weights.foreign.names import Located

# After a slash at the end come kernel, scale or bias.
VIT = {
    r"embedding/": "patch_embed.proj",
    r"cls": "cls_token",
    r"(?:Transformer/(?:posembed_input/)?)?pos_embedding": "pos_embed",
    r"Transformer/encoder_norm/": "norm",
    r"Transformer/encoderblock_(\d+)/LayerNorm_0/": r"blocks.\1.norm1",
    r"Transformer/encoderblock_(\d+)/LayerNorm_[12]/": r"blocks.\1.norm2",
    r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_0/": r"blocks.\1.mlp.fc1",
    r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_1/": r"blocks.\1.mlp.fc2",
    r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/(query|key|value)/": r"blocks.\1.attn.\2",
    r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/out/": r"blocks.\1.attn.proj",
    r"conv_root/": "patch_embed.backbone.stem.conv",
    r"gn_root/": "patch_embed.backbone.stem.norm",
    r"block(\d+)/unit(\d+)/(conv|gn)_proj/": r"patch_embed.backbone.stages.\1.blocks.\2.downsample.\3",
    r"block(\d+)/unit(\d+)/(conv|gn)(\d)/": r"patch_embed.backbone.stages.\1.blocks.\2.\3\4",
}
BIT = {
    r"root_block/standardized_conv2d/": "stem.conv",
    r"group_norm/": "norm",
    r"block(\d+)/unit(\d+)/a/proj/standardized_conv2d/": r"stages.\1.blocks.\2.downsample.conv",
    r"block(\d+)/unit(\d+)/([abc])/standardized_conv2d/": r"stages.\1.blocks.\2.conv\3",
    r"block(\d+)/unit(\d+)/([abc])/group_norm/": r"stages.\1.blocks.\2.norm\3",
}
KINDS = {"kernel": ".weight", "scale": ".weight", "gamma": ".weight", "bias": ".bias", "beta": ".bias", "": ""}
LEFT = re.compile(r"(head|pre_logits|MAPHead_0)/.*")


def vit(located: Located, file: str) -> Located:
    arrays = _unstacked(located.weights)
    weights, left = _translated(arrays, VIT, file, "no ViT of vision_transformer or big_vision")
    heads = {
        tensor.shape[1]
        for name, tensor in arrays.items()
        if name.endswith("/query/kernel") and not LEFT.fullmatch(name)
    }
    if len(heads) != 1:
        raise DataError(f"{file}: the kernels of its queries have different numbers of heads, {sorted(heads)}")
    for base in {name.removesuffix("query.weight") for name in weights if name.endswith("attn.query.weight")}:
        for kind in ("weight", "bias"):
            same = [f"{base}{which}.{kind}" for which in ("query", "key", "value")]
            if all(name in weights for name in same):
                weights[f"{base}qkv.{kind}"] = torch.cat([weights.pop(name) for name in same])
    if "patch_embed.backbone.stem.conv.weight" in weights and not any(".stages." in name for name in weights):
        # timm nests the root only where stages follow it.
        weights = {name.replace(".stem.", "."): tensor for name, tensor in weights.items()}
    return located._replace(weights=weights, left_behind=located.left_behind | left, heads=heads.pop())


def bit(located: Located, file: str) -> Located:
    weights, left = _translated(located.weights, BIT, file, "no BiT of big_transfer")
    return located._replace(weights=weights, left_behind=located.left_behind | left)


def _unstacked(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits arrays of all blocks, as big_vision can save them, whose first axis is depth."""
    result: dict[str, Tensor] = {}
    for name, tensor in arrays.items():
        if name.startswith("Transformer/encoderblock/") and tensor.ndim > 1:
            rest = name.removeprefix("Transformer/encoderblock")
            result |= {f"Transformer/encoderblock_{i}{rest}": block for i, block in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


def _translated(
    arrays: dict[str, Tensor], table: dict[str, str], file: str, whose: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by timm's names in torch's order of axes, and what was left behind."""
    weights, left = {}, {}
    for name, tensor in arrays.items():
        if LEFT.fullmatch(name):
            left[name] = tensor
            continue
        base, kind = _place(name, table)
        if not base:
            raise DataError(f"{file} has {name}, which {whose} has")
        if base + KINDS[kind] in weights:
            raise DataError(f"{file} has {name} and another array in its place")
        weights[base + KINDS[kind]] = _turned(base, kind, tensor, file)
    return weights, left


def _place(name: str, table: dict[str, str]) -> tuple[str, str]:
    """timm's name without its last word, and Google's last word, a key of KINDS; two empty strings if unknown."""
    for pattern, ours in table.items():
        kinds = "(?P<kind>kernel|scale|bias|gamma|beta)" if pattern.endswith("/") else "(?P<kind>)"
        if match := re.fullmatch(pattern + kinds, name):
            base = re.sub(r"\.gn(\d?)$", r".norm\1", match.expand(ours))
            base = re.sub(r"(?<=conv|norm)[abc]$", lambda letter: str("abc".index(letter[0]) + 1), base)
            # Google counts the stages and blocks of a ResNet from 1.
            return re.sub(r"(?<=stages\.)\d+|(?<=\d\.blocks\.)\d+", _one_less, base), match["kind"]
    return "", ""


def _one_less(number: re.Match[str]) -> str:
    return str(int(number[0]) - 1)


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
