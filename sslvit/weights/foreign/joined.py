"""Weights that other code keeps apart and this ViT in one matrix: queries, keys and values; SwiGLU's gate and value.

Beside the weights each function gives facts that only the names show.
"""

import re
from typing import Any

import torch
from torch import Tensor

from sslvit.errors import DataError
from sslvit.models.rope import periods_of

Weights = dict[str, Tensor]
# The gate (which goes through silu), the value, and the way back: DINOv3's, timm's and transformers'.
GATED = (("w1", "w2", "w3"), ("fc1_g", "fc1_x", "fc2"), ("gate_proj", "up_proj", "down_proj"))
# Gate and value as one, and the way back: DINOv2's and transformers' on disk. And transformers' DINOv3 without a gate.
PACKED = (("w12", "w3"), ("weights_in", "weights_out"))
PLAIN = ("up_proj", "down_proj")
BASE = 100.0  # of DINOv3's periods


def joined(weights: Weights, file: str) -> tuple[Weights, dict[str, Any]]:
    """weights: under timm's names as far as these differ by words alone."""
    rotary = "pos_embed" not in weights
    weights, key_bias = _queries_keys_values(dict(weights), rotary)
    weights, swiglu = _mlps(weights)
    weights, periods = _periods(weights, file)
    return weights, key_bias | swiglu | periods


def _queries_keys_values(weights: Weights, rotary: bool) -> tuple[Weights, dict[str, Any]]:
    facts: dict[str, Any] = {}
    for name in list(weights):
        if match := re.fullmatch(r"(.*\.attn\.)(query|q_proj)\.(weight|bias)", name):
            same = [
                name.replace("query", which).replace("q_proj", f"{which[0]}_proj")
                for which in ("query", "key", "value")
            ]
            if rotary and match[3] == "bias" and same[1] not in weights:  # DINOv3's keys have none
                weights[same[1]] = torch.zeros_like(weights[name])
                facts["key_bias"] = False
            if all(other in weights for other in same):
                weights[f"{match[1]}qkv.{match[3]}"] = torch.cat([weights.pop(other) for other in same])
        elif rotary and name.endswith(".attn.q_bias") and (values := name.replace("q_bias", "v_bias")) in weights:
            queries = weights.pop(name)
            weights[name.replace("q_bias", "qkv.bias")] = torch.cat(
                [queries, torch.zeros_like(queries), weights.pop(values)]
            )
            facts["key_bias"] = False
        elif name.endswith(".attn.qkv.bias_mask") and (bias := name.removesuffix("_mask")) in weights:
            # DINOv3 masks the keys' part, which is left at whatever it is: zero, or not even a number.
            mask = weights.pop(name)
            weights[bias] = torch.where(mask != 0, weights[bias], 0.0)
            facts["key_bias"] = False
    return weights, facts


def _mlps(weights: Weights) -> tuple[Weights, dict[str, Any]]:
    facts: dict[str, Any] = {}
    for base in {name.partition(".mlp.")[0] + ".mlp." for name in weights if ".mlp." in name}:
        for kind in ("weight", "bias"):
            place = {word: f"{base}{word}.{kind}" for word in ("fc1", "fc2")}
            for gate, value, back in (tuple(f"{base}{word}.{kind}" for word in words) for words in GATED):
                if {gate, value, back} <= weights.keys():
                    weights[place["fc1"]] = torch.cat([weights.pop(gate), weights.pop(value)])
                    weights[place["fc2"]] = weights.pop(back)
                    facts["swiglu"] = True
            for words in (*PACKED, PLAIN):
                into, back = (f"{base}{word}.{kind}" for word in words)
                if {into, back} <= weights.keys():
                    weights[place["fc1"]], weights[place["fc2"]] = weights.pop(into), weights.pop(back)
                    facts |= {} if words == PLAIN else {"swiglu": True}
    return weights, facts


def _periods(weights: Weights, file: str) -> tuple[Weights, dict[str, Any]]:
    """DINOv3's files hold the periods of its rotary positions, which its code then uses: those that it trained with are
    rounded to bfloat16. timm and transformers drop them and compute their own, from which ours differ by up to 0.4%."""
    if (periods := weights.pop("rope_embed.periods", None)) is None:
        return weights, {}
    exact = periods_of(BASE, 4 * periods.numel())
    if periods.ndim != 1 or not torch.allclose(periods, exact, rtol=1e-2, atol=0):
        raise DataError(f"{file}: its rope_embed.periods are not those of base {BASE:g}, as DINOv3's are")
    same = torch.allclose(periods, exact, rtol=1e-6, atol=0)
    return weights, {} if same else {"rope_periods": tuple(periods.tolist())}
