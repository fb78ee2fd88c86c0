"""Which parameters decay, and by how much; the optimizer itself is torch's."""

from collections.abc import Iterable

import torch
from torch import nn

# Tables and tokens are looked up or added, not multiplied: with biases and norms they stay free of decay, as in the
# code of the ViT paper, where only kernels decay (https://github.com/google-research/big_vision, optax.py).
TOKENS = ("pos_embed", "cls_token", "reg_token", "mask_token", "position")


def decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not any(token in name for token in TOKENS)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups of the trainable parameters: kernels with weight decay, the rest without."""
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    kernels = [p for name, p in trainable if decays(name, p)]
    others = [p for name, p in trainable if not decays(name, p)]
    return [
        {"params": kernels, "weight_decay": weight_decay, "decays": True},
        {"params": others, "weight_decay": 0.0, "decays": False},
    ]


def adamw(groups: Iterable[dict], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW whose learning rate and decay the loop sets each step. torch multiplies the decay by the learning rate."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
