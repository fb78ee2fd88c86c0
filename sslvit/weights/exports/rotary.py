"""A model with rotary positions in the layouts of timm's and transformers' DINOv3, read back by these libraries."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslvit.models.readout import Classifier
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.weights.exports.checks import refuse
from sslvit.weights.exports.layouts import (
    READOUT,
    only_vit,
    outputs_of_transformers,
    read_back_by_timm,
    read_back_by_transformers,
    transformers_preprocessor,
    write_json,
    write_weights,
)
from sslvit.weights.foreign.names import TRANSFORMERS_DINOV3
from sslvit.weights.timm_config import pretrained_cfg

# timm's functions, by width and whether they have SwiGLU; model_args are complete, so any would do.
TIMM = {
    (384, False): "vit_small", (384, True): "vit_small_plus", (768, False): "vit_base", (1024, False): "vit_large",
    (1280, True): "vit_huge_plus", (4096, True): "vit_7b",
}  # fmt: skip
EPSILON = 1e-5  # of timm's DINOv3


def common(backbone: ViT) -> dict[str, bool]:
    """Features that neither timm's nor transformers' DINOv3 has."""
    config = backbone.config
    return {
        "models without a class token": not config.class_token,
        "hybrid stems": config.hybrid is not None,
        "models without a final norm": not config.final_norm,
        "norm before the blocks": config.stem_norm,
        "class token with a norm of its own": config.class_norm,
        "rounded periods (open the release with periods=exact)": bool(config.rope_periods),
        "GELU by a sigmoid": config.gelu == "sigmoid" and not config.swiglu,
    }


def apart(backbone: ViT) -> dict[str, Tensor]:
    """The weights by timm's names, where the two layouts agree: gate and value apart."""
    weights = {name: tensor.detach().float() for name, tensor in backbone.state_dict().items()}
    for i in range(backbone.depth) if backbone.config.swiglu else ():
        for kind in ("weight", "bias"):
            gate, value = weights.pop(f"blocks.{i}.mlp.fc1.{kind}").chunk(2)
            weights |= {f"blocks.{i}.mlp.gate.{kind}": gate, f"blocks.{i}.mlp.value.{kind}": value}
    return weights


def as_timm_dinov3(model: ViT | BiT | Classifier, about: dict[str, Any], folder: Path) -> str:
    backbone = only_vit(model.backbone if isinstance(model, Classifier) else model, "timm's DINOv3")
    config = backbone.config
    head = (
        {n: t for n, t in model.state_dict().items() if not n.startswith("backbone.")} if model is not backbone else {}
    )
    lacks = {
        f"epsilon of norms other than {EPSILON:g}": config.epsilon != EPSILON,
        "GELU by tanh": config.gelu == "tanh" and not config.swiglu,
        "bias of keys": config.qkv_bias and config.key_bias,
        "head but a linear one, of the class token or the mean": bool(head)
        and (head.keys() != {"head.weight", "head.bias"} or about["readout"] == "both"),
    }
    refuse(backbone, "timm's DINOv3", common(backbone) | lacks)
    weights = apart(backbone) | head
    for i in range(backbone.depth):
        if (bias := weights.pop(f"blocks.{i}.attn.qkv.bias", None)) is not None:
            queries, _, values = bias.chunk(3)
            weights |= {f"blocks.{i}.attn.q_bias": queries, f"blocks.{i}.attn.v_bias": values}
    theirs = (("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), (".fc1_g.", ".gate."), (".fc1_x.", ".value."))
    write_weights(folder / "model.safetensors", weights, theirs)
    write_json(folder / "config.json", _timm_config(backbone, about["readout"], len(head["head.bias"]) if head else 0))
    read = read_back_by_timm(model, backbone, folder, "{out} is in the layout of timm's DINOv3")
    return f"{read} In training timm moves no positions."


def _timm_config(backbone: ViT, readout: str, classes: int) -> dict[str, Any]:
    config = backbone.config
    name = TIMM.get((backbone.width, config.swiglu), "vit_small_plus" if config.swiglu else "vit_small")
    bias = "_qkvb" if config.qkv_bias and name != "vit_7b" else ""
    swiglu = {"swiglu_mlp": True, "swiglu_align_to": 1} if config.swiglu else {}
    return {
        "architecture": f"{name}_patch16_dinov3{bias}",
        "num_classes": classes,
        "num_features": backbone.width,
        "model_args": {
            "img_size": list(backbone.image_size),
            "patch_size": list(backbone.patch_size),
            "in_chans": backbone.channels,
            "embed_dim": backbone.width,
            "depth": backbone.depth,
            "num_heads": backbone.heads,
            # timm takes int(width * ratio).
            "mlp_ratio": (config.mlp_width + 0.5) / backbone.width,
            "qkv_bias": config.qkv_bias,
            "init_values": config.layer_scale,
            "num_reg_tokens": config.registers,
            "rope_temperature": config.rope_base,
            "global_pool": "avg" if readout == "mean" else "token",
            **swiglu,
        },
        "pretrained_cfg": pretrained_cfg(backbone, classes, "patch_embed.proj"),
    }


def as_transformers_dinov3(backbone: ViT | BiT, about: dict[str, Any], folder: Path) -> str:
    backbone = only_vit(backbone, "transformers' DINOv3")
    config = backbone.config
    refuse(backbone, "transformers' DINOv3", common(backbone))
    weights = apart(backbone) | {"mask_token": torch.zeros(1, 1, backbone.width)}
    weights.setdefault("reg_token", torch.zeros(1, 0, backbone.width))
    for i in range(backbone.depth):
        for kind in ("weight", "bias"):
            if (fused := weights.pop(f"blocks.{i}.attn.qkv.{kind}", None)) is not None:
                for which, tensor in zip("qkv", fused.chunk(3), strict=True):
                    if kind == "weight" or which != "k" or config.key_bias:
                        weights[f"blocks.{i}.attn.{which}_proj.{kind}"] = tensor
        if config.layer_scale is None:
            weights |= {f"blocks.{i}.ls{n}.gamma": torch.ones(backbone.width) for n in (1, 2)}
    words = (("gate_proj", "gate"), ("up_proj", "value")) if config.swiglu else (("up_proj", "fc1"),)
    mlp = tuple((f".mlp.{theirs}.", f".mlp.{ours}.") for theirs, ours in (*words, ("down_proj", "fc2")))
    disk = tuple(pair for pair in TRANSFORMERS_DINOV3 if not pair[0].startswith("model."))
    write_weights(folder / "model.safetensors", weights, (*mlp, *disk))
    write_json(folder / "config.json", _transformers_config(backbone) | {READOUT: about["readout"]})
    write_json(folder / "preprocessor_config.json", transformers_preprocessor(backbone))
    close = read_back_by_transformers(backbone, folder, outputs_of_transformers)
    return (
        "{out} is in transformers' layout (dinov3_vit): AutoModel.from_pretrained('{out}'). It computes the same to "
        f"{close}. Its preprocessor standardises; the readout to use is {about['readout']}."
    )


def _transformers_config(backbone: ViT) -> dict[str, Any]:
    config, size, patch_size = backbone.config, list(backbone.image_size), list(backbone.patch_size)
    act = "silu" if config.swiglu else {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}[config.gelu]
    return {
        "model_type": "dinov3_vit",
        "architectures": ["DINOv3ViTModel"],
        "hidden_size": backbone.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.heads,
        "hidden_act": act,
        "use_gated_mlp": config.swiglu,
        "layer_norm_eps": config.epsilon,
        "image_size": size[0] if size[0] == size[1] else size,
        "patch_size": patch_size[0] if patch_size[0] == patch_size[1] else patch_size,
        "num_channels": backbone.channels,
        "num_register_tokens": backbone.registers,
        "query_bias": config.qkv_bias,
        "key_bias": config.qkv_bias and config.key_bias,
        "value_bias": config.qkv_bias,
        "layerscale_value": 1.0,
        "rope_theta": config.rope_base,
        "pos_embed_shift": config.rope_shift or None,
        "pos_embed_jitter": config.rope_jitter if config.rope_jitter > 1 else None,
        "pos_embed_rescale": config.rope_rescale if config.rope_rescale > 1 else None,
    }
