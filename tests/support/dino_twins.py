"""DINOv3's models in timm and transformers at small sizes, and a release's file as Meta's code writes it."""

import re
from typing import Any

import timm
import torch
from foreign_models import scramble
from torch import Tensor, nn

# A head of 16 channels has four frequencies.
SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def timm_dinov3(name: str = "vit_small_patch16_dinov3_qkvb", **changes: Any) -> nn.Module:
    """Of timm's own function for this name, so that everything but its sizes is the release's."""
    options = SIZES | {"patch_size": 4, "img_size": 16, "num_classes": 0, "global_pool": "token"} | changes
    return scramble(timm.create_model(name, **options))


def release_of(theirs: nn.Module) -> dict[str, Tensor]:
    """The state dict as Meta's code names it: facebookresearch/dinov3, dinov3/models/vision_transformer.py,
    layers/attention.py (LinearKMaskedBias), layers/ffn_layers.py and layers/rope_position_encoding.py. Read back by
    timm's checkpoint_filter_fn, which was written for those files."""
    state: dict[str, Tensor] = {}
    theirs_of = dict(theirs.named_parameters())
    for name, tensor in theirs_of.items():
        if name.endswith("q_bias"):
            nothing = torch.full_like(tensor, 7.0)  # masked, so whatever it is
            state[name.replace("q_bias", "qkv.bias")] = torch.cat(
                [tensor, nothing, theirs_of[name.replace("q_bias", "v_bias")]]
            )
            mask = torch.cat([torch.ones_like(tensor), torch.zeros_like(tensor), torch.ones_like(tensor)])
            state[name.replace("q_bias", "qkv.bias_mask")] = mask
            continue
        if name.endswith("v_bias"):
            continue
        name = re.sub(r"gamma_([12])", r"ls\1.gamma", name).replace("reg_token", "storage_tokens")
        if any("fc1_g" in other for other in theirs_of):
            name = name.replace("fc1_g", "w1").replace("fc1_x", "w2").replace("fc2", "w3")
        state[name] = tensor
    width = theirs.embed_dim
    state["mask_token"] = torch.zeros(1, width)
    state["rope_embed.periods"] = theirs.rope.periods
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def transformers_dinov3(**changes: Any) -> nn.Module:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"patch_size": 4, "image_size": 16, "num_register_tokens": 4}
    sizes |= {"hidden_act": "silu"} if changes.get("use_gated_mlp") else {}
    sizes |= changes
    return scramble(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes)))


def under_our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of timm's Eva or of transformers' DINOv3 or DINOv2, or their gradients, under our names."""
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        for old, new in (
            ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
            ("embeddings.patch_embeddings.", "patch_embed.proj."),
            ("embeddings.position_embeddings", "pos_embed"),
            ("encoder.layer.", "blocks."),
            ("layernorm.", "norm."),
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.register_tokens", "reg_token"),
            ("model.layer.", "blocks."),
            (".attention.o_proj", ".attn.proj"),
            (".attention.", ".attn."),
            (".up_proj" if any("gate_proj" in other for other in theirs) else ".fc1_x", ".value"),
            (".up_proj", ".fc1"),
            (".gate_proj", ".gate"),
            (".fc1_g", ".gate"),
            (".down_proj", ".fc2"),
            (".layer_scale1.lambda1", ".ls1.gamma"),
            (".layer_scale2.lambda1", ".ls2.gamma"),
            (".gamma_1", ".ls1.gamma"),
            (".gamma_2", ".ls2.gamma"),
            ("q_bias", "q_proj.bias"),
            ("v_bias", "v_proj.bias"),
        ):
            name = name.replace(old, new)
        if not name.endswith("mask_token"):
            ours[name] = tensor
    for base in {name.rpartition(".attn.")[0] for name in ours if ".attn." in name}:
        for kind in ("weight", "bias"):
            q, k, v = (ours.pop(f"{base}.attn.{which}_proj.{kind}", None) for which in "qkv")
            if q is not None:
                ours[f"{base}.attn.qkv.{kind}"] = torch.cat([q, torch.zeros_like(q) if k is None else k, v])
            if (gate := ours.pop(f"{base}.mlp.gate.{kind}", None)) is not None:
                ours[f"{base}.mlp.fc1.{kind}"] = torch.cat([gate, ours.pop(f"{base}.mlp.value.{kind}")])
    return ours
