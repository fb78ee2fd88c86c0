"""What is random in a block: drawn from keys, in the right proportions, and scaled to keep the expectation."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from sslvit import rng
from sslvit.models.blocks import drop_path, dropout
from sslvit.models.readout import read
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig

TINY = {"image_size": 8, "patch_size": 4, "width": 8, "depth": 3, "heads": 2}


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return rng.key(seed, "step", torch.arange(count))


def test_drop_path_grows_linearly_and_keeps_the_expectation():
    factors = torch.stack([*drop_path(0.3, 4, keys(200_000))])
    assert factors.shape == (4, 200_000, 2)
    for layer, rate in zip(factors, (0.0, 0.1, 0.2, 0.3), strict=True):
        assert layer.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)] if rate else [1.0])
        # Both branches, five standard deviations of a mean of 200,000 draws.
        spread = 5 * (rate * (1 - rate) / 200_000) ** 0.5
        assert (layer == 0).float().mean(0).tolist() == pytest.approx([rate, rate], abs=spread + 1e-9)
    branches = factors[3] == 0
    assert (branches[:, 0] & branches[:, 1]).float().mean().item() == pytest.approx(0.09, abs=0.005)


def test_a_dropped_sample_skips_its_branches_and_a_kept_one_is_scaled():
    vit = ViT(ViTConfig(**TINY | {"depth": 2}, drop_path=0.5))
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    images, key = torch.rand(1, 3, 8, 8).expand(64, -1, -1, -1), keys(64)
    trained = vit(images, key).patches
    vit.eval()
    first, block = vit.intermediate(images[:1], [0], norm=False)[0], vit.blocks[1]
    x = torch.cat([first.cls.unsqueeze(1), first.patches], 1)
    outcomes = {}
    for attention in (0, 2):
        middle = x + attention * block.attn(block.norm1(x), None, None)
        for mlp in (0, 2):
            outcomes[attention, mlp] = vit.norm(middle + mlp * block.mlp(block.norm2(middle), (None, None)))[0, 1:]
    for sample, factors in zip(trained, drop_path(0.5, 2, rng.fold(key, "drop_path"))[1], strict=True):
        torch.testing.assert_close(sample, outcomes[tuple(factors.int().tolist())], rtol=0, atol=1e-5)
    assert len({tuple(f.tolist()) for f in drop_path(0.5, 2, rng.fold(key, "drop_path"))[1]}) == 4


def test_dropout_zeroes_its_share_and_scales_the_rest():
    x = dropout(torch.ones(100, 50, 40), 0.1, keys(100))
    assert (x == 0).float().mean().item() == pytest.approx(0.1, abs=5 * (0.09 / 200_000) ** 0.5)
    assert x[x != 0].unique().tolist() == pytest.approx([1 / 0.9])
    assert dropout(x, 0.1, None) is x


def test_in_float64_drop_path_and_dropout_scale_by_all_digits_of_float64():
    """1 / 0.7 in float32 is off by 2e-8, which is nothing there and 1e8 roundings here."""
    factors = torch.stack([*drop_path(0.3, 4, keys(100), torch.float64)])
    assert factors.dtype == torch.float64
    for layer, rate in zip(factors, (0.0, 0.1, 0.2, 0.3), strict=True):
        assert layer.max().item() == pytest.approx(1 / (1 - rate), rel=1e-15)
    x = dropout(torch.ones(100, 50, 40).double(), 0.3, keys(100))
    assert x.dtype == torch.float64
    assert x.max().item() == pytest.approx(1 / 0.7, rel=1e-15)


def test_a_float64_model_with_drop_path_and_dropout_is_its_equations_to_float64():
    """The branches of the only block, whose outputs are made known, after the factors that the same draws give."""
    vit = ViT(ViTConfig(**TINY | {"depth": 1, "position": "none"}, dropout=0.3)).double()
    vit.drop_path = 0.3  # of one block the rate is 0, whatever is asked for
    vit.norm = nn.Identity()
    block = vit.blocks[0]
    for branch in (block.attn, block.mlp):
        branch.register_forward_hook(lambda _, given, out: torch.ones_like(out))
    key = keys(5)
    kept = rng.uniform(rng.fold(key, "dropout"), 5, 8) >= 0.3
    tokens = vit.embed(torch.rand(5, 3, 8, 8).double())
    start = torch.cat([vit.cls_token.expand(5, -1, -1), tokens], 1)
    expected = torch.where(kept, start / (1 - 0.3), 0.0) + 2
    torch.testing.assert_close(vit.encode(tokens, key=key).patches, expected[:, 1:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("changes", [{"drop_path": 0.4}, {"dropout": 0.2}, {"drop_path": 0.3, "dropout": 0.1}])
def test_what_is_drawn_depends_on_the_sample_s_key_alone(changes):
    vit = ViT(ViTConfig(**TINY, **changes))
    images, key = torch.rand(6, 3, 8, 8), keys(6)
    whole = vit(images, key).patches
    generator = torch.get_rng_state()
    assert torch.equal(vit(images, key).patches, whole)
    assert torch.equal(torch.get_rng_state(), generator)
    parts = torch.cat([vit(images[:2], key[:2]).patches, vit(images[2:], key[2:]).patches])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    backwards = vit(images.flip(0), key.flip(0)).patches.flip(0)
    torch.testing.assert_close(backwards, whole, rtol=0, atol=1e-5)
    assert not torch.allclose(vit(images, keys(6, seed=1)).patches, whole)
    vit.eval()
    assert torch.equal(vit(images).patches, vit(images, key).patches)


def test_layers_and_places_draw_independently():
    """Each branch is made to give ones, so that what it adds to its input is its dropout mask."""
    vit = ViT(ViTConfig(**TINY, dropout=0.5))
    states = []
    for block in vit.blocks:
        block.attn.proj.register_forward_hook(lambda _, __, out: torch.ones_like(out))
        block.mlp.fc2.register_forward_hook(lambda _, __, out: torch.ones_like(out))
        block.norm2.register_forward_hook(lambda _, given, __: states.append(given[0].detach().clone()))
        block.norm1.register_forward_hook(lambda _, given, __: states.append(given[0].detach().clone()))
    vit(torch.rand(50, 3, 8, 8), keys(50))
    kept = [((after - before) != 0).float().flatten() for before, after in pairwise(states)]
    assert len(kept) == 5
    correlation = torch.corrcoef(torch.stack(kept))
    assert (correlation - torch.eye(5)).abs().max() < 5 / len(kept[0]) ** 0.5


@pytest.mark.parametrize("changes", [{"drop_path": 0.1}, {"dropout": 0.1}])
def test_training_without_a_key_is_an_error(changes):
    vit, images = ViT(ViTConfig(**TINY, **changes)), torch.rand(2, 3, 8, 8)
    for key in (None, keys(3), rng.key(0)):
        with pytest.raises(ValueError, match=r"key of shape \(2,\)"):
            vit(images, key)
    vit.eval()
    assert read(vit(images), "cls").shape == (2, 8)
