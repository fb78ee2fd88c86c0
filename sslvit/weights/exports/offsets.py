"""A model with a bias of attention by offset in the layouts of timm's and transformers' BEiT, read back by them.

A bias of keys is left out: it adds the same to all logits of a query, and so changes nothing.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslvit.models.readout import Classifier
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.weights.exports.checks import elsewhere, refuse
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
from sslvit.weights.foreign.names import TABLE, TRANSFORMERS, TRANSFORMERS_BEIT, TRANSFORMERS_VIT
from sslvit.weights.timm_config import mlp_ratio, pretrained_cfg

EPSILON = 1e-6  # of timm's BEiT


def common(backbone: ViT) -> dict[str, bool]:
    """Features that neither timm's nor transformers' BEiT has."""
    config = backbone.config
    return {
        "models without a class token": not config.class_token,
        "hybrid stems": config.hybrid is not None,
        "norm before the blocks": config.stem_norm,
        "class token with a norm of its own": config.class_norm,
        "SwiGLU": config.swiglu,
    }


def apart(backbone: ViT, names: tuple[str, str, str], of_block: str, of_all: str) -> dict[str, Tensor]:
    """The weights by timm's names, but for the tables and the biases of queries, keys and values. names: of these
    three, "" for none."""
    weights = {name: tensor.detach().float() for name, tensor in backbone.state_dict().items()}
    for i in range(backbone.depth):
        if (bias := weights.pop(f"blocks.{i}.attn.qkv.bias", None)) is not None:
            weights |= {f"blocks.{i}.attn.{n}": one for n, one in zip(names, bias.chunk(3), strict=True) if n}
        if (table := weights.pop(f"relative_bias.{i}", None)) is not None:
            weights[f"blocks.{i}.{of_block}{TABLE}"] = table
    if (table := weights.pop("relative_bias", None)) is not None:
        weights[f"{of_all}{TABLE}"] = table.squeeze(0)
    return weights


def as_timm_beit(model: ViT | BiT | Classifier, about: dict[str, Any], folder: Path) -> str:
    backbone = only_vit(model.backbone if isinstance(model, Classifier) else model, "timm's BEiT")
    config, readout = backbone.config, about["readout"]
    head = (
        {n: t for n, t in model.state_dict().items() if not n.startswith("backbone.")} if model is not backbone else {}
    )
    linear = head.keys() - {"fc_norm.weight", "fc_norm.bias"} == {"head.weight", "head.bias"}
    lacks = {
        f"epsilon of norms other than {EPSILON:g}": config.epsilon != EPSILON,
        "GELU but the exact one": config.gelu != "exact",
        "head but a linear one, of the class token or the mean": bool(head) and (not linear or readout == "both"),
        "norm before its pooling and after it, nor none": config.final_norm == ("fc_norm.bias" in head),
    }
    refuse(backbone, "timm's BEiT", common(backbone) | lacks)
    weights = apart(backbone, ("q_bias", "", "v_bias"), "attn.", "rel_pos_bias.")
    theirs = (("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"))
    write_weights(folder / "model.safetensors", weights | head, theirs)
    write_json(folder / "config.json", _timm_config(backbone, readout, len(head["head.bias"]) if head else 0))
    rest = elsewhere(backbone, "timm", "geometric")
    return read_back_by_timm(model, backbone, folder, "{out} is in the layout of timm's BEiT") + rest


def _timm_config(backbone: ViT, readout: str, classes: int) -> dict[str, Any]:
    config, shared = backbone.config, backbone.position_at == "every_layer_shared"
    return {
        # Of any size, by its model_args.
        "architecture": f"beit_{'large' if backbone.width > 768 else 'base'}_patch16_224",
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
            "qkv_bias": config.qkv_bias,
            "init_values": config.layer_scale,
            "use_rel_pos_bias": not shared,
            "use_shared_rel_pos_bias": shared,
            "use_fc_norm": not config.final_norm,
            "global_pool": "avg" if readout == "mean" else "token",
        },
        "pretrained_cfg": pretrained_cfg(backbone, classes, "patch_embed.proj", fixed_input_size=True),
    }


def as_transformers_beit(backbone: ViT | BiT, about: dict[str, Any], folder: Path) -> str:
    backbone = only_vit(backbone, "transformers' BEiT")
    config, (height, width), (p, q) = backbone.config, backbone.image_size, backbone.patch_size
    lacks = {
        "models without a final norm": not config.final_norm,
        "oblong images": height != width or p != q,  # whose tables it would mix up
        "GELU by a sigmoid": config.gelu == "sigmoid",
    }
    refuse(backbone, "transformers' BEiT", common(backbone) | lacks)
    inside = "attention.attention.relative_position_bias."
    names = ("query.bias", "", "value.bias")
    weights = apart(backbone, names, inside, "encoder.relative_position_bias.")
    for i in range(backbone.depth):
        fused = weights.pop(f"blocks.{i}.attn.qkv.weight").chunk(3)
        weights |= {f"blocks.{i}.attn.{w}.weight": t for w, t in zip(("query", "key", "value"), fused, strict=True)}
        for which in ("query", "value"):
            weights.setdefault(f"blocks.{i}.attn.{which}.bias", torch.zeros(backbone.width))
    # LayerScale's names here come before DINOv2's.
    write_weights(folder / "model.safetensors", weights, (*TRANSFORMERS_BEIT, *TRANSFORMERS, *TRANSFORMERS_VIT))
    shared = backbone.position_at == "every_layer_shared"
    write_json(folder / "config.json", {
        "model_type": "beit", "architectures": ["BeitModel"], "hidden_size": backbone.width,
        "num_hidden_layers": backbone.depth, "num_attention_heads": backbone.heads,
        "intermediate_size": config.mlp_width, "image_size": height, "patch_size": p, "num_channels": backbone.channels,
        "hidden_act": {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}[config.gelu], "layer_norm_eps": config.epsilon,
        "layer_scale_init_value": config.layer_scale or 0.0, "use_mean_pooling": False,
        "use_relative_position_bias": not shared, "use_shared_relative_position_bias": shared,
        READOUT: about["readout"],
    })  # fmt: skip
    write_json(folder / "preprocessor_config.json", transformers_preprocessor(backbone))
    close = read_back_by_transformers(backbone, folder, outputs_of_transformers)
    return (
        "{out} is in transformers' layout (beit): AutoModel.from_pretrained('{out}', add_pooling_layer=False). It "
        f"computes the same to {close}. Its preprocessor standardises; the readout to use is "
        f"{about['readout']}.{elsewhere(backbone, 'transformers', 'bilinear')}"
    )
