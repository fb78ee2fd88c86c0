"""Which parameters decay, and by how much; the optimizer itself is torch's."""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import nn

Spares = Literal["tokens_and_vectors", "vectors", "nothing"]
TOKENS = ("pos_embed", "relative_embed", "cls_token", "reg_token", "mask_token")  # names, or how names begin


def decays(name: str, parameter: nn.Parameter, spares: Spares) -> bool:
    """Whether weight decay reaches this parameter, by one of the customs of the papers' code.

    - tokens_and_vectors: biases, norms, and what is looked up or added rather than multiplied, so that only kernels
      decay, as in the code of the ViT paper (https://github.com/google-research/big_vision, optax.py).
    - vectors: what has one dimension, and biases. Tokens and learned positions have three, and decay (MAE, DINO).
    - nothing: biases and norms decay too (MoCo v3).
    """
    vector = parameter.ndim <= 1 or name.endswith(".bias")
    token = name.rpartition(".")[-1].startswith(TOKENS)
    return not {"nothing": False, "vectors": vector, "tokens_and_vectors": vector or token}[spares]


def parameter_groups(
    module: nn.Module, weight_decay: float, *, spares: Spares = "tokens_and_vectors"
) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: with weight decay, and without."""
    if spares not in get_args(Spares):
        raise ValueError(f"spares {spares!r} is none of {get_args(Spares)}")
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trainable if decays(name, p, spares)]
    spared = [p for name, p in trainable if not decays(name, p, spares)]
    return [
        {"params": decayed, "weight_decay": weight_decay, "decays": True},
        {"params": spared, "weight_decay": 0.0, "decays": False},
    ]


def adamw(groups: Iterable[dict], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW whose learning rate and decay the loop sets each step. torch multiplies the decay by the learning rate."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
