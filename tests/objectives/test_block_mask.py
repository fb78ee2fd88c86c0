"""Block masks against the papers' procedure, one try at a time with the same draws, and against lightly's in counts."""

import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from sslvit import rng
from sslvit.objectives import block_mask as blocks
from sslvit.objectives.block_mask import block_mask, wanted_by_batch, wanted_by_image
from sslvit.processes import collectives

RULES = {"BEiT": 16, "iBOT": 16, "DINOv2": 4}  # the least area of a block on a grid of 14 x 14


def wanted_by(rule: str, key: torch.Tensor, patches: int = 196) -> torch.Tensor:
    if rule == "BEiT":
        return torch.full((len(key),), 75.0)
    if rule == "iBOT":
        return wanted_by_image(key, patches, (0.1, 0.5))
    return wanted_by_batch(key, patches, (0.1, 0.5), 0.5)


def reference(key: torch.Tensor, wanted: float, grid: tuple[int, int], least: float) -> np.ndarray:
    """iBOT's loader.py, BEiT's masking_generator.py and DINOv2's masking.py as a text: of one image."""
    height, width = grid
    mask, block = np.zeros(grid, bool), 0
    while mask.sum() < wanted:
        left, hidden = wanted - mask.sum(), 0
        draws = rng.bits(rng.fold(key, block // blocks.BLOCKS), blocks.BLOCKS, blocks.TRIES)[block % blocks.BLOCKS]
        for draw in draws.tolist():
            u = [(draw >> 16 * i & 0xFFFF) / 65536 for i in range(4)]
            area = least + (left - least) * u[0]
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * u[1])
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < width and h < height:
                top, start = int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1))
                inside = mask[top : top + h, start : start + w]
                if 0 < h * w - inside.sum() <= left:
                    hidden = h * w - inside.sum()
                    inside[:] = True
                    break
        if not hidden:
            break
        block += 1
    return mask


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (6, 37), (1, 5)])
@pytest.mark.parametrize("rule", RULES)
def test_masks_are_those_of_the_procedure_image_by_image(rule, grid):
    key = rng.key(0, rule, torch.arange(600))  # of so many the first tries are tried first
    least = min(RULES[rule], max(1, (min(grid) // 3) ** 2))
    wanted = wanted_by(rule, key, math.prod(grid)).clamp(max=0.6 * math.prod(grid))
    hidden = block_mask(key, wanted, grid, least)
    for i in range(0, 600, 10):
        expected = reference(key[i], float(wanted[i]), grid, least).flatten()
        assert np.array_equal(hidden.mask[i].numpy(), expected), i
    counts = hidden.mask.sum(1)
    assert hidden.mask.any() == (grid != (1, 5))  # where no block is smaller than the grid, nothing is hidden
    patches = torch.arange(hidden.mask.numel()).view(600, -1, 1)
    assert torch.equal(hidden.of(patches).squeeze(1), patches[hidden.mask].squeeze(1))
    assert hidden.weights.tolist() == [1 / n for n in counts.tolist() for _ in range(n)]


@pytest.mark.parametrize("rule", RULES)
def test_how_much_is_hidden_is_distributed_as_lightlys(rule):
    utils = pytest.importorskip("lightly.models.utils", exc_type=ImportError)
    random.seed(0)
    wanted = 75
    theirs = [
        int(utils.random_block_mask_image((14, 14), wanted, min_num_masks_per_block=RULES[rule]).sum())
        for _ in range(400)
    ]
    ours = block_mask(rng.key(1, torch.arange(2000)), torch.full((2000,), float(wanted)), (14, 14), RULES[rule])
    assert stats.ks_2samp(theirs, ours.mask.sum(1).tolist()).pvalue > 0.001


@pytest.mark.parametrize("rule", ["iBOT", "DINOv2"])
def test_an_images_mask_is_the_same_in_any_batch(rule):
    key = rng.key(2, torch.arange(24))
    wanted = wanted_by(rule, key)
    whole = block_mask(key, wanted, (14, 14), 4)
    for part in (slice(0, 1), slice(3, 17)):
        assert torch.equal(block_mask(key[part], wanted[part], (14, 14), 4).mask, whole.mask[part])
    assert torch.equal(wanted, wanted_by(rule, key))  # which drawing leaves as it is


def test_ibot_hides_nothing_of_half_the_images_and_a_uniform_share_of_the_others():
    shares = wanted_by_image(rng.key(3, torch.arange(4000)), 196, (0.1, 0.5)) / 196
    assert stats.binomtest(int((shares == 0).sum()), 4000, 0.5).pvalue > 0.001
    assert stats.kstest(shares[shares > 0].tolist(), stats.uniform(0.1, 0.4).cdf).pvalue > 0.001


def test_dinov2_hides_of_exactly_half_one_ratio_of_each_bin_in_random_order():
    """Its collate.py: with 20 of 40 masked, the bins' edges are .1, .12, ... .5; counts are rounded down."""
    first, second = (wanted_by_batch(rng.key(seed, torch.arange(40)), 10_000, (0.1, 0.5), 0.5) for seed in (4, 5))
    for wanted in (first, second):
        ratios = wanted[wanted > 0].sort().values / 10_000
        assert len(ratios) == 20
        assert ((ratios - 0.1) / 0.02).floor().tolist() == list(range(20))
        assert torch.equal(wanted, wanted.floor())
    assert not torch.equal(first > 0, second > 0)
    order = stats.spearmanr(torch.arange(20), first[first > 0])
    assert order.pvalue > 0.001
    assert int((wanted_by_batch(rng.key(6, torch.arange(7)), 100, (0.1, 0.5), 0.5) > 0).sum()) == 3  # as int(3.5)


def test_the_images_of_all_processes_decide_which_are_masked(monkeypatch):
    """Two processes of 8 images have the masks of one of 16."""
    key = rng.key(7, torch.arange(16))
    whole = wanted_by_batch(key, 196, (0.1, 0.5), 0.5)
    everyone = rng.bits(rng.fold(key, "order"))
    monkeypatch.setattr(collectives, "gathered_by", lambda device, mine: everyone)
    parts = [wanted_by_batch(part, 196, (0.1, 0.5), 0.5) for part in key.chunk(2)]
    assert torch.equal(torch.cat(parts), whole)
