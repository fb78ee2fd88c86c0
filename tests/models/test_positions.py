"""Positions against float64 transcriptions of the formulas, scipy's and timm's interpolation, and plain loops."""

import math
from typing import get_args

import numpy as np
import pytest
import scipy.ndimage
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from sslvit.models.positions import FIXED, PositionResize, resize, sincos
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig

TINY = {"image_size": (16, 24), "patch_size": 4, "width": 24, "depth": 3, "heads": 3}
N = 24  # patches of TINY, in a grid of 4 x 6


def randomise(vit: ViT) -> ViT:
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit.eval()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("grid", [(14, 14), (3, 5), (1, 4)])
@pytest.mark.parametrize("width", [8, 48, 384])
def test_fixed_tables_are_the_published_formulas(kind, grid, width):
    table = sincos(kind, grid, width)[0]
    assert table.shape == (grid[0] * grid[1], width)
    count = width // 4
    for row in range(grid[0]):
        for column in range(grid[1]):
            # MoCo v3's first half is the row; MAE's and big_vision's the column.
            first, second = (row, column) if kind == "sincos_moco_v3" else (column, row)
            last = count - 1 if kind == "sincos_big_vision" else count
            expected = [
                function(place / 10000 ** (i / last))
                for place in (first, second)
                for function in (math.sin, math.cos)
                for i in range(count)
            ]
            np.testing.assert_allclose(table[row * grid[1] + column], expected, rtol=0, atol=1e-6)


def mae_table(width: int, size: int) -> np.ndarray:
    """MAE's own procedure, step by step, in float64."""

    def one_axis(dimension, positions):
        omega = 1.0 / 10000 ** (np.arange(dimension // 2, dtype=np.float64) / (dimension / 2.0))
        angles = np.einsum("m,d->md", positions.reshape(-1), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    grid = np.stack(np.meshgrid(np.arange(size, dtype=np.float64), np.arange(size, dtype=np.float64)), axis=0)
    return np.concatenate([one_axis(width // 2, grid[0]), one_axis(width // 2, grid[1])], axis=1)


def moco_table(width: int, size: int) -> np.ndarray:
    """MoCo v3's own procedure, in float64. Its meshgrid has ij indexing."""
    axis = np.arange(size, dtype=np.float64)
    grid_w, grid_h = np.meshgrid(axis, axis, indexing="ij")
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width // 4))
    w, h = np.outer(grid_w.flatten(), omega), np.outer(grid_h.flatten(), omega)
    return np.concatenate([np.sin(w), np.cos(w), np.sin(h), np.cos(h)], axis=1)


def big_vision_table(width: int, size: int) -> np.ndarray:
    """big_vision's own procedure, in float64."""
    y, x = np.mgrid[:size, :size]
    omega = 1.0 / 10000 ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = np.einsum("m,d->md", y.flatten(), omega), np.einsum("m,d->md", x.flatten(), omega)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)


def test_the_three_fixed_tables_follow_the_three_procedures_and_all_differ():
    tables = [procedure(96, 7) for procedure in (moco_table, mae_table, big_vision_table)]
    for kind, expected in zip(FIXED, tables, strict=True):
        np.testing.assert_allclose(sincos(kind, (7, 7), 96)[0], expected, rtol=0, atol=1e-6)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(tables[i] - tables[j]).max() > 0.05


@pytest.mark.parametrize("kind", FIXED)
def test_fixed_tables_are_saved_not_trained_and_zero_for_the_class_token(kind):
    vit = ViT(ViTConfig(**TINY, position=kind, registers=2))
    assert "pos_embed" in vit.state_dict()
    assert "pos_embed" not in dict(vit.named_parameters())
    assert torch.equal(vit.pos_embed[:, :3], torch.zeros(1, 3, 24))
    assert torch.equal(vit.pos_embed[:, 3:], sincos(kind, (4, 6), 24))
    trainable = ViT(ViTConfig(**TINY, registers=2))  # as MAE's fine-tuning has it
    trainable.load_state_dict(vit.state_dict())
    randomise(trainable).pos_embed.data = vit.pos_embed
    vit.load_state_dict(trainable.state_dict())
    images = torch.rand(2, 3, 16, 24)
    assert torch.equal(trainable(images).cls, vit.eval()(images).cls)


@pytest.mark.parametrize("new", [(7, 9), (14, 14), (28, 20), (3, 5), (1, 6)])
@pytest.mark.parametrize("old", [(7, 7), (4, 6)])
def test_bilinear_corners_is_scipys_zoom(old, new):
    table = torch.randn(2, old[0] * old[1], 5)
    for layer, result in zip(table, resize(table, old, new, "bilinear_corners"), strict=True):
        image = layer.reshape(*old, 5).double().numpy()
        expected = scipy.ndimage.zoom(image, (new[0] / old[0], new[1] / old[1], 1), order=1)
        np.testing.assert_allclose(result.reshape(*new, 5), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("new", [(7, 9), (14, 14), (28, 20), (3, 5), (1, 6)])
@pytest.mark.parametrize("old", [(7, 7), (4, 6)])
def test_bicubic_is_timms_default(old, new):
    table = torch.randn(1, old[0] * old[1], 5)
    expected = resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=0)
    torch.testing.assert_close(resize(table, old, new, "bicubic"), expected, rtol=0, atol=1e-6)


HOWS = [how for how in get_args(PositionResize) if how != "geometric"]  # which is for offsets: test_offset_bias.py


@pytest.mark.parametrize("how", HOWS)
def test_the_same_grid_changes_nothing_and_a_constant_stays_one(how):
    table = torch.randn(1, 12, 5)
    assert resize(table, (3, 4), (3, 4), how) is table
    constant = torch.ones(1, 12, 5)
    torch.testing.assert_close(resize(constant, (3, 4), (8, 5), how), torch.ones(1, 40, 5), rtol=0, atol=2e-6)


KINDS = [
    *((kind, "stem") for kind in ("learned_1d", "learned_2d", *FIXED, "none")),
    *((kind, at) for kind in ("learned_1d", "learned_2d", "relative") for at in ("every_layer", "every_layer_shared")),
    *((kind, "every_layer_shared") for kind in FIXED),
]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("kind", "at"), [pair for pair in KINDS if pair[0] != "relative"])
def test_resizing_for_good_is_resizing_on_the_way(kind, at, how):
    vit = randomise(ViT(ViTConfig(**TINY, position=kind, position_at=at, position_resize=how, registers=1)))
    images = torch.rand(2, 3, 28, 20)
    resized = vit.resized((28, 20))
    assert resized.grid == (7, 5)
    assert not resized.training
    torch.testing.assert_close(resized(images).patches, vit(images).patches, rtol=0, atol=1e-5)
    torch.testing.assert_close(resized(images).cls, vit(images).cls, rtol=0, atol=1e-5)
    small = torch.rand(2, 3, 16, 24)
    assert torch.equal(vit.resized((16, 24))(small).patches, vit(small).patches)


def table_of(vit: ViT, layer: int) -> torch.Tensor:
    """The rows for class token, registers and patches of one layer, put together entry by entry."""
    layer = layer if vit.position_at == "every_layer" else 0
    if vit.position != "learned_2d":
        table = vit.pos_embed[layer]
        missing = vit.prefix + N - len(table)
        return torch.cat([torch.zeros(missing, vit.width), table])
    rows = [
        [*vit.pos_embed_x[layer, c].tolist(), *vit.pos_embed_y[layer, r].tolist()] for r in range(4) for c in range(6)
    ]
    prefix = vit.pos_embed[layer] if vit.prefix_positions else torch.zeros(vit.prefix, vit.width)
    return torch.cat([prefix, torch.tensor(rows)])


@pytest.mark.parametrize("class_position", [True, False])
@pytest.mark.parametrize(("kind", "at"), [pair for pair in KINDS if pair[0] not in ("relative", "none")])
def test_positions_are_added_where_they_should_be(kind, at, class_position):
    vit = randomise(ViT(ViTConfig(**TINY, position=kind, position_at=at, class_position=class_position, registers=2)))
    images = torch.rand(2, 3, 16, 24)
    encoded = vit(images)
    with torch.no_grad():
        start = torch.cat([vit.cls_token, vit.reg_token], 1).expand(2, -1, -1)
        x = torch.cat([start, vit.embed(images)], 1)
        for i, block in enumerate(vit.blocks):
            if i == 0 or at != "stem":
                x = x + table_of(vit, i)
            x = block(x)
        x = vit.norm(x)
    torch.testing.assert_close(encoded.cls, x[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(encoded.patches, x[:, 3:], rtol=0, atol=1e-5)


def test_tables_have_a_row_for_each_place_and_a_layer_for_each_block():
    shapes = {
        ("learned_1d", "stem"): {"pos_embed": (1, 3 + N, 24)},
        ("learned_1d", "every_layer"): {"pos_embed": (3, 3 + N, 24)},
        ("learned_1d", "every_layer_shared"): {"pos_embed": (1, 3 + N, 24)},
        ("learned_2d", "stem"): {"pos_embed": (1, 3, 24), "pos_embed_x": (1, 6, 12), "pos_embed_y": (1, 4, 12)},
        ("learned_2d", "every_layer"): {"pos_embed": (3, 3, 24), "pos_embed_x": (3, 6, 12), "pos_embed_y": (3, 4, 12)},
        ("relative", "every_layer"): {"relative_embed": (3, 2 * N - 1, 24)},
        ("relative", "every_layer_shared"): {"relative_embed": (1, 2 * N - 1, 24)},
        ("none", "stem"): {},
    }
    for (kind, at), expected in shapes.items():
        state = ViT(ViTConfig(**TINY, position=kind, position_at=at, registers=2)).state_dict()
        assert {name: tuple(v.shape) for name, v in state.items() if "embed" in name and "." not in name} == expected


@pytest.mark.parametrize("at", ["every_layer", "every_layer_shared"])
@pytest.mark.parametrize("prefix", [{}, {"registers": 2}, {"class_token": False}])
def test_relative_attention_adds_the_logits_of_offset_embeddings(at, prefix):
    vit = randomise(ViT(ViTConfig(**TINY, position="relative", position_at=at, **prefix))).double()
    images = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    p, heads, d = vit.prefix, 3, 8
    before = vit.embed(images)
    tokens = [token.expand(2, -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    x = torch.cat([*tokens, before], 1)
    for layer, block in enumerate(vit.blocks):
        table = vit.relative_embed[layer if at == "every_layer" else 0]
        y = block.norm1(x)
        q, k, v = (block.attn.qkv(y)[..., i * 24 : (i + 1) * 24] for i in range(3))
        out = torch.zeros_like(q)
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            logits = q[..., part] @ k[..., part].mT
            for i in range(N):
                for j in range(N):
                    embedding = table[j - i + N - 1, part]
                    logits[:, p + i, p + j] += q[:, p + i, part] @ embedding
            out[..., part] = (logits / d**0.5).softmax(-1) @ v[..., part]
        x = x + block.attn.proj(out)
        x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
    x = vit.norm(x)
    torch.testing.assert_close(vit(images).patches, x[:, p:], rtol=0, atol=1e-10)


def test_relative_attention_with_a_table_of_zeros_knows_no_positions():
    vit = randomise(ViT(ViTConfig(**TINY, position="relative", position_at="every_layer")))
    with torch.no_grad():
        bare = ViT(ViTConfig(**{**TINY, "position": "none"}))
        bare.load_state_dict({k: v for k, v in vit.state_dict().items() if k != "relative_embed"})
        vit.relative_embed.zero_()
    images = torch.rand(2, 3, 16, 24)
    torch.testing.assert_close(vit(images).patches, bare.eval()(images).patches, rtol=0, atol=1e-5)


IMPOSSIBLE = [
    ({"position": "relative"}, "lives inside attention"),
    ({"position": "none", "position_at": "every_layer"}, "nothing to put"),
    ({"position": "sincos_mae", "position_at": "every_layer"}, "every_layer_shared"),
    ({"position": "sincos_moco_v3", "width": 26, "heads": 2}, "width 26"),
    ({"position": "sincos_big_vision", "width": 4, "heads": 1}, "width 4"),
    ({"position": "learned_2d", "width": 25, "heads": 5}, "width 25"),
    ({"position": "relative", "position_at": "every_layer", "image_size": 4}, r"\(1, 1\)"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_impossible_positions_are_refused_with_the_reason(changes, message):
    with pytest.raises(ValueError, match=message):
        ViT(ViTConfig(**(TINY | changes)))


def test_inputs_that_a_position_cannot_take_are_refused_with_the_reason():
    relative = ViT(ViTConfig(**TINY, position="relative", position_at="every_layer_shared"))
    with pytest.raises(ValueError, match=r"\(4, 6\).*\(6, 4\)"):
        relative(torch.rand(1, 3, 24, 16))
    with pytest.raises(ValueError, match="'relative'"):
        relative.resized(32)
    for kind, at in (("relative", "every_layer"), ("learned_1d", "every_layer"), ("sincos_mae", "every_layer_shared")):
        vit = ViT(ViTConfig(**TINY, position=kind, position_at=at))
        with pytest.raises(ValueError, match="10 tokens"):
            vit.encode(torch.rand(1, 10, 24))
    at_stem = ViT(ViTConfig(**TINY))
    assert at_stem.encode(torch.rand(1, 10, 24)).patches.shape == (1, 10, 24)
