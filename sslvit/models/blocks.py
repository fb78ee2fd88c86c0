"""The Transformer's block, pre-norm, with timm's parameter names (https://github.com/huggingface/pytorch-image-models).

All randomness comes from keys, never from a generator: a step is the same however it is distributed or recomputed.
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
from sslvit.models.rope import turned
from sslvit.processes.device import send

Gelu = Literal["exact", "tanh", "sigmoid"]
EPSILON = 1e-6  # of every LayerNorm, as in flax and in the papers' code; torch's default is 1e-5


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """For sums and factors: float32 under mixed precision, float64 where everything is float64."""
    return torch.promote_types(dtype, torch.float32)


def dropout(x: Tensor, rate: float, key: Tensor | None) -> Tensor:
    """`b n d -> b n d`. The mask of a sample depends on its key alone; without keys nothing is dropped."""
    if key is None:
        return x
    keep = rng.uniform(send(key, x.device), *x.shape[1:]) >= rate
    return (x * (keep.to(at_least_float32(x.dtype)) / (1 - rate))).to(x.dtype)


def drop_path(
    rate: float, depth: int, key: Tensor, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Sequence[Tensor]:
    """Stochastic depth (https://arxiv.org/abs/1603.09382), at a rate that grows linearly from 0 to this one: for each
    block the factors of both branches of each sample, `b 2`, either 0 or 1 / (1 - rate); on this device."""
    rates = torch.linspace(0, rate, depth, device=key.device, dtype=dtype).unsqueeze(-1)
    keep = rng.uniform(key, depth, 2) >= rates
    return send(keep / (1 - rates), device or key.device).unbind(1)


class WithoutKeyBias(nn.Linear):
    """Queries, keys and values with a bias whose middle third, the keys', is masked to zero, as in DINOv3 and BEiT."""

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.bias.chunk(3)
        return F.linear(x, self.weight, torch.cat([queries, torch.zeros_like(keys), values]))


class Attention(nn.Module):
    def __init__(
        self, width: int, heads: int, prefix: int, qkv_bias: bool, dropout: float, key_bias: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.prefix, self.dropout = heads, prefix, dropout
        self.scale = (width // heads) ** -0.5
        linear = nn.Linear if key_bias or not qkv_bias else WithoutKeyBias
        self.qkv = linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def _inputs(
        self, x: Tensor, relative: Tensor | None, rope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values (`b k n d` each) and the bias of their logits."""
        # Split, then divide into heads: joining the three gradients takes one copy. The usual order takes two.
        q, k, v = (rearrange(each, "b n (k d) -> b k n d", k=self.heads) for each in self.qkv(x).chunk(3, -1))
        if rope is not None:
            q, k = turned(q, rope, self.prefix), turned(k, rope, self.prefix)
        if relative is not None and relative.ndim == 2:
            relative = relative_bias(q * self.scale, relative, self.prefix)
        return q, k, v, None if relative is None else relative.to(q.dtype)

    def forward(self, x: Tensor, relative: Tensor | None, key: Tensor | None, rope: Tensor | None = None) -> Tensor:
        q, k, v, bias = self._inputs(x, relative, rope)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        # The paper drops after every dense layer except those of q, k and v, and never drops probabilities.
        return dropout(self.proj(rearrange(x, "b k n d -> b n (k d)")), self.dropout, key)

    def probabilities(self, x: Tensor, relative: Tensor | None, rope: Tensor | None = None) -> Tensor:
        """The attention weights, for inspection: `b n d -> b k n n`, rows sum to 1."""
        q, k, _, bias = self._inputs(x, relative, rope)
        logits = self.scale * q @ k.mT
        return (logits if bias is None else logits + bias).softmax(-1)


class SigmoidGelu(nn.Module):
    """GELU's other approximation, x * sigmoid(1.702 x), with which OpenAI trained CLIP; elsewhere quick_gelu."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, gelu: Gelu, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, hidden)
        self.act = SigmoidGelu() if gelu == "sigmoid" else nn.GELU("none" if gelu == "exact" else "tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, keys: tuple[Tensor | None, Tensor | None]) -> Tensor:
        x = dropout(self.act(self.fc1(x)), self.dropout, keys[0])
        return dropout(self.fc2(x), self.dropout, keys[1])


class SwiGlu(nn.Module):
    """silu(gate) * value instead of a GELU (https://arxiv.org/abs/2002.05202). One matrix makes both, the gate first:
    DINOv2's w12, and DINOv3's w1 and w2 joined, under the names of timm's packed one."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, keys: tuple[Tensor | None, Tensor | None]) -> Tensor:
        gate, value = self.fc1(x).chunk(2, -1)
        return dropout(self.fc2(dropout(F.silu(gate) * value, self.dropout, keys[0])), self.dropout, keys[1])


def swiglu_width(width: int) -> int:
    """DINOv2's rule for SwiGLU: two thirds of an MLP of four times the width, in whole eights, so that the three
    matrices have about as many weights as the usual two."""
    return (int(4 * width * 2 / 3) + 7) // 8 * 8


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
        prefix: int = 0,
        gelu: Gelu = "exact",
        swiglu: bool = False,
        qkv_bias: bool = True,
        key_bias: bool = True,
        layer_scale: float | None = None,
        dropout: float = 0.0,
        epsilon: float = EPSILON,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, epsilon)
        self.attn = Attention(width, heads, prefix, qkv_bias, dropout, key_bias)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, epsilon)
        self.mlp = SwiGlu(width, mlp_width, dropout) if swiglu else Mlp(width, mlp_width, gelu, dropout)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(
        self,
        x: Tensor,
        position: Tensor | None = None,
        relative: Tensor | None = None,
        path: Tensor | None = None,
        key: Tensor | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """`b n d -> b n d`. position is added first, relative is the attention's table of offsets or the bias itself,
        `k n n`, path has the drop path factors of the two branches, `b 2`, key is dropout's, `b`, and rope has rotary
        positions' turns."""
        if position is not None:
            x = x + position
        keys = (None, None, None) if key is None else tuple(rng.fold(key, place) for place in range(3))
        x = x + _scaled(self.ls1(self.attn(self.norm1(x), relative, keys[0], rope)), path, 0)
        return x + _scaled(self.ls2(self.mlp(self.norm2(x), keys[1:])), path, 1)

    def probabilities(
        self,
        x: Tensor,
        position: Tensor | None = None,
        relative: Tensor | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        return self.attn.probabilities(self.norm1(x if position is None else x + position), relative, rope)


def _scaled(branch: Tensor, path: Tensor | None, which: int) -> Tensor:
    return branch if path is None else (branch * path[:, which, None, None]).to(branch.dtype)


def keep_inputs_only(module: nn.Module) -> None:
    """Gradient checkpointing in all backbones of a module, ViTs and BiTs."""
    for child in module.modules():
        if "grad_checkpointing" in vars(child):
            child.grad_checkpointing = True


@contextmanager
def compiled(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Compiles the blocks of a module if wanted, and undoes it afterwards."""
    blocks = [child for child in module.modules() if wanted and isinstance(child, Block)]
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
