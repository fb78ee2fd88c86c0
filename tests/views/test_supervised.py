"""The supervised view's random erasing."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sslvit import rng
from sslvit.views.supervised import MEAN, STD, Erasing, SupervisedView, draw_erasing, erase_, normal


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
    images, key = torch.rand(3, 3, 20, 30), rng.key(5, torch.arange(3))
    boxes = torch.tensor([[4, 8, 6, 9], [0, 0, 5, 5], [19, 2, 1, 28]])
    erasing = Erasing(*boxes.unbind(-1), torch.tensor([True, False, True]), key)
    expected = images.clone()
    for row in (0, 2):
        top, left, height, width = boxes[row].tolist()
        noise = normal(key[row : row + 1], 3 * height * width).view(3, height, width)
        value = (noise * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1)
        expected[row] = F.erase(expected[row], top, left, height, width, value)
    erase_(images, erasing)
    assert torch.equal(images, expected)


def test_the_noise_is_normal_and_how_much_of_it_is_no_colour():
    """What is cut off to stay in [0, 1]."""
    stats = pytest.importorskip("scipy.stats")
    noise = normal(rng.key(0, torch.arange(3)), 100_000)
    assert stats.kstest(noise[0], stats.norm.cdf).pvalue > 0.01
    pixels = noise.T * torch.tensor(STD) + torch.tensor(MEAN)
    assert 0.03 < ((pixels < 0) | (pixels > 1)).float().mean() < 0.05


def test_the_two_recipes_crop_from_their_smallest_area():
    assert SupervisedView.deit(224).scale == (0.08, 1.0)
    assert SupervisedView.plain_vit(224).scale == (0.05, 1.0)
    assert SupervisedView.plain_vit(224).erase == 0
