"""Rotary positions, SwiGLU and the masked bias of keys: tokens and gradients of timm's and transformers' DINOv3 and
DINOv2, and closed forms."""

import math
from typing import Any

import pytest
import timm
import torch
from dino_twins import timm_dinov3, transformers_dinov3, under_our_names
from foreign_models import assert_computes, scramble, standardised
from timm.layers import SwiGLUPacked
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sslvit import rng
from sslvit.models.blocks import swiglu_width
from sslvit.models.partial import merged, train_only
from sslvit.models.rope import coordinates, moved, periods_of, turned, turns
from sslvit.models.vit import ViT
from sslvit.models.vit_config import RELEASES, ViTConfig

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
DINOV3 = {
    "image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "heads": 2, "registers": 4, "layer_scale": 1.0,
    "position": "rope", "position_at": "every_layer_shared", "key_bias": False, "epsilon": 1e-5,
}  # fmt: skip
GRIDS = ((16, 16), (24, 24), (8, 20))  # its own size, another, a rectangle


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


TIMM = {
    "vit_small_patch16_dinov3": {"qkv_bias": False},
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_small_plus_patch16_dinov3_qkvb": {"swiglu": True, "mlp_width": 128},
    "vit_7b_patch16_dinov3": {"swiglu": True, "mlp_width": 64, "qkv_bias": False},
}


def assert_same_gradients(ours: ViT, theirs: nn.Module, images: torch.Tensor, tokens: Any) -> None:
    """tokens: theirs, of images that are standardised. The gradients are of all tokens, weighted at random."""
    assert_computes(ours, images, tokens)
    encoded, weights = ours(images), torch.randn(tokens.shape)
    (torch.cat([encoded.cls.unsqueeze(1), encoded.registers, encoded.patches], 1) * weights).sum().backward()
    (tokens * weights).sum().backward()
    expected = under_our_names({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    mine = dict(ours.named_parameters())
    assert mine.keys() == expected.keys()
    for name, gradient in expected.items():
        limit = float(1e-5 * gradient.abs().max())
        torch.testing.assert_close(mine[name].grad, gradient, rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize("name", TIMM)
def test_tokens_and_gradients_are_those_of_timms_dinov3(name, size):
    theirs = timm_dinov3(name, **({"mlp_ratio": 2} if "7b" in name else {}))
    ours = ViT(ViTConfig(**DINOV3 | TIMM[name])).eval()
    ours.load_state_dict(under_our_names(dict(theirs.named_parameters())))
    images = torch.rand(2, 3, *size)
    assert_same_gradients(ours, theirs, images, theirs.forward_features(standardised(images, IMAGENET)))


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize("gated", [False, True])
def test_tokens_and_gradients_are_those_of_transformers_dinov3(gated, size):
    pytest.importorskip("transformers")
    theirs = transformers_dinov3(use_gated_mlp=gated)
    ours = ViT(ViTConfig(**DINOV3, swiglu=gated, mlp_width=48)).eval()
    ours.load_state_dict(under_our_names(dict(theirs.named_parameters())))
    images = torch.rand(2, 3, *size)
    tokens = theirs(standardised(images, IMAGENET)).last_hidden_state
    assert_same_gradients(ours, theirs, images, tokens)


def test_at_224_pixels_the_release_s_shape_computes_timms_tokens_in_its_own_precision():
    theirs = timm_dinov3(patch_size=16, img_size=224, embed_dim=128, depth=3)
    ours = ViT(ViTConfig(**DINOV3 | {"image_size": 224, "patch_size": 16, "width": 128, "depth": 3})).eval()
    ours.load_state_dict(under_our_names(dict(theirs.named_parameters())))
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert_computes(ours, images, theirs.forward_features(standardised(images, IMAGENET)))


@pytest.mark.parametrize("registers", [0, 4])
def test_swiglu_is_timms_in_dinov2s_giant(registers):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    more = {"reg_tokens": registers, "no_embed_class": registers > 0, "init_values": 1.0, "dynamic_img_size": True}
    name = "vit_giant_patch14_reg4_dinov2" if registers else "vit_giant_patch14_dinov2"
    theirs = scramble(timm.create_model(name, **sizes, **more))
    assert isinstance(theirs, VisionTransformer)
    assert isinstance(theirs.blocks[0].mlp, SwiGLUPacked.func)
    shape = {"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 3, "layer_scale": 1.0}
    ours = ViT(ViTConfig(**shape, swiglu=True, registers=registers, class_position=not registers)).eval()
    assert ours.config.mlp_width == theirs.blocks[0].mlp.fc2.in_features == swiglu_width(24) == 64
    ours.load_state_dict(theirs.state_dict())
    for size in GRIDS:
        images = torch.rand(2, 3, *size)
        with torch.no_grad():
            assert_computes(ours, images, theirs.forward_features(standardised(images, IMAGENET)))
    images, weights = torch.rand(2, 3, 16, 16), torch.randn(2, 16, 24)
    (ours(images).patches * weights).sum().backward()
    (theirs.forward_features(standardised(images, IMAGENET))[:, ours.prefix :] * weights).sum().backward()
    for name, parameter in theirs.named_parameters():
        limit = float(1e-5 * parameter.grad.abs().max())
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize(("width", "hidden"), [(1536, 4096), (384, 1024), (24, 64), (100, 272)])
def test_the_hidden_size_of_swiglu_is_dinov2s_rule(width, hidden):
    """1536 is published; the others are 8 width / 3, rounded down, then up to a multiple of 8."""
    assert swiglu_width(width) == hidden == math.ceil(math.floor(8 * width / 3) / 8) * 8


def test_the_gate_and_the_value_are_drawn_as_two_matrices():
    vit = ViT(ViTConfig(**DINOV3, swiglu=True, mlp_width=512, init="mae"))
    bound = math.sqrt(6 / (32 + 512))  # xavier's, of one of them
    assert 0.98 * bound < vit.blocks[0].mlp.fc1.weight.abs().max() <= bound


RELEASED = {
    "DINOv2-S/14": "vit_small_patch14_dinov2", "DINOv2-B/14": "vit_base_patch14_dinov2",
    "DINOv2-L/14": "vit_large_patch14_dinov2", "DINOv2-g/14": "vit_giant_patch14_dinov2",
    "DINOv2-S/14-reg": "vit_small_patch14_reg4_dinov2", "DINOv2-B/14-reg": "vit_base_patch14_reg4_dinov2",
    "DINOv2-L/14-reg": "vit_large_patch14_reg4_dinov2", "DINOv2-g/14-reg": "vit_giant_patch14_reg4_dinov2",
    "DINOv3-S/16": "vit_small_patch16_dinov3_qkvb", "DINOv3-S+/16": "vit_small_plus_patch16_dinov3_qkvb",
    "DINOv3-B/16": "vit_base_patch16_dinov3_qkvb", "DINOv3-L/16": "vit_large_patch16_dinov3_qkvb",
    "DINOv3-H+/16": "vit_huge_plus_patch16_dinov3_qkvb", "DINOv3-7B/16": "vit_7b_patch16_dinov3",
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASES)
def test_every_release_has_the_weights_of_timms_model(name):
    """On the meta device, so also 7B."""
    with torch.device("meta"):
        ours = ViT.variant(name, image_size=518 if "v2" in name else 256)
        theirs = timm.create_model(RELEASED[name], num_classes=0, global_pool="token")
    expected = under_our_names(dict(theirs.named_parameters()))
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in expected.items()}
    assert ours.heads == (theirs.blocks[0].attn.num_heads)
    assert ours.norm.eps == theirs.norm.eps
    assert ours.name in (name, name.removeprefix("DINOv2-"), f"{name.removeprefix('DINOv2-').removesuffix('-reg')}")


def test_7b_has_6_7_billion_parameters_and_no_other_width_its_mlp():
    with torch.device("meta"):
        vit = ViT.variant("DINOv3-7B/16", image_size=256)
    d, h = 4096, 8192
    block = 4 * d * d + d + 2 * (d * h + h) + h * d + d + 6 * d
    assert sum(p.numel() for p in vit.parameters()) == 40 * block + (3 * 256 + 1) * d + 5 * d + 2 * d == 6_716_030_976
    small = ViT.variant("DINOv3-S+/16", image_size=32, width=32, depth=1, heads=2)
    assert small.config.mlp_width == swiglu_width(32)
    assert small.name == "ViT of width 32, depth 1, heads 2, patches of 16"
    with pytest.raises(ValueError, match="has rotary positions: position 'sincos_mae'"):
        ViT.variant("DINOv3-S/16", image_size=32, position="sincos_mae")
    assert ViT.variant("DINOv2-S/14", image_size=28, position="none", depth=1).position == "none"


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 5)])
def test_turns_are_timms_and_the_closed_form(grid):
    rope = RotaryEmbeddingDinoV3(16, temperature=100.0)
    sin, cos = rope.get_embed(grid).chunk(2, -1)
    places = coordinates(grid, torch.float32, torch.device("cpu"))
    mine = turns(places, periods_of(100.0, 16))
    torch.testing.assert_close(torch.cat([mine, mine], -1), torch.stack([cos, sin]), rtol=0, atol=1e-6)
    w = grid[1]
    angle = 2 * math.pi * ((2 * (w - 1) + 1) / w - 1) / 100 ** (3 / 4)  # the last column's, at the lowest frequency
    assert mine[0, -1, -1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_logits_depend_on_offsets_alone_and_tokens_without_a_place_are_not_turned():
    places = coordinates((4, 4), torch.float64, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 18, 8)
    rope = turns(places, periods_of(100.0, 8).double())
    logits = (turned(q, rope, 2) @ turned(k, rope, 2).mT)[0, 0]
    assert torch.equal(turned(q, rope, 2)[:, :, :2], q[:, :, :2])
    patches = logits[2:, 2:].reshape(4, 4, 4, 4)
    torch.testing.assert_close(patches[0, 0, 1, 2], patches[2, 1, 3, 3], rtol=0, atol=1e-12)
    assert (patches[0, 0, 1, 2] - patches[0, 0, 2, 1]).abs() > 1e-3


MOVES = {"rope_shift": 0.3, "rope_jitter": 1.5, "rope_rescale": 2.0}


def test_training_moves_places_within_bounds_by_the_key_of_each_image_alone():
    places = coordinates((3, 5), torch.float32, torch.device("cpu"))
    keys = rng.key(0, torch.arange(4000))
    shifted = moved(places, keys, 0.3, 1.0, 1.0) - places
    assert shifted.std(1).max() < 1e-6  # the same for all patches of an image
    assert -0.3 <= shifted.min() < -0.295
    assert 0.295 < shifted.max() <= 0.3
    jittered = (moved(places, keys, 0.0, 1.5, 1.0) / places).nan_to_num(1.0)[:, 0]
    assert 1 / 1.5 - 1e-5 <= jittered.min() < jittered.max() <= 1.5 + 1e-5
    assert torch.corrcoef(jittered.log().T)[0, 1].abs() < 0.08
    assert jittered.log().mean().abs() < 0.02
    rescaled = (moved(places, keys, 0.0, 1.0, 2.0) / places)[:, 0]
    torch.testing.assert_close(rescaled[:, 0], rescaled[:, 1], rtol=1e-5, atol=0)
    assert 0.5 - 1e-5 <= rescaled.min() < 0.51 < 1.95 < rescaled.max() <= 2 + 1e-5
    parts = torch.cat([moved(places, part, 0.3, 1.5, 2.0) for part in keys.split(7)])
    assert torch.equal(parts, moved(places, keys, 0.3, 1.5, 2.0))


def test_a_model_in_training_follows_its_keys_and_without_one_sees_places_as_they_are():
    vit = scramble(ViT(ViTConfig(**DINOV3 | MOVES)))
    images, keys = torch.rand(3, 3, 16, 16), rng.key(1, torch.arange(3))
    still = vit(images).patches
    assert torch.equal(vit(images, keys).patches, still)
    vit.train()
    assert torch.equal(vit(images).patches, still)  # a teacher's pass
    whole = vit(images, keys).patches
    assert (whole - still).abs().max() > 1e-2
    one = torch.cat([vit(images[i : i + 1], keys[i : i + 1]).patches for i in range(3)])
    torch.testing.assert_close(one, whole, rtol=0, atol=1e-5)
    vit.set_grad_checkpointing()
    torch.testing.assert_close(vit(images, keys).patches, whole, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"key of shape \(3,\), not \(2,\)"):
        vit(images, keys[:2])


def test_periods_of_a_file_replace_those_of_the_base():
    given = tuple(periods_of(100.0, 16).bfloat16().float().tolist())
    vit, images = scramble(ViT(ViTConfig(**DINOV3))), torch.rand(2, 3, 16, 16)
    rounded, same = (
        ViT(ViTConfig(**DINOV3, rope_periods=p)).eval() for p in (given, tuple(periods_of(100.0, 16).tolist()))
    )
    for other in (rounded, same):
        other.load_state_dict(vit.state_dict())
    assert not torch.allclose(vit(images).patches, rounded(images).patches, atol=1e-4)
    torch.testing.assert_close(same(images).patches, vit(images).patches, rtol=0, atol=1e-6)


def test_the_masked_bias_of_keys_gets_no_gradient_and_changes_nothing():
    vit = scramble(ViT(ViTConfig(**DINOV3)))
    images = torch.rand(2, 3, 16, 16)
    before = vit(images).patches
    before.sum().backward()
    queries, keys, values = vit.blocks[0].attn.qkv.bias.grad.chunk(3)
    assert not keys.any()
    assert queries.any()
    assert values.any()
    with torch.no_grad():
        vit.blocks[0].attn.qkv.bias[32:64] = 9.0
    assert torch.equal(vit(images).patches, before)


def test_an_untied_norm_is_of_the_class_token_and_the_registers():
    vit = scramble(ViT(ViTConfig(**DINOV3, class_norm=True)))
    images = torch.rand(2, 3, 16, 16)
    raw = vit.intermediate(images, 1, norm=False)[0]
    encoded = vit(images)
    torch.testing.assert_close(encoded.cls, vit.cls_norm(raw.cls))
    torch.testing.assert_close(encoded.registers, vit.cls_norm(raw.registers))
    torch.testing.assert_close(encoded.patches, vit.norm(raw.patches))
    torch.testing.assert_close(vit.intermediate(images, 1)[0].registers, encoded.registers)
    assert vit.freeze(1).cls_norm.weight.requires_grad


def test_parts_of_it_can_be_trained_and_lora_begins_as_the_model():
    vit, images = scramble(ViT(ViTConfig(**DINOV3, class_norm=True, swiglu=True))), torch.rand(2, 3, 16, 16)
    before = vit(images).patches
    train_only(vit, "last:1")
    assert {n.split(".")[0] for n, p in vit.named_parameters() if p.requires_grad} == {"blocks", "norm", "cls_norm"}
    train_only(vit, "lora:2+mlp")
    assert torch.equal(vit(images).patches, before)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith(".up"):
                nn.init.normal_(parameter, std=0.1)
    after = vit(images).patches
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(merged(vit)(images).patches, after, rtol=0, atol=1e-5)


def test_registers_come_back_beside_the_pair():
    vit = scramble(ViT(ViTConfig(**DINOV3)))
    images = torch.rand(2, 3, 16, 16)
    cls, patches = encoded = vit(images)
    tokens = vit.forward_features(images)
    assert torch.equal(torch.cat([cls.unsqueeze(1), encoded.registers, patches], 1), tokens)
    assert ViT(ViTConfig(**DINOV3 | {"registers": 0}))(images).registers is None


def test_attention_weights_follow_the_turns_and_a_resized_copy_is_the_same_function():
    vit = scramble(ViT(ViTConfig(**DINOV3)))
    images = torch.rand(2, 3, 24, 8)
    seen = []
    vit.blocks[1].attn.proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    patches = vit(images).patches
    tokens = vit.intermediate(images, [0], norm=False)[0]
    x = vit.blocks[1].norm1(torch.cat([tokens.cls.unsqueeze(1), tokens.registers, tokens.patches], 1))
    values = vit.blocks[1].attn.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 16)).transpose(1, 2)
    weights = vit.attention(images, [1])[0]
    torch.testing.assert_close((weights @ values).transpose(1, 2).flatten(2), seen[0], rtol=0, atol=1e-5)
    assert torch.equal(vit.resized((24, 8))(images).patches, patches)


REFUSED = {
    "goes with 'every_layer_shared'": {"position_at": "stem"},
    "multiple of 4": {"width": 12, "heads": 2},
    "rope_base 0 ": {"rope_base": 0},
    "rope_rescale 0.5 at least 1": {"rope_rescale": 0.5},
    "the periods are 3": {"rope_periods": (1.0, 2.0, 3.0)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_impossible_rotary_positions_are_refused(message):
    with pytest.raises(ValueError, match=message):
        ViT(ViTConfig(**DINOV3 | REFUSED[message]))
    with pytest.raises(ValueError, match="needs all of the grid"):
        ViT(ViTConfig(**DINOV3)).encode(torch.rand(1, 5, 32))
