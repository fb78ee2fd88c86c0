"""Mixup and cutmix: closed forms, and the conventions of DeiT (timm's) and of plain ViTs (big_vision's)."""

import pytest
import torch

from sslvit import rng
from sslvit.data import mixing
from sslvit.data.mixing import Mix, cutmix, draw_beta, draw_box, mixup, targets


def batch(count: int = 6):
    images = torch.rand(count, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(count) % 4


def test_smoothed_targets_are_timms():
    timm = pytest.importorskip("timm.data.mixup")
    labels = torch.tensor([0, 3, 1])
    expected = timm.mixup_target(labels, 10, lam=1.0, smoothing=0.1)
    torch.testing.assert_close(targets(labels, 10, 0.1), expected)


def test_mixup_with_the_reversed_batch_is_timms(monkeypatch):
    timm = pytest.importorskip("timm.data.mixup")
    images, labels = batch()
    theirs = timm.Mixup(mixup_alpha=0.8, num_classes=10, label_smoothing=0.1)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (0.3, False))
    expected = theirs(images.clone(), labels)
    for ours, other in zip(mixup(images, targets(labels, 10, 0.1), 0.3), expected, strict=True):
        torch.testing.assert_close(ours, other)


def test_cutmix_with_the_reversed_batch_is_timms(monkeypatch):
    timm = pytest.importorskip("timm.data.mixup")
    images, labels = batch()
    theirs = timm.Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, num_classes=10, label_smoothing=0.1)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (0.3, True))
    monkeypatch.setattr(timm, "rand_bbox", lambda *_, **__: (2, 9, 0, 5))
    expected = theirs(images.clone(), labels)
    for ours, other in zip(cutmix(images, targets(labels, 10, 0.1), (2, 9, 0, 5)), expected, strict=True):
        torch.testing.assert_close(ours, other)


def test_plain_vits_mix_with_the_sample_before_and_keep_the_larger_share():
    images, labels = batch()
    mix = Mix.plain_vit(10)
    for number in range(20):
        mixed, soft = mix(images, labels, rng.key(number))
        share = float(soft[0, 0])
        assert share >= 0.5
        torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
        assert float(soft[0, labels[-1]]) == pytest.approx(1 - share, abs=1e-6)


def test_targets_remain_probabilities_whatever_is_drawn():
    images, labels = batch()
    for number in range(40):
        mixed, soft = Mix.deit(10)(images, labels, rng.key(number))
        assert mixed.shape == images.shape
        torch.testing.assert_close(soft.sum(-1), torch.ones(6))


def test_a_cutmix_label_is_the_share_of_its_pixels():
    ones, zeros = torch.ones(1, 3, 16, 12), torch.zeros(1, 3, 16, 12)
    images, labels = torch.cat([ones, zeros]), torch.tensor([1, 0])
    mix = Mix(2, cutmix=1.0)
    for number in range(50):
        mixed, soft = mix(images, labels, rng.key(number))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), soft[:, 1])


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 2.0])
def test_shares_are_beta_distributed(alpha):
    stats = pytest.importorskip("scipy.stats")
    shares = [draw_beta(key, alpha) for key in rng.key(0, torch.arange(3000))]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_boxes_are_distributed_as_timms():
    timm = pytest.importorskip("timm.data.mixup")
    stats = pytest.importorskip("scipy.stats")
    count = 4000
    ours = [draw_box(key, (20, 30), 0.4) for key in rng.key(0, torch.arange(count))]
    theirs = timm.rand_bbox((3, 20, 30), 0.4, count=count)
    for mine, other in zip(zip(*ours, strict=True), theirs, strict=True):
        assert stats.ks_2samp(mine, other).pvalue > 0.01


def test_which_of_the_two_is_a_fair_coin_and_a_key_repeats(monkeypatch):
    images, labels = batch()
    used = []
    monkeypatch.setattr(mixing, "cutmix", lambda *arguments: used.append("cutmix") or cutmix(*arguments))
    for number in range(400):
        Mix.deit(10)(images, labels, rng.key(number))
    assert 160 < len(used) < 240
    assert torch.equal(Mix.deit(10)(images, labels, rng.key(7))[0], Mix.deit(10)(images, labels, rng.key(7))[0])


def test_what_cannot_be_mixed_is_refused():
    images, labels = batch()
    with pytest.raises(ValueError, match="one key"):
        Mix.deit(10)(images, labels, rng.key(0, torch.arange(6)))
    with pytest.raises(ValueError, match="alpha 3"):
        Mix(10, mixup=3.0)(images, labels, rng.key(0))
    unmixed, soft = Mix(10)(images, labels, rng.key(0))
    assert torch.equal(unmixed, images)
    assert torch.equal(soft.argmax(-1), labels)
