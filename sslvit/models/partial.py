"""Training less than all weights of a backbone: `--train` of fine-tuning and of adapt.

all            every weight
head           none of the backbone's: what reads it is trained alone
norm           its norms
last:4         its last four blocks, and the norm after them
attention      q, k, v and the projection of every block (https://arxiv.org/abs/2203.09795)
lora:8         low-rank updates of rank 8 of these (https://arxiv.org/abs/2106.09685); lora:8+mlp of the MLPs' too

LoRA as in peft: W + (alpha / rank) B A with A uniform as torch's linear layers begin, B zero, so that training begins
at the pretrained model, and alpha twice the rank. Of q, k and v, which are one matrix here as in timm, A is shared.
Dropout before A is left out. The update is added to the weight, which is then applied once: the same as two products,
but for rounding.
"""

import re
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sslvit import rng
from sslvit.models.blocks import Block

Backbone = TypeVar("Backbone", bound=nn.Module)
ATTENTION, MLP = ("attn.qkv", "attn.proj"), ("mlp.fc1", "mlp.fc2")
KINDS = "all, head, norm, attention, last:N, lora:RANK or lora:RANK+mlp, for example last:4 or lora:8"

SCALE = 2.0  # alpha over the rank


class Part(NamedTuple):
    kind: str
    number: int = 0  # of blocks, or the rank
    mlp: bool = False


def parse(text: str) -> Part:
    found = re.fullmatch(r"(all|head|norm|attention)|(last|lora):([1-9]\d*)(\+mlp)?", text)
    if not found or (found[4] and found[2] != "lora"):
        raise ValueError(f"--train {text}: choose one of {KINDS}")
    return Part(found[1]) if found[1] else Part(found[2], int(found[3]), bool(found[4]))


def train_only(backbone: nn.Module, text: str, *, seed: int = 0) -> None:
    """Leaves so much of a backbone trainable, and gives it adapters if they are asked for."""
    part = parse(text)
    if part.kind == "all":
        return
    depth = sum(isinstance(module, Block) for module in backbone.modules())
    if not depth and part.kind != "head":
        raise ValueError(f"--train {text} needs a ViT; a {type(backbone).__name__} has no blocks: take all or head")
    if part.kind == "last" and part.number > depth:
        raise ValueError(f"--train {text}: the model has {depth} blocks")
    backbone.requires_grad_(False)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(belongs(name, part, depth))
    if part.kind == "lora":
        places = ATTENTION + (MLP if part.mlp else ())
        for name, module in list(backbone.named_modules()):
            if isinstance(module, nn.Linear) and name.endswith(places):
                update = LowRank(module.weight, part.number, rng.key(seed, "lora", name))
                parametrize.register_parametrization(module, "weight", update)


def belongs(name: str, part: Part, depth: int) -> bool:
    """Whether a parameter of the backbone is in the part that is trained."""
    after = name.startswith(("norm.", "cls_norm."))
    inside = name.startswith(("blocks.", "relative_bias."))
    block = int(name.split(".")[1]) if inside else depth if after else -1
    return {
        "norm": bool(re.search(r"(^|\.)\w*norm\w*\.(weight|bias)$", name)),
        "attention": ".attn.qkv." in name or ".attn.proj." in name,
        "last": block >= depth - part.number,
    }.get(part.kind, False)


class LowRank(nn.Module):
    """W -> W + (alpha / rank) B A"""

    def __init__(self, weight: Tensor, rank: int, key: Tensor):
        super().__init__()
        outputs, inputs = weight.shape
        if rank > min(weight.shape):
            raise ValueError(f"--train lora:{rank}: the rank of a matrix of {outputs} x {inputs} is not that large")
        bound = inputs**-0.5
        down = (2 * rng.uniform(key, rank * inputs).reshape(rank, inputs) - 1) * bound
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(torch.zeros(outputs, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # the sum keeps the weight's precision
            return weight + SCALE * (self.up @ self.down)


def adapters(backbone: nn.Module) -> dict[str, Tensor]:
    """The updates by themselves: blocks.0.attn.qkv.down (A) and .up (B). Empty for a backbone without."""
    found: dict[str, Tensor] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, LowRank):
            place = name.removesuffix(".parametrizations.weight.0")
            found |= {f"{place}.down": module.down.detach(), f"{place}.up": module.up.detach()}
    return found


def merged(backbone: Backbone) -> Backbone:
    """The backbone itself if it has no adapters; else a new one in whose weights they are."""
    if not adapters(backbone):
        return backbone
    plain = type(backbone)(backbone.config)
    plain.to(next(backbone.parameters())).load_state_dict(merged_state(backbone.state_dict()), strict=True)
    return plain


def merged_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a backbone, in which the updates of its adapters are."""
    plain = {}
    for name, value in state.items():
        place, inside, rest = name.partition(".parametrizations.weight.")
        if not inside:
            plain[name] = value
        elif rest == "original":
            up, down = (state[f"{place}{inside}0.{which}"] for which in ("up", "down"))
            plain[f"{place}.weight"] = value + SCALE * (up @ down)
    return plain


def trained(module: nn.Module) -> int:
    """The number of its parameters that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
