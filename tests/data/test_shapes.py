"""The built-in images: a function of the id, balanced, the same scene at every size, and fast."""

import time

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from sslvit.data.readers import shapes
from sslvit.data.spec import open_source


def test_an_image_is_the_same_in_any_batch():
    ids = torch.arange(300)
    together = shapes.make(ids, 32)
    assert together.dtype == torch.uint8
    assert together.shape == (300, 3, 32, 32)
    assert torch.equal(together.flip(0), shapes.make(ids.flip(0), 32))
    for i in (0, 150, 299):
        assert torch.equal(together[i], shapes.make(ids[i : i + 1], 32)[0])


def test_threads_change_no_pixel():
    before = torch.get_num_threads()
    images = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        images.append(shapes.make(torch.arange(64), 40))
    torch.set_num_threads(before)
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_ids_and_seeds_make_other_images():
    images = shapes.make(torch.arange(2000), 16)
    assert len(images.flatten(1).unique(dim=0)) == 2000
    assert not torch.equal(shapes.make(torch.arange(5), 16, seed=1), images[:5])


def test_every_size_shows_the_same_scene():
    small, large = (shapes.make(torch.arange(20), size).float() for size in (32, 128))
    shrunk = F.avg_pool2d(large, 4)
    # Rendered points against averages: they differ at outlines and in the finest textures, not in the scene.
    correlation = torch.corrcoef(torch.stack([small.flatten(), shrunk.flatten()]))[0, 1]
    assert correlation > 0.97
    other = torch.corrcoef(torch.stack([small.flatten(), shrunk.roll(1, 0).flatten()]))[0, 1]
    assert other < 0.8


def test_labels_are_balanced_and_the_two_are_independent():
    ids = torch.arange(24_000)
    shape, texture = shapes.shape_label(ids), shapes.texture_label(ids)
    assert len(shapes.SHAPES) >= 10
    for labels, names in ((shape, shapes.SHAPES), (texture, shapes.TEXTURES)):
        counts = torch.bincount(labels, minlength=len(names))
        assert len(counts) == len(names)
        assert stats.chisquare(counts.numpy()).pvalue > 0.01
    joint = torch.bincount(shape * len(shapes.TEXTURES) + texture).view(len(shapes.SHAPES), -1)
    assert stats.chi2_contingency(joint.numpy()).pvalue > 0.01


@pytest.mark.usefixtures("all_shapes")
def test_the_two_splits_share_no_image():
    train = open_source("shapes:n=500", image_size=16)
    test = open_source("shapes", split="test", image_size=16)
    both = torch.cat([s.read(torch.arange(500).numpy()).pixels for s in (train, test)])
    assert len(both.flatten(1).unique(dim=0)) == 1000


def test_no_image_is_blank_and_objects_stay_inside():
    images = shapes.make(torch.arange(500), 32).float()
    assert images.flatten(1).std(1).min() > 8
    # the object is the light part: the frame is darker than the middle
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    bright = images.mean(1)
    assert (bright[:, frame].mean(1) < bright.flatten(1).amax(1)).all()


def test_too_small_a_size_is_refused():
    with pytest.raises(ValueError, match="size 4"):
        shapes.make(torch.arange(2), 4)


@pytest.mark.timing
@pytest.mark.slow
def test_two_cores_make_ten_thousand_images_a_second():
    seconds = []
    for start in range(0, 50_000, 10_000):
        began = time.perf_counter()
        shapes.make(torch.arange(start, start + 10_000), 32)
        seconds.append(time.perf_counter() - began)
    assert 10_000 / sorted(seconds)[2] > 10_000
