"""timm's part of a model folder's config.json, by which timm builds the same function or refuses to."""

from typing import Any

from torch import Tensor

from sslvit.models.blocks import EPSILON
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.views.pretraining import default_eval_crop

# By width. Any plain ViT of timm's would do, since model_args are complete; these are the expected names.
PLAIN = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
# By the ResNet of a hybrid.
WITH_RESNET = {
    "R": "vit_tiny_r_s16_p8_224",
    "R26": "vit_small_r26_s32_224",
    "R50": "vit_base_r50_s16_224",
    "R50-4stage": "vit_large_r50_s32_224",
}
GATED = "vit_giant_patch14_dinov2"  # DINOv2's giant, of any size by its model_args
TIMM_OPENS = (*PLAIN.values(), *WITH_RESNET.values(), GATED)


def timm_config(backbone: ViT | BiT, readout: str, head: dict[str, Tensor]) -> dict[str, Any]:
    """timm's entries of config.json. An `architecture` that timm does not know makes it refuse the model by name."""
    if isinstance(backbone, BiT):
        return _refused("timm's ResNets have other constants in their norms")
    if reason := _unknown_to_timm(backbone, readout, head):
        return _refused(reason)
    config, patch_size, first = backbone.config, backbone.patch_size, "patch_embed.proj"
    architecture, classes = PLAIN.get(backbone.width, "vit_base_patch16_224"), len(head["head.bias"]) if head else 0
    if config.hybrid:  # its patches are of the ResNet's features
        stride = backbone.patch_embed.backbone.stride
        patch_size = (patch_size[0] // stride, patch_size[1] // stride)
        first = f"patch_embed.backbone.{'' if config.hybrid == 'R' else 'stem.'}conv"
        architecture = WITH_RESNET[config.hybrid]
    # timm's width of a gated MLP counts gate and value.
    act, mlp_width = {"exact": "gelu", "tanh": "gelu_tanh", "sigmoid": "quick_gelu"}[config.gelu], config.mlp_width
    if config.swiglu:
        architecture, act, mlp_width = GATED, "silu", 2 * config.mlp_width
    return {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": backbone.width,
        "model_args": {
            "img_size": list(backbone.image_size),
            "patch_size": list(patch_size),
            "in_chans": backbone.channels,
            "embed_dim": backbone.width,
            "depth": backbone.depth,
            "num_heads": backbone.heads,
            "mlp_ratio": mlp_ratio(backbone.width, mlp_width),
            "qkv_bias": config.qkv_bias,
            "init_values": config.layer_scale,
            "class_token": config.class_token,
            "reg_tokens": config.registers,
            "no_embed_class": not config.class_position,
            "pos_embed": "none" if config.position == "none" else "learn",
            "act_layer": act,
            # An argument, or else no model without a class token could be built. fc_norm: or else timm would move the
            # norm behind the mean and look for other names.
            "global_pool": "token" if readout == "cls" else "avg",
            "fc_norm": "fc_norm.bias" in head,
        },
        "pretrained_cfg": pretrained_cfg(backbone, classes, first, fixed_input_size=True),
    }


def pretrained_cfg(backbone: ViT | BiT, classes: int, first: str, **about: Any) -> dict[str, Any]:
    """How timm prepares images for the model. first: the name of the layer that sees the pixels."""
    return {
        "input_size": [backbone.channels, *backbone.image_size],
        **about,
        "interpolation": "bicubic",
        "crop_pct": default_eval_crop(backbone.image_size),
        "crop_mode": "center",
        "mean": list(backbone.config.mean),
        "std": list(backbone.config.std),
        "num_classes": classes,
        "first_conv": first,
        "classifier": "head",
    }


def _refused(reason: str) -> dict[str, Any]:
    return {"architecture": f"sslvit only ({reason})", "num_classes": 0}


def _unknown_to_timm(backbone: ViT, readout: str, head: dict[str, Tensor]) -> str | None:
    config = backbone.config
    reasons = {
        "timm's DINOv3 has other names: sslvit convert --to timm writes them": config.position == "rope",
        "timm's BEiT has other names: sslvit convert --to timm writes them": config.position == "relative_bias",
        "timm's CLIP has no bias of patches: sslvit convert --to timm folds it": config.stem_norm,
        "timm has no norm for the class token apart": config.class_norm,
        "timm has no hybrids with SwiGLU": config.swiglu and config.hybrid,
        "timm's hybrids have other epsilons in their ResNet": config.hybrid and config.hybrid_epsilons != "timm",
        f"timm has no position {config.position} at {config.position_at}": (
            config.position in ("learned_2d", "relative") or config.position_at != "stem"
        ),
        "timm's configuration has no epsilon of norms": config.epsilon != EPSILON,
        "timm has one norm, before its pooling or after it": config.final_norm == ("fc_norm.bias" in head),
        "timm has no hidden layer in its head": "pre_logits.bias" in head,
        "timm has no readout of class token and mean": readout == "both",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def mlp_ratio(width: int, mlp_width: int) -> float:
    """timm takes int(width * ratio), which must not be rounded down: 1152 * (4304 / 1152) could be 4303.99..."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width
