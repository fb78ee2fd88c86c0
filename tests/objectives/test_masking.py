"""Masks have exact counts and no favourites."""

import pytest
import torch
from scipy import stats

from sslvit import rng
from sslvit.objectives.masking import random_mask


def test_every_image_has_exactly_the_count():
    keys = rng.key(0, torch.arange(500))
    for count in (0, 1, 98, 196):
        assert random_mask(keys, 196, count).sum(-1).eq(count).all()


def test_every_patch_is_masked_equally_often():
    mask = random_mask(rng.key(1, torch.arange(20_000)), 49, 24)
    # Without replacement within an image the counts vary less than chi-squared assumes: by (49 - 24) / 48 of it.
    counts = mask.sum(0).double()
    expected = 20_000 * 24 / 49
    statistic = ((counts - expected) ** 2 / expected).sum() / ((1 - 24 / 49) * 49 / 48)
    assert stats.chi2(48).sf(float(statistic)) > 0.01


def test_images_have_masks_of_their_own():
    mask = random_mask(rng.key(2, torch.arange(300)), 64, 32)
    assert len(mask.unique(dim=0)) == 300


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="cannot mask 5 of 4"):
        random_mask(rng.key(0, torch.arange(2)), 4, 5)
