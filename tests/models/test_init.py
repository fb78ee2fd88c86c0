"""Initial weights against the closed forms of the papers' rules."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from sslvit.models.init import Init
from sslvit.models.readout import Classifier
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig

D, HIDDEN, P, C, DEPTH = 192, 768, 8, 3, 4
SIZES = {"image_size": 64, "patch_size": P, "channels": C, "width": D, "depth": DEPTH, "heads": 3, "registers": 8}


def all_of(vit: ViT, name: str) -> Tensor:
    return torch.cat([block.get_parameter(name).flatten() for block in vit.blocks])


def assert_normal(values: Tensor, std: float) -> None:
    """Mean 0, this deviation and the kurtosis of a normal, each within five standard errors."""
    count = values.numel()
    assert values.mean().abs().item() < 5 * std / count**0.5
    assert values.std().item() == pytest.approx(std, rel=5 / (2 * count) ** 0.5)
    assert (values / std).pow(4).mean().item() == pytest.approx(3, abs=5 * (96 / count) ** 0.5)


def assert_uniform(values: Tensor, bound: float) -> None:
    """Within the bound, close to it on both sides, with the deviation of a uniform, within five standard errors."""
    count = values.numel()
    assert values.abs().max().item() <= bound * (1 + 1e-6)
    assert values.max().item() > bound * (1 - 20 / count)
    assert values.min().item() < -bound * (1 - 20 / count)
    assert values.std().item() == pytest.approx(bound / 3**0.5, rel=5 * (0.2 / count) ** 0.5)


def xavier(fan_in: int, fan_out: int) -> float:
    return math.sqrt(6 / (fan_in + fan_out))


LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def test_timms_rule():
    vit = ViT(ViTConfig(**SIZES, init="timm"))
    for name in LINEARS:
        assert_normal(all_of(vit, f"{name}.weight"), 0.02)
        assert not all_of(vit, f"{name}.bias").any()
    assert_uniform(vit.patch_embed.proj.weight.flatten(), (C * P * P) ** -0.5)
    assert_uniform(vit.patch_embed.proj.bias, (C * P * P) ** -0.5)
    assert_normal(vit.cls_token.flatten(), 1e-6)
    assert_normal(vit.pos_embed.flatten(), 0.02)


def test_dinos_rule_is_timms_but_for_the_class_token():
    """vision_transformer.py: trunc_normal_ of .02, cut at +-2, for linear layers, positions and the class token; the
    convolution is left as torch makes it."""
    vit = ViT(ViTConfig(**SIZES, init="dino"))
    for name in LINEARS:
        assert_normal(all_of(vit, f"{name}.weight"), 0.02)
        assert not all_of(vit, f"{name}.bias").any()
    assert_uniform(vit.patch_embed.proj.weight.flatten(), (C * P * P) ** -0.5)
    assert_uniform(vit.patch_embed.proj.bias, (C * P * P) ** -0.5)
    assert_normal(vit.cls_token.flatten(), 0.02)
    assert_normal(vit.pos_embed.flatten(), 0.02)


def assert_cut(values: Tensor, scale: float = 1.0) -> None:
    """A normal of deviation .02 that is cut at it: of a unit normal .5396 is left by the integral, within five standard
    errors."""
    assert values.abs().max().item() <= 0.02 * scale * (1 + 1e-6)
    assert values.abs().max().item() > 0.0199 * scale
    assert values.mean().abs().item() < 5 * 0.02 * scale * 0.5396 / values.numel() ** 0.5
    assert values.std().item() == pytest.approx(0.02 * scale * 0.5396, rel=5 / (2 * values.numel()) ** 0.5)


def test_beits_rule_cuts_at_one_deviation_and_shrinks_what_ends_the_branches():
    """modeling_pretrain.py: trunc_normal_ with a = -std and b = std, also for the convolution; fix_init_weight."""
    vit = ViT(ViTConfig(**SIZES, init="beit"))
    for name in ("attn.qkv", "mlp.fc1"):
        assert_cut(all_of(vit, f"{name}.weight"))
    for number, block in enumerate(vit.blocks, 1):
        for linear in (block.attn.proj, block.mlp.fc2):
            assert_cut(linear.weight.flatten(), (2 * number) ** -0.5)
    assert not any(all_of(vit, f"{name}.bias").any() for name in LINEARS)
    assert_cut(vit.patch_embed.proj.weight.flatten())
    assert not vit.patch_embed.proj.bias.any()
    assert_cut(torch.cat([vit.cls_token.flatten(), vit.pos_embed.flatten()]))


def test_moco_v3s_rule_treats_q_k_and_v_as_three_matrices():
    vit = ViT(ViTConfig(**SIZES, init="moco_v3", position="sincos_moco_v3"))
    assert_uniform(all_of(vit, "attn.qkv.weight"), xavier(D, D))
    assert_uniform(all_of(vit, "attn.proj.weight"), xavier(D, D))
    assert_uniform(all_of(vit, "mlp.fc1.weight"), xavier(D, HIDDEN))
    assert_uniform(all_of(vit, "mlp.fc2.weight"), xavier(HIDDEN, D))
    assert_uniform(vit.patch_embed.proj.weight.flatten(), xavier(C * P * P, D))
    assert not vit.patch_embed.proj.bias.any()
    assert not any(all_of(vit, f"{name}.bias").any() for name in LINEARS)
    assert_normal(vit.cls_token.flatten(), 1e-6)


def test_maes_rule_treats_q_k_and_v_as_one_matrix():
    """models_mae.py draws the convolution's weight anew, as a matrix, and leaves its bias as torch made it."""
    vit = ViT(ViTConfig(**SIZES, init="mae", position="sincos_mae"))
    assert_uniform(all_of(vit, "attn.qkv.weight"), xavier(D, 3 * D))
    assert_uniform(all_of(vit, "attn.proj.weight"), xavier(D, D))
    assert_uniform(all_of(vit, "mlp.fc1.weight"), xavier(D, HIDDEN))
    assert_uniform(vit.patch_embed.proj.weight.flatten(), xavier(C * P * P, D))
    assert_uniform(vit.patch_embed.proj.bias, (C * P * P) ** -0.5)
    assert not any(all_of(vit, f"{name}.bias").any() for name in LINEARS)
    assert_normal(vit.cls_token.flatten(), 0.02)


def test_jaxs_rule():
    vit = ViT(ViTConfig(**SIZES, init="jax"))
    assert_uniform(all_of(vit, "attn.qkv.weight"), xavier(D, D))
    assert_uniform(all_of(vit, "attn.proj.weight"), xavier(D, D))
    assert_uniform(all_of(vit, "mlp.fc1.weight"), xavier(D, HIDDEN))
    assert_normal(all_of(vit, "mlp.fc1.bias"), 1e-6)
    assert_normal(all_of(vit, "mlp.fc2.bias"), 1e-6)
    assert not all_of(vit, "attn.qkv.bias").any()
    assert not all_of(vit, "attn.proj.bias").any()
    assert_lecun_normal(vit.patch_embed.proj.weight.flatten(), C * P * P)
    assert not vit.patch_embed.proj.bias.any()
    assert not vit.cls_token.any()
    assert_normal(vit.pos_embed.flatten(), 0.02)


def assert_lecun_normal(values: Tensor, fan_in: int) -> None:
    """Variance 1 / fan_in after the cut at two deviations of the uncut normal."""
    assert values.std().item() == pytest.approx(fan_in**-0.5, rel=5 / (2 * values.numel()) ** 0.5)
    cut = 2 * fan_in**-0.5 / 0.87962566103423978
    assert cut * 0.98 < values.abs().max().item() <= cut


def test_the_pretraining_heads_hidden_layer_is_lecun_normal():
    model = Classifier(ViT(ViTConfig(**SIZES)), readout="cls", classes=10, representation=D)
    assert_lecun_normal(model.pre_logits.weight.flatten(), D)
    assert not model.pre_logits.bias.any()


@pytest.mark.parametrize("init", ["timm", "dino", "moco_v3", "mae", "jax"])
def test_norms_scales_registers_and_learned_tables_start_as_said(init):
    vit = ViT(ViTConfig(**SIZES, init=init, layer_scale=1e-5))
    for module in vit.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-6
            assert torch.equal(module.weight, torch.ones(D))
            assert not module.bias.any()
    assert torch.equal(vit.blocks[1].ls2.gamma, torch.full((D,), 1e-5))
    assert_normal(vit.reg_token.flatten(), 1e-6)
    relative = ViT(ViTConfig(**SIZES, init=init, position="relative", position_at="every_layer"))
    assert_normal(relative.relative_embed.flatten(), 0.02)
    bias = ViT(ViTConfig(**SIZES | {"registers": 0}, init=init, position="relative_bias", position_at="every_layer"))
    assert not any(table.any() for table in bias.relative_bias)
    two = ViT(ViTConfig(**SIZES, init=init, position="learned_2d"))
    assert_normal(torch.cat([two.pos_embed.flatten(), two.pos_embed_x.flatten(), two.pos_embed_y.flatten()]), 0.02)


@pytest.mark.parametrize("init", get_args(Init))
def test_the_seed_decides_and_torchs_generator_is_left_alone(init):
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    one = Classifier(ViT(ViTConfig(**SIZES, init=init)), readout="cls", classes=3, representation=7)
    assert torch.equal(torch.rand(5), expected)
    same = Classifier(ViT(ViTConfig(**SIZES, init=init)), readout="cls", classes=3, representation=7)
    other = Classifier(ViT(ViTConfig(**SIZES, init=init, seed=1)), readout="cls", classes=3, representation=7, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.backbone.blocks[0].attn.qkv.weight, other.backbone.blocks[0].attn.qkv.weight)
    assert not torch.equal(one.pre_logits.weight, other.pre_logits.weight)
    assert not torch.equal(one.backbone.blocks[0].mlp.fc1.weight, one.backbone.blocks[1].mlp.fc1.weight)
