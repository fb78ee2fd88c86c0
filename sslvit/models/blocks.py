"""The Transformer's block, pre-norm, with timm's parameter names (https://github.com/huggingface/pytorch-image-models).

What is random comes from keys, never from a generator: a step is the same however it is distributed or recomputed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.positions import relative_bias

Gelu = Literal["exact", "tanh"]
EPSILON = 1e-6  # of every LayerNorm, as in flax and in the papers' torch code; torch's own default is 1e-5


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of factors: float32 in mixed precision too, and float64 where everything is."""
    return torch.promote_types(dtype, torch.float32)


def dropout(x: Tensor, rate: float, key: Tensor | None) -> Tensor:
    """`b n d -> b n d`, by one key a sample, on which alone the mask of that sample depends; without keys, none."""
    if key is None:
        return x
    keep = rng.uniform(key, *x.shape[1:]) >= rate
    return (x * (keep.to(wide(x.dtype)) / (1 - rate))).to(x.dtype)


def drop_path(rate: float, depth: int, key: Tensor, dtype: torch.dtype = torch.float32) -> Sequence[Tensor]:
    """Stochastic depth (https://arxiv.org/abs/1603.09382), at a rate that grows linearly from 0 to this one.

    For each block a factor for both branches of each sample, `b 2`: 0, or what keeps the expectation.
    """
    rates = torch.linspace(0, rate, depth, device=key.device, dtype=dtype).unsqueeze(-1)
    kept = rng.uniform(key, depth, 2) >= rates
    return (kept / (1 - rates)).unbind(1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, prefix: int, qkv_bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.prefix, self.dropout = heads, prefix, dropout
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def _inputs(self, x: Tensor, relative: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values (`b k n d` each) and the bias of their logits."""
        # Split, then divide into heads: joining the three gradients takes one copy. The usual order takes two.
        q, k, v = (rearrange(part, "b n (k d) -> b k n d", k=self.heads) for part in self.qkv(x).chunk(3, -1))
        return q, k, v, None if relative is None else relative_bias(q * self.scale, relative, self.prefix)

    def forward(self, x: Tensor, relative: Tensor | None, key: Tensor | None) -> Tensor:
        q, k, v, bias = self._inputs(x, relative)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        # The paper drops after every dense layer except those of q, k and v, and never drops probabilities.
        return dropout(self.proj(rearrange(x, "b k n d -> b n (k d)")), self.dropout, key)

    def probabilities(self, x: Tensor, relative: Tensor | None) -> Tensor:
        """What forward attends with, for looking at: `b n d -> b k n n`, rows sum to 1."""
        q, k, _, bias = self._inputs(x, relative)
        logits = self.scale * q @ k.mT
        return (logits if bias is None else logits + bias).softmax(-1)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, gelu: Gelu, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU("none" if gelu == "exact" else "tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, keys: tuple[Tensor | None, Tensor | None]) -> Tensor:
        x = dropout(self.act(self.fc1(x)), self.dropout, keys[0])
        return dropout(self.fc2(x), self.dropout, keys[1])


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (https://arxiv.org/abs/2103.17239)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(
        self,
        *,
        width: int,
        heads: int,
        mlp_width: int,
        prefix: int,
        gelu: Gelu,
        qkv_bias: bool,
        layer_scale: float | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPSILON)
        self.attn = Attention(width, heads, prefix, qkv_bias, dropout)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, EPSILON)
        self.mlp = Mlp(width, mlp_width, gelu, dropout)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(
        self,
        x: Tensor,
        position: Tensor | None = None,
        relative: Tensor | None = None,
        path: Tensor | None = None,
        key: Tensor | None = None,
    ) -> Tensor:
        """`b n d -> b n d`. position is added first, relative is a table of offsets for the attention, path has drop
        path's factors for the two branches, `b 2`, and key is dropout's, `b`."""
        if position is not None:
            x = x + position
        keys = (None, None, None) if key is None else tuple(rng.fold(key, place) for place in range(3))
        x = x + _scaled(self.ls1(self.attn(self.norm1(x), relative, keys[0])), path, 0)
        return x + _scaled(self.ls2(self.mlp(self.norm2(x), keys[1:])), path, 1)

    def probabilities(self, x: Tensor, position: Tensor | None = None, relative: Tensor | None = None) -> Tensor:
        return self.attn.probabilities(self.norm1(x if position is None else x + position), relative)


def _scaled(branch: Tensor, path: Tensor | None, which: int) -> Tensor:
    return branch if path is None else (branch * path[:, which, None, None]).to(branch.dtype)


def keep_inputs_only(module: nn.Module) -> None:
    """Gradient checkpointing in all backbones of a module."""
    for part in module.modules():
        if hasattr(part, "set_grad_checkpointing"):
            part.set_grad_checkpointing()


@contextmanager
def compiled(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Its blocks, if that is wanted; afterwards they are as they are written, for whoever looks into them."""
    blocks = [part for part in module.modules() if wanted and isinstance(part, Block)]
    for block in blocks:
        block.compile()
    yield
    for block in blocks:
        block._compiled_call_impl = None
