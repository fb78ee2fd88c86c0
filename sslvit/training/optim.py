"""Weight decay and learning rate of each parameter; the optimizers themselves are torch's."""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sslvit.config import TrainConfig
from sslvit.objectives import schedule
from sslvit.training import sharding

NoWeightDecay = Literal["tokens_and_vectors", "vectors", "nothing"]
BEFORE_BLOCKS = ("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre")
# Names, or how names begin.
TOKENS = ("pos_embed", "relative_embed", "relative_bias", "cls_token", "reg_token", "mask_token")


def decays(name: str, parameter: nn.Parameter, no_weight_decay: NoWeightDecay) -> bool:
    """Whether weight decay applies to this parameter, by one of the conventions of the papers' code for exempting some.

    - tokens_and_vectors: biases, norms, tokens and learned positions are exempt, so that only kernels decay, as in the
      code of the ViT paper (https://github.com/google-research/big_vision, optax.py).
    - vectors: one-dimensional parameters and biases are exempt. Tokens and learned positions decay (MAE, DINO).
    - nothing: biases and norms decay too (MoCo v3).
    """
    vector = parameter.ndim <= 1 or name.endswith(".bias")
    token = any(part.startswith(TOKENS) for part in name.split(".")[-2:])  # relative_bias.3 is the fourth block's
    return not {"nothing": False, "vectors": vector, "tokens_and_vectors": vector or token}[no_weight_decay]


def layer_of(name: str, depth: int) -> int:
    """0 before the blocks, then the blocks from 1, and depth + 1 after them.

    As in the code of BEiT and MAE (util/lr_decay.py), where the last norm has the rate of the head, as has a bias by
    offset that all blocks share. (In timm the norm has the rate of the last block.)
    """
    if name.startswith(("blocks.", "relative_bias.")):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(BEFORE_BLOCKS) else depth + 1


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    *,
    no_weight_decay: NoWeightDecay = "tokens_and_vectors",
    layer_decay: float = 1.0,
    apart: bool = False,
) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: with weight decay, and without. With layer decay two per layer, the last
    layer first, each with the scale of its learning rate: layer_decay to the power of the number of layers above. What
    an objective gives another rate (Objective.rate_factor) is in groups of its own.
    apart: the backbone's are in groups of their own, which may have another rate than the heads'."""
    if no_weight_decay not in get_args(NoWeightDecay):
        raise ValueError(f"no_weight_decay {no_weight_decay!r} must be one of {get_args(NoWeightDecay)}")
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    # The backbone that an objective trains, or that of a classifier; the module may also be a backbone itself.
    learner = getattr(module, "learner", getattr(module, "backbone", module))
    inside = {parameter: name for name, parameter in learner.named_parameters()}
    depth = len({name.split(".")[1] for name in inside.values() if name.startswith("blocks.")})
    if layer_decay != 1 and not depth:
        raise ValueError(f"layer_decay {layer_decay} needs a ViT with trainable blocks")
    factor_of = getattr(module, "rate_factor", lambda name: 1.0)
    layers = {
        name: (
            layer_of(inside.get(p, "head"), depth) if layer_decay != 1 else depth + 1,
            apart and p in inside,
            factor_of(inside.get(p, name)),
        )
        for name, p in trainable
    }
    groups = []
    for place in sorted(set(layers.values()), key=lambda place: (-place[0], place[1], -place[2])):
        layer, backbone, factor = place
        scale = factor * layer_decay ** (depth + 1 - layer)
        here = [one for one in trainable if layers[one[0]] == place]
        decayed = [p for name, p in here if decays(name, p, no_weight_decay)]
        exempt = [p for name, p in here if not decays(name, p, no_weight_decay)]
        about = {"scale": scale, "backbone": backbone}
        groups += [
            {"params": decayed, "weight_decay": weight_decay, "decays": True} | about,
            {"params": exempt, "weight_decay": 0.0, "decays": False} | about,
        ]
    return groups


def new_optimizer(objective: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(
        objective,
        config.weight_decay,
        no_weight_decay=config.no_weight_decay,
        layer_decay=config.layer_decay,
        apart=config.backbone_apart,
    )
    return sgd(groups, config.betas[0]) if config.optimizer == "sgd" else adamw(groups, config.betas)


def adamw(groups: Iterable[dict], betas: tuple[float, float]) -> torch.optim.AdamW:
    """Its learning rate and decay are set by the loop at each step. torch multiplies the decay by the learning rate."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def sgd(groups: Iterable[dict], momentum: float) -> torch.optim.SGD:
    """SGD with momentum; its weight decay is part of the gradient."""
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum)


def set_rates(optimizer: torch.optim.Optimizer, progress: float, config: TrainConfig) -> None:
    end = config.weight_decay if config.final_weight_decay is None else config.final_weight_decay
    for group in optimizer.param_groups:
        of_backbone = config.backbone_rate(progress) if group["backbone"] else 1.0
        group["lr"] = of_backbone * group["scale"] * config.learning_rate(progress)
        if group["decays"]:
            group["weight_decay"] = schedule.cosine(progress, config.weight_decay, end)


def clip(model: nn.Module, config: TrainConfig, accelerator: Accelerator) -> Tensor:
    """Clips the gradients, and returns their global norm before that."""
    most, each = config.clip or math.inf, config.clip_each
    parameters = [p for p in model.parameters() if p.grad is not None]
    if config.shard:
        return sharding.clip(parameters, most, each)
    norm = accelerator.clip_grad_norm_(parameters, most)
    if each:
        gradients = [p.grad for p in parameters]
        norms = torch._foreach_norm(gradients)
        torch._foreach_mul_(gradients, [(each / (n + 1e-6)).clamp(max=1) for n in norms])
    return norm
