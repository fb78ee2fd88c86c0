"""The supervised view's random erasing."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sslvit import rng
from sslvit.data.supervised import MEAN, STD, Supervised, draw_erasing, erase_


def test_erased_boxes_are_distributed_as_torchvisions():
    stats = pytest.importorskip("scipy.stats")
    count = 20_000
    ours = draw_erasing(rng.key(0, torch.arange(count)), (32, 48), 0.25)
    torch.manual_seed(0)
    eraser, image = v2.RandomErasing(1.0, (0.02, 1 / 3), (0.3, 1 / 0.3)), torch.empty(3, 32, 48)
    theirs = [eraser.make_params([image]) for _ in range(count)]
    for name, other in (("top", "i"), ("left", "j"), ("height", "h"), ("width", "w")):
        # Ours also draws the boxes that are not used; a box that is used is like any other.
        expected = [draw[other] for draw in theirs if draw["v"] is not None]
        assert stats.ks_2samp(getattr(ours, name), expected).pvalue > 0.01
    assert stats.binomtest(int(ours.chosen.sum()), count, 0.25).pvalue > 0.01


def test_an_erased_box_is_torchvisions_erase_with_the_same_noise():
    image = torch.rand(3, 20, 30)
    key = rng.key(5)
    noise = rng.normal(key, 3, 6, 9)
    standard = (noise * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1)
    expected = F.erase(image, 4, 8, 6, 9, standard)
    erase_(image, (4, 8, 6, 9), key)
    assert torch.equal(image, expected)


def test_how_much_of_deits_noise_is_no_colour():
    """What is cut off to stay in [0, 1]: under 5 % of the erased values."""
    noise = rng.normal(rng.key(0), 100_000, 3) * torch.tensor(STD) + torch.tensor(MEAN)
    assert 0.02 < ((noise < 0) | (noise > 1)).float().mean() < 0.05


def test_the_two_recipes_crop_from_their_smallest_area():
    assert Supervised.deit(224).scale == (0.08, 1.0)
    assert Supervised.plain_vit(224).scale == (0.05, 1.0)
    assert Supervised.plain_vit(224).erase == 0
