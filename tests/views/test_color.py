"""Colour operations against torchvision's, given the same parameters."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sslvit import rng
from sslvit.views import color

THEIRS = {
    color.brightness_: F.adjust_brightness,
    color.contrast_: F.adjust_contrast,
    color.saturation_: F.adjust_saturation,
    color.hue_: F.adjust_hue,
}
FACTORS = [
    *((color.brightness_, f) for f in (0.0, 0.6, 1.0, 1.4)),
    *((color.contrast_, f) for f in (0.0, 0.6, 1.0, 1.4)),
    *((color.saturation_, f) for f in (0.0, 0.8, 1.0, 1.2, 3.0)),
    *((color.hue_, f) for f in (-0.5, -0.1, 0.0, 0.03, 0.1, 1 / 3, 0.5)),
]


def images() -> torch.Tensor:
    """Whole numbers of 1/255: noise, every corner and edge of the colour cube, greys, one flat colour."""
    noise = torch.rand(3, 3, 41, 37, generator=torch.Generator().manual_seed(0))
    noise[1] = (noise[1] * 2).round() / 2
    noise[2, :] = noise[2, :1]
    flat = torch.tensor([0.2, 0.9, 0.4]).view(1, 3, 1, 1).expand(1, 3, 41, 37)
    return (torch.cat([noise, flat]) * 255).round() / 255


def apply(operation, x: torch.Tensor, factor: float) -> torch.Tensor:
    out = x.clone()
    operation(out, torch.full((len(x), 1, 1, 1), factor))
    return out


@pytest.mark.parametrize(("operation", "factor"), FACTORS)
def test_a_colour_change_is_torchvisions_on_floats(operation, factor):
    x = images()
    expected = torch.stack([THEIRS[operation](image, factor) for image in x])
    torch.testing.assert_close(apply(operation, x, factor), expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize(("operation", "factor"), [(o, f) for o, f in FACTORS if f])
def test_a_colour_change_is_torchvisions_on_uint8_up_to_its_truncation(operation, factor):
    """torchvision truncates to whole numbers at the end, and twice more (greys, their mean) on the way."""
    x = images()
    theirs = torch.stack([THEIRS[operation]((image * 255).round().to(torch.uint8), factor) for image in x])
    error = (255 * apply(operation, x, factor) - theirs).abs()
    assert error.mean() < 1
    assert error.max() < 2.5


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_four_changes_in_a_row_are_torchvisions(order):
    x, factors = images(), (0.7, 1.35, 0.85, -0.07)
    ours, theirs = x.clone(), x
    theirs8 = (x * 255).round().to(torch.uint8)
    for place in order:
        color.OPERATIONS[place](ours, torch.full((len(x), 1, 1, 1), factors[place]))
        theirs = torch.stack([THEIRS[color.OPERATIONS[place]](image, factors[place]) for image in theirs])
        theirs8 = torch.stack([THEIRS[color.OPERATIONS[place]](image, factors[place]) for image in theirs8])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    # Four truncations in a row: the mean error of uint8 grows to 2/255, which no rounding of ours could follow.
    assert (255 * ours - theirs8).abs().mean() < 2.5


def test_a_full_turn_of_the_hue_by_thirds_moves_red_to_green_to_blue():
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    green, blue = red.roll(1, 1), red.roll(2, 1)
    torch.testing.assert_close(apply(color.hue_, red, 1 / 3), green, atol=1e-6, rtol=0)
    torch.testing.assert_close(apply(color.hue_, green, 1 / 3), blue, atol=1e-6, rtol=0)
    torch.testing.assert_close(apply(color.hue_, blue, 1 / 3), red, atol=1e-6, rtol=0)


def test_grey_is_torchvisions():
    x = images()
    ours = x.clone()
    color.grey_(ours)
    torch.testing.assert_close(ours, F.rgb_to_grayscale(x, 3), atol=1e-6, rtol=0)


def test_solarize_is_torchvisions_on_every_value():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    ours = values / 255
    color.solarize_(ours)
    torch.testing.assert_close(ours * 255, F.solarize(values, 128).float(), atol=1e-4, rtol=0)


def test_grey_images_know_brightness_and_contrast_and_ignore_the_rest():
    x = images()[:, :1].contiguous()
    for operation, factor in [(color.brightness_, 1.3), (color.contrast_, 0.7)]:
        expected = torch.stack([THEIRS[operation](image, factor) for image in x])
        torch.testing.assert_close(apply(operation, x, factor), expected, atol=1e-6, rtol=0)
    assert torch.equal(apply(color.saturation_, x, 0.3), x)
    assert torch.equal(apply(color.hue_, x, 0.3), x)


def test_the_luma_of_five_channels_is_their_mean():
    x = torch.rand(2, 5, 4, 4)
    torch.testing.assert_close(color.luma(x), x.mean(1, keepdim=True))


def test_each_sample_has_its_own_factor():
    x = images()[:2]
    for operation in color.OPERATIONS:
        both = x.clone()
        operation(both, torch.tensor([0.1, 0.4]).view(2, 1, 1, 1))
        for row, factor in enumerate([0.1, 0.4]):
            assert torch.equal(both[row], apply(operation, x[row : row + 1], factor)[0])


def test_jitter_draws_are_distributed_as_torchvisions():
    """20,000 draws each: factors by Kolmogorov-Smirnov, orders by chi-square over the 24."""
    stats = pytest.importorskip("scipy.stats")
    count = 20_000
    ours = color.draw_jitter(rng.key(1, torch.arange(count)), (0.4, 0.4, 0.2, 0.1), 0.8)
    torch.manual_seed(1)
    jitter = v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
    theirs = [jitter.make_params([]) for _ in range(count)]
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for column, name in enumerate(names):
        assert stats.ks_2samp(ours.factors[:, column], [draw[name] for draw in theirs]).pvalue > 0.01
    codes = torch.tensor([64, 16, 4, 1])
    orders = (ours.order * codes).sum(-1).tolist()
    expected = [int((torch.as_tensor(draw["fn_idx"]) * codes).sum()) for draw in theirs]
    assert set(orders) == set(expected)
    table = [[row.count(code) for code in sorted(set(orders))] for row in (orders, expected)]
    assert stats.chi2_contingency(table).pvalue > 0.01
    assert stats.binomtest(int(ours.chosen.sum()), count, 0.8).pvalue > 0.01


def test_strengths_above_one_do_not_draw_negative_factors():
    factors = color.draw_jitter(rng.key(0, torch.arange(1000)), (1.5, 1.5, 1.5, 0.0), 1.0).factors
    assert factors[:, :3].min() >= 0
    assert factors[:, 3].abs().max() == 0
