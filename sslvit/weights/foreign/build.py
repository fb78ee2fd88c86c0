"""Our backbone from weights under timm's names and the facts that they do not show."""

import re
from math import isqrt
from typing import Any, TypeVar

import torch
from torch import Tensor

from sslvit.errors import DataError
from sslvit.models.positions import FIXED, Grid, sincos
from sslvit.models.resnet import STEMS, BiT
from sslvit.models.vit import ViT
from sslvit.weights.folder import load_strictly
from sslvit.weights.foreign.facts import size_of
from sslvit.weights.foreign.names import Located

Backbone = TypeVar("Backbone", ViT, BiT)


def vit(weights: dict[str, Tensor], facts: dict[str, Any], file: str, located: Located) -> ViT:
    """Raises DataError for missing or unexpected weights, ValueError for sizes that the user must say."""
    weights, projection = dict(weights), weights["patch_embed.proj.weight"]
    if projection.ndim != 4:
        raise DataError(f"{file}: patch_embed.proj.weight of shape {tuple(projection.shape)} is no convolution's")
    hybrid, stride, stem = _hybrid(weights, projection, file)
    patch_size = (projection.shape[2] * stride, projection.shape[3] * stride)
    mlp, mlp_out = (weights.get(f"blocks.0.mlp.{name}.weight", torch.empty(0, 0)) for name in ("fc1", "fc2"))
    gated = bool(mlp.numel() and mlp_out.numel()) and mlp_out.ndim == 2 and mlp.shape[0] != mlp_out.shape[1]
    if gated and not (mlp.shape[0] == 2 * mlp_out.shape[1] and facts.get("swiglu")):
        raise DataError(
            f"{file}: its MLPs go from {tuple(mlp.shape)} to {tuple(mlp_out.shape)}, so they have gates, and nothing "
            "shows that they are SwiGLU's: say family=dinov2 if they are"
        )
    normed = ("fc_norm.", "pooler.norm.")  # the mean, behind the blocks
    if "norm.weight" not in weights and not any(n.startswith(normed) for n in located.left_behind):
        raise DataError(f"{file}: missing norm.weight, the norm after the last block, which changes all outputs")
    width, depth = size_of(weights)
    if depth > len(weights):
        raise DataError(f"{file}: it names {depth} blocks, and has {len(weights)} tensors")
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    prefix = registers + ("cls_token" in weights)
    config = {
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "heads": facts["heads"],
        "mlp_width": mlp_out.shape[1] if gated else mlp.shape[0],
        "swiglu": gated,
        "channels": stem.shape[1],
        "class_token": "cls_token" in weights,
        "registers": registers,
        "gelu": facts["gelu"],
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "key_bias": facts.get("key_bias", True),
        "layer_scale": 1.0 if "blocks.0.ls1.gamma" in weights else None,
        "mean": facts["mean"],
        "std": facts["std"],
        "hybrid": hybrid,
        "hybrid_epsilons": "timm" if hybrid and located.layout == "timm" else "google",
        "stem_norm": "norm_pre.weight" in weights,
        "final_norm": "norm.weight" in weights,
        "class_norm": "cls_norm.weight" in weights,
        "epsilon": facts["epsilon"],
        "position_resize": facts["resize"],
    }
    if config["stem_norm"]:  # CLIP's convolution has no bias, which is a bias of zero
        weights.setdefault("patch_embed.proj.bias", torch.zeros(width))
    if "rope_base" in facts:
        config |= _rotary(weights, patch_size, facts, file)
    elif any(name.startswith("relative_bias") for name in weights):
        config |= _by_offset(weights, patch_size, facts.get("image_size"), file)
    else:
        config |= _positions(weights, prefix, patch_size, facts.get("image_size"), file, located.layout)
    return _filled(ViT, config, weights, file)


def bit(weights: dict[str, Tensor], facts: dict[str, Any], file: str, layout: str) -> BiT:
    blocks, root = _blocks(weights, ""), weights["stem.conv.weight"]
    if "norm.weight" not in weights:
        raise DataError(f"{file}: missing norm.weight: only BiTs of version 2, with a norm at their end, were released")
    if root.ndim != 4 or len(blocks) > 4 or not 0 < min(blocks, default=0) <= max(blocks) <= len(weights):
        raise DataError(f"{file}: a root of shape {tuple(root.shape)} and {blocks} blocks per stage are no BiT's")
    config = {
        "image_size": facts.get("image_size", 224),  # for `grid` alone: a BiT takes images of any size
        "blocks": blocks,
        "width_factor": root.shape[0] / 64,
        "root": "7x7" if root.shape[2] == 7 else "3x3",
        "channels": root.shape[1],
        "mean": facts["mean"],
        "std": facts["std"],
        "epsilons": "timm" if layout == "bit" else "google",
    }
    return _filled(BiT, config, weights, file)


def _filled(kind: type[Backbone], config: dict[str, Any], weights: dict[str, Tensor], file: str) -> Backbone:
    """Compares all shapes before it allocates anything: a small file can name sizes that no machine has."""
    with torch.device("meta"):
        try:
            shapes = kind(kind.Config(**config))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        load_strictly(shapes, {name: tensor.to("meta") for name, tensor in weights.items()}, file)
    backbone = kind(kind.Config(**config))
    backbone.load_state_dict(weights)
    return backbone.eval()


def _hybrid(weights: dict[str, Tensor], projection: Tensor, file: str) -> tuple[str | None, int, Tensor]:
    """The name of the ResNet in front, its stride, and the weight that sees pixels."""
    if not any(name.startswith("patch_embed.backbone.") for name in weights):
        return None, 1, projection
    blocks = _blocks(weights, "patch_embed.backbone.")
    kind = next((name for name, known in STEMS.items() if known == blocks), None)
    root = weights.get(f"patch_embed.backbone.{'stem.' if blocks else ''}conv.weight")
    if kind is None or root is None:
        raise DataError(f"{file}: the ResNet of a hybrid must have blocks per stage as in {STEMS}, got {blocks}")
    return kind, 2 ** (len(blocks) + 1) if blocks else 4, root


def _blocks(weights: dict[str, Tensor], prefix: str) -> tuple[int, ...]:
    """The number of blocks in each stage of a ResNet."""
    counts: dict[int, int] = {}
    for name in weights:
        if match := re.match(re.escape(prefix) + r"stages\.(\d+)\.blocks\.(\d+)\.", name):
            counts[int(match[1])] = max(counts.get(int(match[1]), 0), int(match[2]) + 1)
    stages = range(min(max(counts, default=-1), len(weights)) + 1)  # a name may claim any number
    return tuple(counts.get(stage, 0) for stage in stages)


def _rotary(weights: dict[str, Tensor], patch_size: Grid, facts: dict[str, Any], file: str) -> dict[str, Any]:
    if "pos_embed" in weights:
        raise DataError(f"{file} has a table of positions, pos_embed, and DINOv3's have none")
    moves = ("rope_base", "rope_periods", "rope_shift", "rope_jitter", "rope_rescale")
    # For `grid` alone: rotary positions fit any size.
    size = facts.get("image_size") or (16 * patch_size[0], 16 * patch_size[1])
    _grid_of(size, patch_size, file)
    return {
        "position": "rope",
        "position_at": "every_layer_shared",
        "image_size": size,
        **{name: facts[name] for name in moves if name in facts},
    }


def _by_offset(weights: dict[str, Tensor], patch_size: Grid, image_size: Grid | None, file: str) -> dict[str, Any]:
    tables = {name: tensor for name, tensor in weights.items() if name.startswith("relative_bias")}
    shared = "relative_bias" in tables
    if "pos_embed" in weights or (shared and len(tables) > 1):
        other = "pos_embed" if "pos_embed" in weights else "a table of all blocks"
        raise DataError(f"{file} has a bias of attention by offset and {other} too, and a ViT here has one of them")
    entries = next(iter(tables.values())).shape[-2]
    offsets = entries - 3 * ("cls_token" in weights)
    side = (isqrt(max(offsets, 0)) + 1) // 2
    h, w = _grid_of(image_size, patch_size, file) if image_size else (side, side)
    if (2 * h - 1) * (2 * w - 1) != offsets:
        why = "not those of a square grid" if image_size is None else f"not those of image_size {image_size}"
        raise ValueError(f"{file}: a bias of {entries} entries for each head, {why}: say image_size= as it was trained")
    return {
        "position": "relative_bias",
        "position_at": "every_layer_shared" if shared else "every_layer",
        "image_size": (h * patch_size[0], w * patch_size[1]),
    }


def _positions(
    weights: dict[str, Tensor], prefix: int, patch_size: Grid, image_size: Grid | None, file: str, layout: str
) -> dict[str, Any]:
    """Arguments of the ViT about positions and image size; puts the table among the weights if there is none."""
    if "pos_embed" not in weights:
        if layout != "google":  # big_vision's sincos2d
            raise DataError(
                f"{file}: missing pos_embed, the positions: rotary ones leave no weights, family=dinov3 says"
            )
        if image_size is None:
            raise ValueError(f"{file} has fixed positions, which show no size: say image_size=")
        grid, with_prefix = _grid_of(image_size, patch_size, file), False
        weights["pos_embed"] = sincos("sincos_big_vision", grid, weights["patch_embed.proj.weight"].shape[0])
    else:
        table = weights["pos_embed"]
        if table.ndim != 3 or len(table) != 1:
            raise DataError(f"{file}: pos_embed of shape {tuple(table.shape)} is no table of one row per token")
        grid, with_prefix = _grid(table.shape[1], prefix, patch_size, image_size, file)
    before, table = weights["pos_embed"].split([prefix if with_prefix else 0, grid[0] * grid[1]], 1)
    position = "learned_1d"
    for fixed in FIXED:
        if table.shape[-1] % 4 == 0 and table.shape[-1] >= 8 and not before.any():
            position = fixed if torch.allclose(table, sincos(fixed, grid, table.shape[-1]), atol=1e-5) else position
    size = (grid[0] * patch_size[0], grid[1] * patch_size[1])
    return {"position": position, "class_position": with_prefix or not prefix, "image_size": size}


def _grid(rows: int, prefix: int, patch_size: Grid, image_size: Grid | None, file: str) -> tuple[Grid, bool]:
    """The grid of a table with this number of rows, and whether the tokens before the patches have rows too."""
    patches = {with_prefix: rows - prefix * with_prefix for with_prefix in ((True, False) if prefix else (True,))}
    if image_size is not None:
        grid = _grid_of(image_size, patch_size, file)
        fitting = [(grid, has) for has, count in patches.items() if count == grid[0] * grid[1]]
    else:
        fitting = [((isqrt(n), isqrt(n)), has) for has, n in patches.items() if n > 0 and isqrt(n) ** 2 == n]
    if len(fitting) != 1:
        why = "no square grid, or more than one" if image_size is None else f"not the grid of image_size {image_size}"
        raise ValueError(
            f"{file}: its pos_embed has {rows} rows, {prefix} tokens come before the patches of {patch_size}: {why}. "
            "Say image_size= as it was trained"
        )
    return fitting[0]


def _grid_of(image_size: Grid, patch_size: Grid, file: str) -> Grid:
    (height, width), (p, q) = image_size, patch_size
    if height < p or width < q or height % p or width % q:
        raise ValueError(f"{file}: image size {image_size} is not a multiple of its patch_size {patch_size}")
    return height // p, width // q


def differences(backbone: ViT | BiT, located: Located) -> list[str]:
    """Notes where the other code computes something slightly different."""
    notes = []
    if located.layout in ("timm", "bit") and (isinstance(backbone, BiT) or backbone.config.hybrid):
        notes.append("in the ResNet epsilons are timm's, as in the code of such names; Google's move outputs by 1e-4")
    if isinstance(backbone, ViT) and backbone.config.rope_periods:
        notes.append(
            "its rotary periods are the file's, rounded; timm and transformers compute exact ones: periods=exact"
        )
    if isinstance(backbone, ViT) and not backbone.config.final_norm:
        notes.append("fine-tuned on the mean patch: its norm of the mean was left behind with the classifier")
    return notes
