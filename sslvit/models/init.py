"""Initial weights of a ViT from a seed, by the rules of timm, DINO, BEiT, MoCo v3, MAE and JAX."""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

Init = Literal["timm", "dino", "beit", "moco_v3", "mae", "jax"]


@torch.no_grad()
def initialize(vit: nn.Module, init: Init, seed: int) -> None:
    """Draws everything but the norms, the layer scales, fixed positions, biases by offset and a hybrid's ResNet.

    | | linear weights | biases | patch projection | class token |
    |-|-|-|-|-|
    | timm | N(0, .02) | 0 | torch's convolution | N(0, 1e-6) |
    | dino | N(0, .02) | 0 | torch's convolution | N(0, .02) |
    | beit | N(0, .02), cut at +-.02 | 0 | as linear weights, bias 0 | as linear weights |
    | moco_v3 | xavier, q, k, v each | 0 | xavier, bias 0 | N(0, 1e-6) |
    | mae | xavier, q, k, v as one matrix | 0 | xavier, bias as torch's convolution | N(0, .02) |
    | jax | xavier, q, k, v each | MLP N(0, 1e-6), else 0 | lecun normal, bias 0 | 0 |

    timm and DINO call their rule trunc_normal_, but it cuts at +-2, a hundred standard deviations: a normal. Learned
    positions are N(0, .02) in all of these, in BEiT cut like the rest. In BEiT, SimMIM and data2vec the matrices that
    end the two branches of block l, counted from 1, are divided by sqrt(2 l). Registers, younger than these papers, are
    N(0, 1e-6) as timm's: never 0, or without positions they would stay equal forever. SwiGLU's gate and value are drawn
    as two matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = partial(nn.init.normal_, generator=generator)
    small = partial(cut_normal, generator=generator) if init == "beit" else partial(normal, std=0.02)
    for number, block in enumerate(vit.blocks, 1):
        matrices_in = {block.attn.qkv: 3 if init in ("moco_v3", "jax") else 1, block.mlp.fc1: 1 + vit.config.swiglu}
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            matrices = matrices_in.get(linear, 1)
            if init in ("timm", "dino", "beit"):
                small(linear.weight)
            else:
                xavier(linear.weight, linear.out_features // matrices, generator)
            if linear.bias is not None:
                in_mlp = linear in (block.mlp.fc1, block.mlp.fc2)
                normal(linear.bias, std=1e-6 if init == "jax" and in_mlp else 0.0)
            if init == "beit" and linear in (block.attn.proj, block.mlp.fc2):
                linear.weight /= math.sqrt(2 * number)
    draw_projection(vit.patch_embed.proj, init, generator)
    class_token = {"timm": 1e-6, "dino": 0.02, "moco_v3": 1e-6, "mae": 0.02, "jax": 0.0}
    if vit.cls_token is not None:
        normal(vit.cls_token, std=class_token[init]) if init in class_token else small(vit.cls_token)
    if vit.reg_token is not None:
        normal(vit.reg_token, std=1e-6)
    for name, parameter in vit.named_parameters(recurse=False):
        if name.startswith(("pos_embed", "relative_embed")):
            small(parameter)
    if init == "mae":  # its code draws the projection's weight anew, and leaves the bias as it was made
        as_torch(vit.patch_embed.proj, vit.patch_embed.proj.bias, generator)


def draw_projection(projection: nn.Module, init: Init, generator: torch.Generator) -> None:
    nn.init.zeros_(projection.bias)
    if init in ("timm", "dino"):
        as_torch(projection, projection.weight, generator)
        as_torch(projection, projection.bias, generator)
    elif init == "beit":
        cut_normal(projection.weight, generator)
    elif init == "jax":
        lecun_normal(projection.weight, generator)
    else:
        xavier(projection.weight, len(projection.weight), generator)


def cut_normal(weight: Tensor, generator: torch.Generator) -> None:
    """A normal of deviation .02, cut there."""
    nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02, generator=generator)


def xavier(weight: Tensor, fan_out: int, generator: torch.Generator) -> None:
    bound = math.sqrt(6 / (weight[0].numel() + fan_out))
    nn.init.uniform_(weight, -bound, bound, generator=generator)


def as_torch(convolution: nn.Module, tensor: Tensor, generator: torch.Generator) -> None:
    """Draws a weight or a bias of this convolution by torch's default rule."""
    bound = convolution.weight[0].numel() ** -0.5
    nn.init.uniform_(tensor, -bound, bound, generator=generator)


def lecun_normal(weight: Tensor, generator: torch.Generator) -> None:
    """flax's default: a normal of variance 1 / fan_in, cut at two standard deviations of the uncut one."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978  # the standard deviation of a unit normal cut at +-2
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
