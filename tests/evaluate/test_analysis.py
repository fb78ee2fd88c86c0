"""What is said of a model's filters, positions and attention, against arithmetic, timm, NumPy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from einops import rearrange
from sklearn.decomposition import PCA
from timm_twin import TINY, timm_twin
from torch import nn

from sslvit.evaluate import analysis
from sslvit.evaluate.analysis import (
    attention_maps,
    filters,
    mean_attention_distance,
    pixel_distances,
    position_similarity,
    position_structure,
    roll_out,
    watch,
)
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig

KINDS = {
    "cls": {},
    "no cls": {"class_token": False},
    "registers": {"registers": 2},
    "registers without cls": {"registers": 2, "class_token": False},
    "wide image": {"image_size": (8, 24)},
    "oblong patches": {"image_size": (16, 24), "patch_size": (4, 8), "channels": 1},
    "layer scale": {"layer_scale": 0.1, "qkv_bias": False},
    "learned 2-D": {"position": "learned_2d"},
    "relative": {"position": "relative", "position_at": "every_layer"},
    "relative, shared, without cls": {
        "position": "relative",
        "position_at": "every_layer_shared",
        "class_token": False,
        "registers": 1,
    },
    "relative bias": {"position": "relative_bias", "position_at": "every_layer", "key_bias": False},
    "every layer": {"position_at": "every_layer", "class_position": False},
    "hybrid": {"hybrid": "R", "image_size": (64, 96), "patch_size": 32},
}
OF_TIMM = [name for name in KINDS if not any(word in name for word in ("2-D", "relative", "every", "hybrid"))]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def drawn(**changes) -> ViT:
    """A model whose weights are all random, those too that start at zero or one."""
    vit = ViT(ViTConfig(**(TINY | changes))).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit


def images_of(vit: ViT, count: int = 3) -> torch.Tensor:
    return torch.rand(count, vit.channels, *vit.image_size)


def watched(vit: ViT, images: torch.Tensor) -> list[torch.Tensor]:
    seen = []
    watch(vit, images, lambda layer, attention: seen.append((layer, attention)))
    assert [layer for layer, _ in seen] == list(range(vit.depth))
    return [attention for _, attention in seen]


def timms_attention(twin: nn.Module, vit: ViT, images: torch.Tensor) -> list[torch.Tensor]:
    """The input of timm's dropout of probabilities, which its plain code path has between softmax and values."""
    seen = []
    for block in twin.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    mean, std = (torch.tensor(getattr(vit.config, name)).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        twin.forward_features((images - mean) / std)
    return seen


@pytest.mark.parametrize("kind", OF_TIMM)
def test_attention_is_timms_with_timms_weights(kind):
    vit = ViT(ViTConfig(**(TINY | KINDS[kind]))).eval()
    twin, images = timm_twin(vit), images_of(vit)
    for ours, theirs in zip(watched(vit, images), timms_attention(twin, vit, images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_times_values_is_what_every_kind_of_block_computes(kind):
    vit = drawn(**KINDS[kind])
    values, outputs = [], []
    for block in vit.blocks:
        block.attn.qkv.register_forward_hook(lambda _, __, qkv: values.append(qkv.chunk(3, -1)[2]))
        block.attn.proj.register_forward_hook(lambda _, inputs, __: outputs.append(inputs[0]))
    images = images_of(vit)
    vit(images)
    inputs = list(zip(values, outputs, strict=True))
    for attention, (value, output) in zip(watched(vit, images), inputs, strict=True):
        heads = attention @ rearrange(value, "b n (k d) -> b k n d", k=vit.heads)
        torch.testing.assert_close(rearrange(heads, "b k n d -> b n (k d)"), output, rtol=1e-5, atol=1e-5)


def test_watching_is_in_evaluation_mode_and_leaves_a_model_as_it_was():
    vit = drawn(dropout=0.5, drop_path=0.5)
    images = images_of(vit)
    expected = watched(vit, images)
    vit.train()
    vit.blocks[1].eval()
    modes = [module.training for module in vit.modules()]
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, watched(vit, images), expected))

    def fail(layer, attention):
        raise RuntimeError("looked")

    with pytest.raises(RuntimeError, match="looked"):
        watch(vit, images, fail)
    assert [module.training for module in vit.modules()] == modes
    assert not any(block.attn._forward_pre_hooks for block in vit.blocks)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vit.parameters())


def all_alike(**changes) -> ViT:
    """Every query attends to every token with the same probability."""
    vit = ViT(ViTConfig(**({"width": 8, "depth": 2, "heads": 2} | changes)))
    for block in vit.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
    return vit


# From section 2 of the protocols, to two digits: the mean distance between two patches of a square image of 224 pixels.
@pytest.mark.parametrize(("patch", "pixels"), [(16, 116.49), (32, 115.50), (14, 116.57)])
@pytest.mark.parametrize("changes", [{}, {"class_token": False}, {"registers": 3}])
def test_even_attention_has_the_mean_distance_of_two_patches(patch, pixels, changes):
    vit = all_alike(image_size=224, patch_size=patch, **changes)
    actual = mean_attention_distance(vit, [torch.rand(1, 3, 224, 224)])
    patches = (224 // patch) ** 2
    share = patches / (patches + vit.prefix)
    assert actual.renormalised.shape == (2, 2)
    assert actual.renormalised.numpy() == pytest.approx(pixels, abs=0.005)
    assert actual.plain.numpy() == pytest.approx(float(actual.renormalised[0, 0]) * share, rel=1e-6)
    assert actual.on_patches.numpy() == pytest.approx(share, rel=1e-6)
    assert actual.images == 1


def shifted(offset: int, **changes) -> ViT:
    """Every patch attends to the one so many places after it in raster order, and if there is none to all tokens."""
    vit = ViT(ViTConfig(
        image_size=(12, 32), patch_size=(4, 8), width=8, depth=1, heads=2, position="relative",
        position_at="every_layer", **changes,
    ))  # fmt: skip
    nn.init.zeros_(vit.blocks[0].attn.qkv.weight)
    vit.blocks[0].attn.qkv.bias.data = torch.tensor([1.0] * 8 + [0.0] * 16)  # all queries are ones, all keys are zero
    nn.init.zeros_(vit.relative_embed)
    vit.relative_embed.data[0, 11 + offset] = 1000.0  # offsets run from -11 to 11
    return vit


@pytest.mark.parametrize("changes", [{}, {"class_token": False}, {"registers": 2}])
def test_a_head_that_looks_at_itself_has_distance_nought(changes):
    actual = mean_attention_distance(shifted(0, **changes), [torch.rand(2, 3, 12, 32)])
    assert not actual.renormalised.any()
    assert not actual.plain.any()
    assert (actual.on_patches == 1).all()


@pytest.mark.parametrize("changes", [{}, {"class_token": False}, {"registers": 2}])
def test_a_head_that_looks_to_the_right_has_the_width_of_a_patch(changes):
    """Three rows of four patches of 4 x 8 pixels. Nine of twelve have a right neighbour. Two at the right border
    look at the first patch of the next row, 4 pixels below and 24 to the left; the last looks everywhere."""
    vit = shifted(1, **changes)
    actual = mean_attention_distance(vit, [torch.rand(2, 3, 12, 32)])
    everywhere = sum(math.hypot(4 * y, 8 * x) for y in range(3) for x in range(4))
    certain = 9 * 8 + 2 * math.hypot(4, 24)
    assert actual.renormalised.numpy() == pytest.approx((certain + everywhere / 12) / 12, rel=1e-6)
    assert actual.plain.numpy() == pytest.approx((certain + everywhere / (12 + vit.prefix)) / 12, rel=1e-6)


def test_distances_are_a_plain_loops_over_timms_attention():
    vit = ViT(ViTConfig(**(TINY | {"image_size": (8, 24), "patch_size": (4, 8), "registers": 1}))).eval()
    twin, images = timm_twin(vit), torch.rand(5, 3, 8, 24)
    expected = np.zeros((2, 3, 3))  # by layer and head
    places = [(row * 4, column * 8) for row in range(2) for column in range(3)]
    for layer, attention in enumerate(timms_attention(twin, vit, images)):
        for (b, k), i in ((bk, i) for bk in np.ndindex(5, 3) for i in range(6)):
            row = attention[b, k, 2 + i, 2:].double().numpy()
            reach = [math.dist(places[i], places[j]) for j in range(6)]
            expected[:, layer, k] += row @ reach / row.sum() / 30, row @ reach / 30
    batches = images.split([2, 3])
    actual = mean_attention_distance(vit, batches)
    np.testing.assert_allclose(actual.renormalised, expected[0], rtol=1e-5)
    np.testing.assert_allclose(actual.plain, expected[1], rtol=1e-5)
    assert actual.images == 5


def test_distance_is_in_pixels_of_the_images_given():
    vit = all_alike(image_size=16, patch_size=4)
    actual = mean_attention_distance(vit, [torch.rand(1, 3, 4, 12)])  # three patches in a row: 0 4 8, 4 0 4, 8 4 0
    assert actual.renormalised.numpy() == pytest.approx(32 / 9, rel=1e-6)
    assert pixel_distances((2, 2), (3, 4)).tolist() == [[0, 4, 3, 5], [4, 0, 5, 3], [3, 5, 0, 4], [5, 3, 4, 0]]


def test_how_many_images_pass_at_once_changes_nothing(monkeypatch):
    vit = drawn(registers=1)
    images = images_of(vit, 7)
    distances, maps = mean_attention_distance(vit, [images]), attention_maps(vit, images)
    sizes = []
    vit.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(analysis, "AT_ONCE", 3 * 4 * 3 * 18**2)  # three images of three heads and 18 tokens
    torch.testing.assert_close(mean_attention_distance(vit, [images])[:3], distances[:3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention_maps(vit, images), maps, rtol=1e-5, atol=1e-6)
    assert sizes == [3, 3, 1] * 2


def test_attention_that_cannot_be_measured_is_refused():
    vit = drawn()
    with pytest.raises(ValueError, match="no images"):
        mean_attention_distance(vit, [])
    vit.blocks[1].attn.qkv.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite in layers \[2, 3\] of 3"):
        mean_attention_distance(vit, [images_of(vit)])


def test_a_later_layer_of_rollout_stands_on_the_left():
    """Layer 1 looks at token 0 only, layer 2 at token 1 only; by hand, with half of each token from itself."""
    one = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    two = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    below = roll_out(torch.eye(2), one)
    assert below.tolist() == [[[1.0, 0.0], [0.5, 0.5]]]
    # Token 0 is half itself, half token 1, which is half token 0: three quarters. The other order would give a half.
    assert roll_out(below, two).tolist() == [[[0.75, 0.25], [0.5, 0.5]]]


def test_rows_of_rollout_are_normalised_and_heads_averaged():
    unnormalised = torch.tensor([[[[6.0, 0.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]]])  # mean 3 0, 1 1
    torch.testing.assert_close(roll_out(torch.eye(2), unnormalised), torch.tensor([[[1.0, 0.0], [1 / 3, 2 / 3]]]))


@pytest.mark.parametrize("kind", OF_TIMM)
def test_maps_are_a_plain_loops_over_timms_attention(kind):
    vit = ViT(ViTConfig(**(TINY | KINDS[kind]))).eval()
    twin, images = timm_twin(vit), images_of(vit)
    layers = [attention.double().numpy() for attention in timms_attention(twin, vit, images)]
    maps, (h, w) = attention_maps(vit, images), vit.grid
    assert maps.rollout.shape == (3, h, w)
    assert maps.last.shape == (3, vit.heads, h, w)
    for b in range(3):
        product = np.eye(vit.prefix + h * w)
        for attention in layers:
            product = (attention[b].mean(0) / 2 + np.eye(len(product)) / 2) @ product
        cls = vit.config.class_token
        seen = [x[0] if cls else x[vit.prefix :].mean(0) for x in (product, *layers[-1][b])]
        seen = [row[vit.prefix :].reshape(h, w) for row in seen]
        np.testing.assert_allclose(maps.rollout[b], seen[0], atol=1e-6)
        np.testing.assert_allclose(maps.last[b], seen[1:], atol=1e-6)


def test_the_last_map_and_rollout_of_even_attention_by_hand():
    vit = all_alike(image_size=(8, 12), patch_size=4)  # six patches and the class token, two layers
    maps = attention_maps(vit, torch.rand(1, 3, 8, 12))
    torch.testing.assert_close(maps.last, torch.full((1, 2, 2, 3), 1 / 7))
    # A layer is (I + J) / 2 with J = J J the even matrix, so two are I / 4 + 3 J / 4.
    torch.testing.assert_close(maps.rollout, torch.full((1, 2, 3), 3 / 28))


def test_filters_are_scikit_learns_principal_components_up_to_sign():
    vit = drawn(image_size=(8, 12), patch_size=(4, 6), width=48)
    weight = vit.patch_embed.proj.weight.detach().double().numpy()  # d c p q
    pca = PCA(28, svd_solver="full").fit(weight.reshape(48, -1))
    actual = filters(vit)
    assert actual.components.shape == (28, 4, 6, 3)
    np.testing.assert_allclose(actual.variance, pca.explained_variance_ratio_, rtol=1e-9)
    for ours, theirs in zip(actual.components.numpy(), pca.components_.reshape(28, 3, 4, 6), strict=True):
        theirs = theirs * np.sign(theirs.flat[abs(theirs).argmax()])
        theirs = (theirs - theirs.min()) / (theirs.max() - theirs.min())
        np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), atol=1e-6)


def test_a_single_pattern_is_found_whole_and_lies_as_it_lay():
    vit = ViT(ViTConfig(image_size=8, patch_size=(2, 4), width=8, depth=1, heads=1))
    pattern = torch.arange(24.0).reshape(2, 4, 3) - 5  # rows, columns, channels; its largest weight is positive
    scales = torch.tensor([1.0, -2.0, 3.0, 0.5, -1.0, 2.0, 0.0, 7.0])
    vit.patch_embed.proj.weight.data = torch.einsum("d,pqc->dcpq", scales, pattern) + 0.5
    actual = filters(vit, count=3)
    torch.testing.assert_close(actual.components[0], torch.arange(24.0).reshape(2, 4, 3) / 23)
    assert actual.variance[0] == pytest.approx(1)
    assert actual.components.shape == (3, 2, 4, 3)


def test_there_are_no_more_components_than_the_filters_span():
    assert len(filters(ViT(ViTConfig(**TINY))).components) == 23  # 24 filters, less their mean
    assert len(filters(ViT(ViTConfig(**(TINY | {"channels": 1})))).components) == 16  # of 16 weights
    single = filters(ViT(ViTConfig(**(TINY | {"channels": 1, "patch_size": 1}))))
    assert single.components.flatten().tolist() == [0.5]  # one weight has no range


def test_a_model_without_filters_of_pixels_is_refused():
    with pytest.raises(ValueError, match="hybrid 'R' embeds features"):
        filters(drawn(**KINDS["hybrid"]))
    vit = ViT(ViTConfig(**TINY))
    vit.patch_embed.proj.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        filters(vit)


@pytest.mark.parametrize("changes", [{}, {"class_token": False}, {"registers": 2}, {"class_position": False}])
def test_position_similarity_is_the_cosine_of_the_patches_own_rows(changes):
    vit = drawn(image_size=(8, 12), **changes)
    table = vit.pos_embed[0, -6:].detach().double().numpy()
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    actual = position_similarity(vit)
    np.testing.assert_allclose(actual, (unit @ unit.T).reshape(2, 3, 2, 3), atol=1e-12)
    assert [actual[y, x, y, x].item() for y in range(2) for x in range(3)] == pytest.approx([1] * 6)


def test_fixed_positions_have_the_similarity_of_their_formula():
    """sin a sin b + cos a cos b = cos(a - b), half for columns and half for rows."""
    vit = ViT(ViTConfig(image_size=(12, 20), patch_size=4, width=24, depth=1, heads=1, position="sincos_mae"))
    actual, waves = position_similarity(vit), [10000 ** (-i / 6) for i in range(6)]
    for i, j, y, x in np.ndindex(3, 5, 3, 5):
        expected = sum(math.cos(wave * (y - i)) + math.cos(wave * (x - j)) for wave in waves) / 12
        assert actual[i, j, y, x].item() == pytest.approx(expected, abs=1e-6)


def test_learned_2d_positions_share_their_row_or_their_column():
    vit = ViT(ViTConfig(image_size=(8, 12), patch_size=4, width=8, depth=1, heads=1, position="learned_2d"))
    vit.pos_embed_x.data[0], vit.pos_embed_y.data[0] = torch.eye(4)[:3], 2 * torch.eye(4)[:2]  # all at right angles
    actual = position_similarity(vit)
    for i, j, y, x in np.ndindex(2, 3, 2, 3):  # rows have lengths 1 and 2, together the root of 5
        assert actual[i, j, y, x].item() == pytest.approx(((j == x) + 4 * (i == y)) / 5, abs=1e-6)


def test_each_layer_may_have_positions_of_its_own():
    vit = drawn(position_at="every_layer")
    table = vit.pos_embed[2, 1:].detach().double()
    expected = nn.functional.cosine_similarity(table[:, None], table[None], dim=-1)
    torch.testing.assert_close(position_similarity(vit, 2), expected.reshape(4, 4, 4, 4))
    with pytest.raises(ValueError, match="layer 3: positions have tables for 3 layers"):
        position_similarity(vit, 3)
    with pytest.raises(ValueError, match="layer 1: positions have tables for 1 layers"):
        position_similarity(drawn(), 1)


@pytest.mark.parametrize("kind", ["relative", "relative_bias", "none"])
def test_positions_without_a_table_are_refused(kind):
    changes = {"position": kind} | ({} if kind == "none" else {"position_at": "every_layer"})
    with pytest.raises(ValueError, match=f"position '{kind}' has no table"):
        position_similarity(ViT(ViTConfig(**(TINY | changes))))


def test_the_structure_of_positions_by_hand():
    """Two rows of three patches. Of ordered pairs 14 are neighbours, 4 are two apart in a row, 12 share nothing; and 6
    are of a patch with itself, which are not counted."""
    similarity = torch.full((2, 3, 2, 3), torch.nan)
    for i, j, y, x in np.ndindex(2, 3, 2, 3):
        if (i, j) != (y, x):
            similarity[i, j, y, x] = {1: 0.75, 2: 0.5 if i == y else 0.125, 3: 0.25}[abs(i - y) + abs(j - x)]
    actual = position_structure(similarity)
    assert actual == {
        "neighbours": 0.75,
        "same row or column": 0.5,
        "elsewhere": pytest.approx((8 * 0.125 + 4 * 0.25) / 12),
    }
    assert position_structure(torch.ones(1, 2, 1, 2)) == {"neighbours": 1}
