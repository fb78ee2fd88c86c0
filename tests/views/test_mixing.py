"""Mixup and cutmix: shares, boxes and labels by arithmetic; smoothed labels are timm's."""

import pytest
import torch
import torch.nn.functional as F

from sslvit import rng
from sslvit.views.mixing import beta, mix_pairs, shares, targets


def images_of(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 12, generator=torch.Generator().manual_seed(0))


def test_smoothed_targets_are_timms():
    timm = pytest.importorskip("timm.data.mixup")
    labels = torch.tensor([0, 3, 1])
    expected = timm.mixup_target(labels, 10, lam=1.0, smoothing=0.1)
    torch.testing.assert_close(targets(labels, 10, 0.1), expected)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_shares_have_the_beta_distribution(alpha):
    stats = pytest.importorskip("scipy.stats")
    draws = beta(rng.key(0, torch.arange(4000)), alpha)
    assert stats.kstest(draws.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_mixup_gives_a_pair_both_shares_of_images_and_labels_alike():
    images, labels = images_of(8).double(), F.one_hot(torch.arange(8), 8).double()
    mixed, soft = mix_pairs(images, labels, rng.key(1, torch.arange(8)), mixup=0.8, cutmix=0.0)
    for first in range(0, 8, 2):
        own = soft[first, first]
        assert 0 < own < 1
        torch.testing.assert_close(soft[first] + soft[first + 1], labels[first] + labels[first + 1])
        expected = own * images[first] + (1 - own) * images[first + 1]
        torch.testing.assert_close(mixed[first], expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(mixed[first] + mixed[first + 1], images[first] + images[first + 1])
    assert len(soft.diagonal()[::2].unique()) == 4  # each pair has a share of its own


def test_cutmix_swaps_a_box_and_labels_count_its_pixels():
    b, height, width = 400, 16, 24
    first = torch.zeros(b, 3, height, width)
    first[1::2] = 1.0
    truth = F.one_hot(torch.arange(b) % 2, 2).float()
    mixed, soft = mix_pairs(first, truth, rng.key(2, torch.arange(b)), mixup=0.0, cutmix=1.0)
    assert set(mixed.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(mixed.mean((1, 2, 3)), soft[:, 1])
    foreign = mixed[::2, 0] == 1
    for box in foreign:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns[None])  # a box
        for line in (rows, columns):  # without holes
            assert int(line.int().diff().abs().sum()) <= 2
    assert torch.equal(mixed[1::2, 0] == 0, foreign)


def test_a_box_of_cutmix_has_the_area_of_its_share_where_no_edge_cuts_it():
    key = rng.key(3, torch.arange(2000))
    outside = shares(key, (64, 64), mixup=0.0, cutmix=1.0)
    area = 1 - beta(rng.fold(key, "box share"), 1.0)
    box = outside == 0
    touches = box[:, 0].any(1) | box[:, -1].any(1) | box[:, :, 0].any(1) | box[:, :, -1].any(1)
    assert 100 < (~touches).sum() < 1900
    error = (box.float().mean((1, 2)) - area)[~touches].abs()
    assert error.max() < 2 * 1 / 64 + 1 / 64**2  # a side is right to a pixel
    assert (box.float().mean((1, 2)) - area)[touches].max() < 2 / 64


def test_with_both_each_pair_takes_either_equally_often():
    stats = pytest.importorskip("scipy.stats")
    own = shares(rng.key(4, torch.arange(2000)), (8, 8), mixup=0.8, cutmix=1.0)
    even = int((own.amax((1, 2)) == own.amin((1, 2))).sum())  # few boxes cover nothing or everything
    assert abs(even - 1000) < 150
    cut = rng.uniform(rng.fold(rng.key(4, torch.arange(2000)), "switch")) < 0.5
    assert stats.binomtest(int(cut.sum()), 2000, 0.5).pvalue > 0.01


def test_mixing_does_not_depend_on_how_many_processes_share_a_batch():
    whole, key = images_of(8), rng.key(5, torch.arange(8))
    truth = F.one_hot(torch.arange(8) % 5, 5).float()
    images, soft = mix_pairs(whole, truth, key, 0.8, 1.0)
    for part in (slice(0, 4), slice(4, 8)):
        some, its_truth = mix_pairs(whole[part], truth[part], key[part], 0.8, 1.0)
        assert torch.equal(some, images[part])
        assert torch.equal(its_truth, soft[part])
    with pytest.raises(ValueError, match="3 images"):
        mix_pairs(whole[:3], truth[:3], key[:3], 0.8, 1.0)
