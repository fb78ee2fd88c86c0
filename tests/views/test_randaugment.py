"""RandAugment's operations against torchvision's on uint8, its amounts against timm's."""

import itertools
import math
import random

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from sslvit import rng
from sslvit.views import operations
from sslvit.views.randaugment import STYLES, WARPS, RandAugment
from sslvit.views.supervised import SupervisedView


def pictures(count: int = 4, size: tuple[int, int] = (40, 48)) -> torch.Tensor:
    """Smooth ones, with little contrast in the first and one flat channel in the last."""
    noise = torch.rand(count, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    images = (F.resize(noise, list(size), antialias=True) * 255).to(torch.uint8)
    images[0] = images[0] // 4 + 90
    images[-1, 1] = 200
    return images


def amounts(value: float, count: int = 4) -> torch.Tensor:
    return torch.full((count, 1, 1, 1), float(value))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return (255 * ours - theirs).abs()


WHOLE = [
    (operations.posterize_, F.posterize, (0, 1, 4, 7, 8)),
    (operations.solarize_, F.solarize, (0, 26, 128, 255)),
]


@pytest.mark.parametrize(("ours", "theirs", "values"), WHOLE)
def test_operations_on_whole_numbers_are_torchvisions(ours, theirs, values):
    for value in values:
        images = pictures() / 255
        ours(images, amounts(value))
        assert error(images, theirs(pictures(), value)).max() < 1e-3


def test_invert_is_torchvisions():
    images = pictures() / 255
    operations.invert_(images)
    assert error(images, F.invert(pictures())).max() < 1e-3


def test_equalize_is_torchvisions():
    images = pictures() / 255
    operations.equalize_(images)
    assert error(images, F.equalize(pictures())).max() < 1e-3


def test_autocontrast_is_torchvisions_up_to_its_rounding():
    images = pictures() / 255
    operations.autocontrast_(images)
    assert error(images, F.autocontrast(pictures())).max() < 1.001
    assert torch.equal(images.amin((-2, -1))[:-1], torch.zeros(3, 3))
    assert torch.equal(images.amax((-2, -1))[:-1], torch.ones(3, 3))


def test_solarize_add_adds_below_128_only():
    images = (torch.arange(256).view(1, 1, 16, 16) / 255).clone()
    operations.solarize_add_(images, amounts(110, 1))
    expected = [v + 110 if v < 128 else v for v in range(256)]
    assert (images * 255).round().flatten().tolist() == expected


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.9])
def test_sharpness_is_torchvisions(factor):
    images = pictures() / 255
    operations.sharpness_(images, amounts(factor))
    torch.testing.assert_close(
        images, torch.stack([F.adjust_sharpness(i / 255, factor) for i in pictures()]), atol=2e-6, rtol=0
    )
    assert error(images, torch.stack([F.adjust_sharpness(i, factor) for i in pictures()])).max() < 2


@pytest.mark.parametrize("sampling", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(40, 48), (32, 32)])
def test_warps_are_torchvisions(size, sampling):
    """Nearest pixels may differ where a point lies halfway between two."""
    mode, fill, height, width = F.InterpolationMode(sampling), [124.0, 116.0, 104.0], *size
    shear = [math.degrees(math.atan(0.27)), 0.0]
    theirs = {
        "rotate": (-21.3, lambda i: F.rotate(i, -21.3, mode, fill=fill)),
        "shear_x": (0.27, lambda i: F.affine(i, 0.0, [0, 0], 1.0, shear, mode, fill, [0.0, 0.0])),
        "shear_y": (0.27, lambda i: F.affine(i, 0.0, [0, 0], 1.0, shear[::-1], mode, fill, [0.0, 0.0])),
        "translate_x": (7 / width, lambda i: F.affine(i, 0.0, [-7, 0], 1.0, [0.0, 0.0], mode, fill)),
        "translate_y": (7 / height, lambda i: F.affine(i, 0.0, [0, -7], 1.0, [0.0, 0.0], mode, fill)),
    }
    filling = (torch.tensor(fill) / 255).view(3, 1, 1)
    for name, (amount, function) in theirs.items():
        images = pictures(size=size) / 255
        operations.warp_(images, WARPS[name](amounts(amount), *size), sampling, filling)
        off = error(images, function(pictures(size=size)))
        assert off.mean() < 0.6
        assert (off > 1.01).float().mean() < (1e-9 if sampling == "bilinear" else 0.01)


def test_a_cutout_covers_its_square_and_no_more():
    images = torch.zeros(2, 3, 20, 30)
    centre = torch.tensor([[0.5, 0.5], [0.0, 0.999]])
    operations.cutout_(images, amounts(0.2, 2), centre, torch.full((3, 1, 1), 0.5))
    expected = torch.zeros(2, 3, 20, 30)
    expected[0, :, 6:14, 9:21] = 0.5
    expected[1, :, 0:4, 23:30] = 0.5
    assert torch.equal(images, expected)


@pytest.mark.parametrize("magnitude", [0, 3, 9, 10])
def test_deits_amounts_are_timms(magnitude, monkeypatch):
    timm = pytest.importorskip("timm.data.auto_augment")
    level = torch.tensor(magnitude / 10)
    theirs = {
        "rotate": "Rotate",
        "posterize": "PosterizeIncreasing",
        "solarize": "SolarizeIncreasing",
        "solarize_add": "SolarizeAdd",
        "saturation": "ColorIncreasing",
        "contrast": "ContrastIncreasing",
        "brightness": "BrightnessIncreasing",
        "sharpness": "SharpnessIncreasing",
        "shear_x": "ShearX",
        "shear_y": "ShearY",
        "translate_x": "TranslateXRel",
        "translate_y": "TranslateYRel",
        "autocontrast": "AutoContrast",
        "equalize": "Equalize",
        "invert": "Invert",
    }
    assert sorted(theirs.values()) == sorted(timm._RAND_INCREASING_TRANSFORMS)
    assert set(theirs) == set(STYLES["deit"])
    for name, other in theirs.items():
        for sign in (1.0, -1.0) if timm.LEVEL_TO_ARG[other] else ():
            monkeypatch.setattr(random, "random", lambda sign=sign: 0.25 if sign > 0 else 0.75)
            (expected,) = timm.LEVEL_TO_ARG[other](magnitude, {})
            assert float(STYLES["deit"][name](level, torch.tensor(sign))) == pytest.approx(expected)


def test_plain_vits_amounts_at_magnitude_ten_are_big_visions():
    level, sign = torch.tensor(1.0), torch.tensor(-1.0)
    got = {name: float(amount(level, sign)) for name, amount in STYLES["plain_vit"].items()}
    assert len(got) == 16
    assert got | {"autocontrast": 0, "equalize": 0, "invert": 0} == pytest.approx(
        {
            "autocontrast": 0,
            "equalize": 0,
            "invert": 0,
            "rotate": -30,
            "posterize": 4,
            "solarize": 256,
            "solarize_add": 110,
            "saturation": 1.9,
            "contrast": 1.9,
            "brightness": 1.9,
            "sharpness": 1.9,
            "shear_x": -0.3,
            "shear_y": -0.3,
            "translate_x": -100 / 224,
            "translate_y": -100 / 224,
            "cutout": 40 / 224,
        }
    )


def test_operations_and_magnitudes_follow_their_distributions():
    stats = pytest.importorskip("scipy.stats")
    count = 20_000
    draw = RandAugment.deit().draw(rng.key(3, torch.arange(count)))
    for layer in range(2):
        chosen = draw.operation[:, layer]
        assert stats.binomtest(int((chosen >= 0).sum()), count, 0.5).pvalue > 0.01
        assert stats.chisquare(chosen[chosen >= 0].bincount(minlength=15)).pvalue > 0.01
        assert stats.binomtest(int((draw.sign[:, layer] > 0).sum()), count, 0.5).pvalue > 0.01
        below = draw.level[:, layer][draw.level[:, layer] < 1] * 10  # the rest is clipped to 10
        assert stats.kstest(below, stats.truncnorm(-18, 2, 9, 0.5).cdf).pvalue > 0.01
    plain = RandAugment.plain_vit(15).draw(rng.key(3, torch.arange(count)))
    assert torch.equal(plain.level, torch.full((count, 2), 1.5))
    assert stats.chisquare(plain.operation.flatten().bincount(minlength=16)).pvalue > 0.01


def test_operation_sign_magnitude_and_centre_of_both_layers_are_drawn_independently():
    stats = pytest.importorskip("scipy.stats")
    draw = RandAugment.deit().draw(rng.key(3, torch.arange(20_000)))
    drawn = {}
    for layer in range(2):
        drawn |= {("operation", layer): draw.operation[:, layer] + 1, ("sign", layer): draw.sign[:, layer] > 0}
        drawn |= {("magnitude", layer): draw.level[:, layer] > 0.9}
        drawn |= {(f"centre {axis}", layer): draw.center[:, layer, axis] > 0.5 for axis in range(2)}
    for one, other in itertools.combinations(drawn, 2):
        table = torch.zeros(16, 16).index_put_(
            (drawn[one].long(), drawn[other].long()), torch.ones(()), accumulate=True
        )
        table = table[table.sum(1) > 0][:, table.sum(0) > 0]
        assert stats.chi2_contingency(table.numpy()).pvalue > 1e-4, (one, other)


def test_layers_follow_one_another():
    """Each sample's two operations, carried out one after the other by hand."""
    augment = RandAugment("deit", probability=1.0)
    images = (pictures(40) / 255).contiguous()
    draw = augment.draw(rng.key(1, torch.arange(40)))
    expected = images.clone()
    for row in range(40):
        for layer in range(2):
            name = [*STYLES["deit"]][int(draw.operation[row, layer])]
            amount = STYLES["deit"][name](draw.level[row, layer], draw.sign[row, layer]).view(1)
            fill = torch.tensor(augment.fill).view(3, 1, 1)
            center = draw.center[row : row + 1, layer]
            augment.carry_out_(name, fill, expected[row : row + 1], torch.tensor([0]), amount, center)
    augment.apply_(images, draw)
    assert torch.equal(images, expected)


@pytest.mark.parametrize("channels", [2, 5])
def test_saturation_of_other_than_one_or_three_channels_is_refused_whatever_is_drawn(channels):
    pixels, key = torch.zeros(1, channels, 8, 8, dtype=torch.uint8), rng.key(0, torch.arange(1))
    for view in (SupervisedView.deit(8), SupervisedView.plain_vit(8)):
        with pytest.raises(ValueError, match=rf"RandAugment needs 1 or 3 channels, got {channels}"):
            view(pixels, key)
    SupervisedView(8, erase=1.0)(pixels, key)
