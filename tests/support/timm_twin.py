"""timm's model of the same architecture as one of ours, with the same weights."""

from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sslvit.models.vit import ViT

TINY = {"image_size": 16, "patch_size": 4, "width": 24, "depth": 3, "heads": 3}


def timm_twin(vit: ViT) -> VisionTransformer:
    """timm's model of the same architecture with random weights, and these weights in ours."""
    c = vit.config
    twin = VisionTransformer(
        img_size=tuple(vit.image_size),
        patch_size=vit.patch_size,
        in_chans=vit.channels,
        num_classes=0,
        global_pool="",
        embed_dim=vit.width,
        depth=vit.depth,
        num_heads=vit.heads,
        mlp_ratio=c.mlp_width / vit.width,
        qkv_bias=c.qkv_bias,
        init_values=c.layer_scale,
        class_token=c.class_token,
        pos_embed="none" if vit.position == "none" else "learn",
        no_embed_class=not c.class_position,
        reg_tokens=vit.registers,
        dynamic_img_size=True,
        act_layer=nn.GELU if c.gelu == "exact" else lambda: nn.GELU("tanh"),
        norm_layer=partial(nn.LayerNorm, eps=c.epsilon),
    ).eval()
    for parameter in twin.parameters():
        nn.init.normal_(parameter, std=0.3)
    vit.load_state_dict(twin.state_dict())
    return twin
