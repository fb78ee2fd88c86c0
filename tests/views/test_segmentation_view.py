"""The view of an image and its mask: one geometry for both, classes of the nearest pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from sslvit import rng
from sslvit.views.resample import Axis
from sslvit.views.segmentation import IGNORED, SegmentationView, nearest

PLAIN = {"flip": 0.0, "color": 0.0}


def blocks(count=6, size=48, side=12, seed=0):
    """Images of large blocks, whose grey is 20 times their class."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 12, (count, size // side, size // side), generator=generator)
    masks = masks.repeat_interleave(side, 1).repeat_interleave(side, 2).to(torch.uint8)
    return torch.cat([(masks * 20)[:, None].expand(-1, 3, -1, -1), masks[:, None]], 1)


def keys(count):
    return rng.key(0, "test", torch.arange(count))


def classes(masks):
    return (masks[:, 0] * 255).round().long()


def test_an_image_of_the_views_size_at_factor_one_stays_as_it_is():
    pixels = blocks()
    images, masks = SegmentationView(48, (1.0, 1.0), **PLAIN)(pixels, keys(6))
    assert torch.equal((images * 255).round().to(torch.uint8), pixels[:, :3])
    assert torch.equal(classes(masks), pixels[:, 3].long())


@pytest.mark.parametrize("ratio", [(0.5, 0.5), (0.5, 2.0), (2.0, 2.0)])
def test_image_and_mask_go_through_the_same_crop_and_flip(ratio):
    images, masks = SegmentationView(48, ratio, color=0.0)(blocks(40), keys(40))
    found = classes(masks)
    inside = torch.nn.functional.max_pool2d(found[:, None].double(), 5, 1, 2)
    inside = (inside == -torch.nn.functional.max_pool2d(-found[:, None].double(), 5, 1, 2))[:, 0] & (found != IGNORED)
    inside[:, [0, 1, -2, -1]] = inside[:, :, [0, 1, -2, -1]] = False  # what lies beyond the crop is not known
    assert inside.double().mean() > 0.03
    # At least two pixels from another class nothing is blended in.
    assert torch.allclose(images[:, 0][inside], found[inside] * 20 / 255, atol=0.03)


def test_flips_are_half_of_them_and_turn_the_image():
    pixels = blocks(200)
    flipped = classes(SegmentationView(48, (1.0, 1.0), color=0.0)(pixels, keys(200))[1])
    same, turned = ((flipped == one).all((1, 2)) for one in (pixels[:, 3], pixels[:, 3].flip(-1)))
    assert (same | turned).all()
    assert 70 < int(turned.sum()) < 130


def test_what_is_outside_the_image_is_not_scored_and_all_else_is():
    masks = classes(SegmentationView(48, (0.5, 0.5), **PLAIN)(blocks(), keys(6))[1])
    assert ((masks != IGNORED).sum((1, 2)) == 24 * 24).all()
    assert (masks[:, :24, :24] != IGNORED).all()


def test_the_nearest_pixel_is_pillows():
    mask = np.random.default_rng(0).integers(0, 255, (37, 53)).astype(np.uint8)
    for height, width in ((20, 30), (64, 91), (37, 53)):
        expected = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        zero = torch.zeros(1, dtype=torch.int64)
        axes = [Axis(zero, zero + n, zero + m, zero, zero.bool()) for n, m in ((37, height), (53, width))]
        assert np.array_equal(nearest(torch.from_numpy(mask)[None], tuple(axes), (height, width))[0], expected)


def test_a_view_is_the_same_alone_and_in_a_batch():
    view, pixels = SegmentationView(32), blocks(8)
    extents = torch.tensor([[48, 48], [30, 48], [48, 21], [40, 40]] * 2)
    together = view(pixels, keys(8), extents)
    for i in (0, 3, 6):
        alone = view(pixels[i : i + 1], keys(8)[i : i + 1], extents[i : i + 1])
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one[0], other[i])


def test_colours_change_the_image_alone():
    pixels = blocks(50)
    plain, changed = (SegmentationView(48, (1.0, 1.0), flip=0.0, color=p)(pixels, keys(50)) for p in (0.0, 1.0))
    assert torch.equal(plain[1], changed[1])
    assert ((plain[0] - changed[0]).abs().amax((1, 2, 3)) > 0.01).all()


def test_scales_out_of_order_are_refused():
    with pytest.raises(ValueError, match="ratio"):
        SegmentationView(32, (2.0, 0.5))
