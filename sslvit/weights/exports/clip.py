"""A model with a norm before its blocks in the layouts of timm's and transformers' image towers of CLIP.

Their patches have no bias: ours is added to the positions of the patches, which changes no output.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from sslvit.models.readout import Classifier
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.weights.exports.checks import elsewhere, refuse
from sslvit.weights.exports.layouts import (
    READOUT,
    only_vit,
    opened_by_transformers,
    plain,
    read_back_by_timm,
    read_back_by_transformers,
    transformers_preprocessor,
    write_json,
    write_weights,
)
from sslvit.weights.foreign.names import TRANSFORMERS_CLIP
from sslvit.weights.timm_config import mlp_ratio, pretrained_cfg

EPSILON = 1e-5  # of timm's CLIP


def without_bias(backbone: ViT, layout: str, **lacks: bool) -> dict[str, Tensor]:
    """The weights by timm's names, after what neither layout has is refused. lacks: what this one has not, by name."""
    config = backbone.config
    refuse(
        backbone,
        layout,
        {
            "models without a class token": not config.class_token,
            "registers": backbone.registers > 0,
            "hybrid stems": config.hybrid is not None,
            "positions in the blocks": config.position == "relative" or config.position_at != "stem",
            "models without a final norm": not config.final_norm,
            "class token with a norm of its own": config.class_norm,
            "SwiGLU": config.swiglu,
            "attention without biases": not config.qkv_bias,
            **{name.replace("_", " "): lacking for name, lacking in lacks.items()},
        },
    )
    weights = plain(backbone, fold_scale=True)
    weights["pos_embed"] = weights["pos_embed"].clone()
    weights["pos_embed"][:, 1:] += weights.pop("patch_embed.proj.bias")
    return weights


def as_timm_clip(model: ViT | BiT | Classifier, about: dict[str, Any], folder: Path) -> str:
    backbone = only_vit(model.backbone if isinstance(model, Classifier) else model, "timm's CLIP")
    head = (
        {n: t for n, t in model.state_dict().items() if not n.startswith("backbone.")} if model is not backbone else {}
    )
    odd = bool(head) and (head.keys() != {"head.weight", "head.bias"} or about["readout"] == "both")
    epsilon = backbone.config.epsilon != EPSILON
    weights = without_bias(backbone, "timm's CLIP", other_epsilon=epsilon, head_but_a_linear_one=odd)
    write_weights(folder / "model.safetensors", weights | head, ())
    classes = len(head["head.bias"]) if head else 0
    write_json(folder / "config.json", _timm_config(backbone, about["readout"], classes))
    read = read_back_by_timm(model, backbone, folder, "{out} is in the layout of timm's CLIP")
    return read + elsewhere(backbone, "timm", "bicubic")


def _timm_config(backbone: ViT, readout: str, classes: int) -> dict[str, Any]:
    config = backbone.config
    return {
        "architecture": "vit_base_patch16_clip_224",  # of any size, by its model_args
        "num_classes": classes,
        "num_features": backbone.width,
        "model_args": {
            "img_size": list(backbone.image_size),
            "patch_size": list(backbone.patch_size),
            "in_chans": backbone.channels,
            "embed_dim": backbone.width,
            "depth": backbone.depth,
            "num_heads": backbone.heads,
            "mlp_ratio": mlp_ratio(backbone.width, config.mlp_width),
            "act_layer": {"exact": "gelu", "tanh": "gelu_tanh", "sigmoid": "quick_gelu"}[config.gelu],
            "global_pool": "avg" if readout == "mean" else "token",
            "fc_norm": False,
        },
        "pretrained_cfg": pretrained_cfg(backbone, classes, "patch_embed.proj"),
    }


def as_transformers_clip(backbone: ViT | BiT, about: dict[str, Any], folder: Path) -> str:
    backbone = only_vit(backbone, "transformers' CLIP")
    config, (height, width), (p, q) = backbone.config, backbone.image_size, backbone.patch_size
    weights = without_bias(backbone, "transformers' CLIP", oblong_images=height != width or p != q)
    for i in range(backbone.depth):
        for kind in ("weight", "bias"):
            joined = weights.pop(f"blocks.{i}.attn.qkv.{kind}").chunk(3)
            weights |= {f"blocks.{i}.attn.{which}_proj.{kind}": one for which, one in zip("qkv", joined, strict=True)}
    weights |= {"cls_token": weights["cls_token"].flatten(), "pos_embed": weights["pos_embed"][0]}
    last, *others = reversed(TRANSFORMERS_CLIP)  # which names what others' names end with
    disk = tuple(
        (f"vision_model.{theirs}" if theirs[0] != "." else theirs, ours) for theirs, ours in (last, *reversed(others))
    )
    write_weights(folder / "model.safetensors", weights, disk)
    write_json(folder / "config.json", {
        "model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "hidden_size": backbone.width,
        "intermediate_size": config.mlp_width, "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.heads, "num_channels": backbone.channels, "image_size": height, "patch_size": p,
        "hidden_act": {"exact": "gelu", "tanh": "gelu_pytorch_tanh", "sigmoid": "quick_gelu"}[config.gelu],
        "layer_norm_eps": config.epsilon, "attention_dropout": 0.0, READOUT: about["readout"],
    })  # fmt: skip
    write_json(folder / "preprocessor_config.json", transformers_preprocessor(backbone))
    close = read_back_by_transformers(backbone, folder, _outputs)
    return (
        "{out} is in transformers' layout (clip_vision_model): AutoModel.from_pretrained('{out}'). It computes the "
        f"same to {close}: pooler_output is the class token, last_hidden_state has the patches before "
        f"the norm after the blocks. Its preprocessor standardises; the readout to use is {about['readout']}."
    )


def _outputs(folder: Path, backbone: ViT, images: Tensor) -> tuple[Tensor, Tensor]:
    peer = opened_by_transformers(folder)
    encoded = peer(pixel_values=backbone.standardise(images))
    norm = next(module for name, module in peer.named_modules() if name.endswith("post_layernorm"))
    return encoded.pooler_output, norm(encoded.last_hidden_state[:, 1:])
