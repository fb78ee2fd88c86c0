"""The peers of a training step, of the same sizes as ours. Those made of lightly's parts are in peers_lightly.py.

What differs from ours:
- mpp: there is no faithful peer. timm's is its bare backbone, vit-pytorch's predicts mean colours by its own masking.
- mae, simmim: transformers' heads predict the pixels of all patches and their losses take those of the hidden ones;
  ours predict the hidden ones alone.
- simmim: patches are hidden one by one, ours in squares; as many to a patch or two.
- data2vec: no peer that trains is known.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from contestants import CLASSES, HEADS, Contestant, Sizes
from torch import Tensor, nn

PEERS = {
    "timm": ("supervised", "mpp"),
    "transformers": ("mae", "simmim"),
    "lightly": ("mae", "simmim", "ijepa", "moco_v3", "simclr", "vicreg", "lejepa", "dino", "ibot", "dinov2"),
    "vit_pytorch": ("mpp",),
}


def timm_vit(sizes: Sizes, device: str, **changes: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    vit = sizes.vit
    shape = {"img_size": sizes.image_size, "patch_size": vit.patch_size[0], "embed_dim": vit.width, "num_classes": 0}
    shape |= {"depth": vit.depth, "num_heads": vit.config.heads, "mlp_ratio": vit.config.mlp_width / vit.width}
    return VisionTransformer(**(shape | changes)).to(device).train()


def by_timm(name: str, sizes: Sizes, device: str) -> Contestant:
    if name == "mpp":
        bare = timm_vit(sizes, device)
        return Contestant(bare, lambda views: bare(views[0]).mean())
    model, labels = timm_vit(sizes, device, num_classes=CLASSES), torch.arange(sizes.batch_size, device=device)
    return Contestant(model, lambda views: F.cross_entropy(model(views[0]), labels))


def by_vit_pytorch(name: str, sizes: Sizes, device: str) -> Contestant:
    from vit_pytorch import ViT as Theirs
    from vit_pytorch.mpp import MPP as TheirMPP

    vit, patch = sizes.vit, sizes.vit.patch_size[0]
    heads = vit.config.heads
    shape = {"dim": vit.width, "depth": vit.depth, "heads": heads, "dim_head": vit.width // heads}
    model = Theirs(image_size=sizes.image_size, patch_size=patch, num_classes=1, mlp_dim=vit.config.mlp_width, **shape)
    model = TheirMPP(model, patch_size=patch, dim=vit.width, mask_prob=0.5).to(device).train()
    return Contestant(model, lambda views: model(views[0]))


def by_transformers(name: str, sizes: Sizes, device: str) -> Contestant:
    vit = sizes.vit
    shape = {"hidden_size": vit.width, "num_hidden_layers": vit.depth, "num_attention_heads": vit.config.heads}
    shape |= {"intermediate_size": vit.config.mlp_width, "image_size": sizes.image_size}
    shape |= {"patch_size": vit.patch_size[0]}
    return {"mae": transformers_mae, "simmim": transformers_simmim}[name](sizes, shape, device)


def transformers_mae(sizes: Sizes, shape: dict[str, int], device: str) -> Contestant:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    width, depth, count = HEADS[sizes.heads].decoder
    shape |= {"decoder_hidden_size": width, "decoder_num_hidden_layers": depth, "decoder_num_attention_heads": count}
    shape |= {"decoder_intermediate_size": 4 * width}
    model = ViTMAEForPreTraining(ViTMAEConfig(**shape, norm_pix_loss=True)).to(device).train()
    return Contestant(model, lambda views: model(pixel_values=views[0]).loss)


def transformers_simmim(sizes: Sizes, shape: dict[str, int], device: str) -> Contestant:
    from transformers import ViTConfig, ViTForMaskedImageModeling

    config = ViTConfig(**shape, encoder_stride=shape["patch_size"])
    model = ViTForMaskedImageModeling(config).to(device).train()
    patches = (shape["image_size"] // shape["patch_size"]) ** 2

    def loss(views: tuple[Tensor, ...]) -> Tensor:
        order = torch.rand(len(views[0]), patches, device=device).argsort(1)
        return model(views[0], bool_masked_pos=order < 0.6 * patches).loss

    return Contestant(model, loss)


def by_lightly(name: str, sizes: Sizes, device: str) -> Contestant:
    import peers_lightly  # needs lightly

    return getattr(peers_lightly, name)(sizes, device)


BY: dict[str, Callable[[str, Sizes, str], Contestant]] = {
    "timm": by_timm,
    "transformers": by_transformers,
    "lightly": by_lightly,
    "vit_pytorch": by_vit_pytorch,
}
