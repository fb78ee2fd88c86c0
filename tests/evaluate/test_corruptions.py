"""The corruptions: pixels of imagecorruptions with the same random numbers where that is installed, and what holds of
each by arithmetic."""

import colorsys
import math
from functools import partial

import imagecorruptions_here as oracle
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from einops import rearrange
from PIL import Image

from sslvit import rng
from sslvit.data.readers import shapes
from sslvit.evaluate.robustness import corruptions, pixels
from sslvit.evaluate.robustness.corruptions import CORRUPTIONS, NAMES, STRENGTHS, corrupt

SIZE = 112  # pixels: with ImageNet-C's parameters
KEY = rng.key(0, torch.tensor([3, 4]))


def scenes(size: int, count: int = 2) -> torch.Tensor:
    return shapes.make(torch.arange(count), size) / 255


def draws(name: str, strength: int, shape: tuple[int, int, int]) -> dict[str, list[np.ndarray]]:
    """The random numbers of the first image's corruption, as numpy's functions are asked for them: colours last."""
    c, h, w = shape
    key = rng.fold(KEY[:1], name, strength)

    def numbers(draw, key, *shape):
        return rearrange(draw(key, *shape)[0], "c ... -> ... c" if len(shape) == 3 else "... -> ...").double().numpy()

    uniform = partial(numbers, rng.uniform)
    side = 1 << (max(h, w) - 1).bit_length()
    clouds = [(3 * level + i, 2**level) for level in range(side.bit_length() - 1) for i in (1, 2, 3)]
    return {
        "gaussian_noise": lambda: {"normal": [numbers(rng.normal, key, c, h, w)]},
        "shot_noise": lambda: {"uniform": [uniform(key, c, h, w)]},
        "impulse_noise": lambda: {"uniform": [uniform(rng.fold(key, i), c, h, w) for i in (0, 1)]},
        "glass_blur": lambda: {"integers": swaps(key, strength, h, w)},
        "motion_blur": lambda: {"uniform": [uniform(key)]},
        "snow": lambda: {
            "normal": [numbers(rng.normal, rng.fold(key, "flakes"), 1, h, w)],
            "uniform": [uniform(rng.fold(key, "angle"))],
        },
        "fog": lambda: {"uniform": [uniform(rng.fold(key, i), n, n) for i, n in clouds]},
        "elastic_transform": lambda: {
            "uniform": [uniform(rng.fold(key, axis), 1, h, w) for axis in ("columns", "rows")]
        },
    }.get(name, dict)()


def swaps(key: torch.Tensor, strength: int, h: int, w: int) -> list[np.ndarray]:
    _, reach, times = CORRUPTIONS["glass_blur"][1][strength - 1]
    drawn = [rng.integers(rng.fold(key, time), 2 * reach, h, w, 2)[0].numpy() - reach for time in range(times)]
    rows, columns = (range(n - reach, reach, -1) for n in (h, w))
    return [one[row, column] for one in drawn for row in rows for column in columns]


def both(name: str, strength: int, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and theirs, h w c, before they are cut off to whole levels."""
    theirs, images = oracle.corruptions(), scenes(size)
    picture = Image.fromarray(rearrange((images[0] * 255).byte(), "c h w -> h w c").numpy())
    with oracle.drawing(**draws(name, strength, tuple(images.shape[1:]))):
        expected = torch.from_numpy(np.asarray(getattr(theirs, name)(picture, strength), np.float64))
    function, table, _ = CORRUPTIONS[name]
    given = table[strength - 1] if isinstance(table[strength - 1], tuple) else (table[strength - 1],)
    actual = function(images[:1].double(), rng.fold(KEY[:1], name, strength), *given)
    return rearrange(actual[0].clamp(0, 1) * 255, "c h w -> h w c"), expected


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_those_of_imagecorruptions(name):
    """Theirs are float32 in part, and glass blur cuts off in between: some of its pixels are a level off then."""
    for strength in (1, 5):
        actual, expected = both(name, strength)
        off = (actual - expected).abs()
        if name == "glass_blur":
            assert off.max() < 1
            assert (off > 1e-3).double().mean() < 0.1
        else:
            assert off.max() < 2e-4, (strength, off.max())


@pytest.mark.parametrize("size", [40, 112])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_corrupted_alike_in_any_batch(name, size):
    images, keys = scenes(size, 3), rng.key(0, torch.arange(3))
    whole = corrupt(images, name, 5, keys)
    assert torch.equal(whole[1:2], corrupt(images[1:2], name, 5, keys[1:2]))
    assert torch.equal(whole.flip(0), corrupt(images.flip(0), name, 5, keys.flip(0)))
    assert torch.equal(whole * 255, (whole * 255).round())
    assert not torch.equal(whole, images)


@pytest.mark.parametrize("sigma", [(0.05, 0.05), (0.7, 0.7), (1.5, 0.4)])
@pytest.mark.parametrize(
    ("border", "theirs"), [("clamped", "nearest"), ("mirrored", "reflect"), ("reflected", "mirror")]
)
def test_the_gaussian_and_its_borders_are_scipys(sigma, border, theirs):
    x = torch.rand(1, 1, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = scipy.ndimage.gaussian_filter(x[0, 0].numpy(), sigma, mode=theirs)
    actual = pixels.gaussian(x, sigma, getattr(pixels, border))
    assert (actual[0, 0] - torch.from_numpy(expected)).abs().max() < 1e-12


@pytest.mark.parametrize("radius", [0.3, 1, 3, 10])
def test_defocus_is_scipys_correlation_with_a_disk(radius):
    x = scenes(40, 1).double()
    kernel = pixels.disk(radius, 0.5)
    assert (kernel - kernel.T).abs().max() < 1e-15
    expected = scipy.ndimage.correlate(x[0, 0].numpy(), kernel.numpy(), mode="mirror")
    actual = corruptions.defocus_blur(x, KEY[:1], radius, 0.5)[0, 0]
    assert (actual - torch.from_numpy(expected)).abs().max() < 1e-9


def test_a_zoom_is_scipys():
    x = scenes(33, 1).double()
    for factor in (1.0, 1.07, 1.31, 4.5):
        kept = math.ceil(33 / factor)
        top = (33 - kept) // 2
        middle = x[0, 0, top : top + kept, top : top + kept].numpy()
        expected = torch.from_numpy(scipy.ndimage.zoom(middle, factor, order=1))
        assert (pixels.zoomed(x, factor)[0, 0] - expected).abs().max() < 1e-12


def test_small_images_are_sheared_and_moved_as_scipy_does_it():
    """CIFAR-10-C's elastic transform: three corners move, and then every pixel."""
    name, strength, n = "elastic_transform", 3, 32
    x, key = scenes(n, 1).double(), rng.fold(KEY[:1], name, 3)
    amplitude, sigma, reach = (share * n for share in (0.08, 0.06, 0.06))
    before = np.array([[26.0, 26.0], [26.0, 6.0], [6.0, 6.0]])  # columns and rows: 16 plus or minus 32 // 3
    after = before + (2 * rng.uniform(rng.fold(key, "corners"), 3, 2)[0].double().numpy() - 1) * reach
    back = np.linalg.solve(np.hstack([after, np.ones((3, 1))]), before)
    rows, columns = np.mgrid[:n, :n].astype(float)
    places = [columns * back[0, i] + rows * back[1, i] + back[2, i] for i in (1, 0)]
    moved = [scipy.ndimage.map_coordinates(one, places, order=1, mode="mirror") for one in x[0].numpy()]
    across, down = (
        amplitude
        * scipy.ndimage.gaussian_filter(
            2 * rng.uniform(rng.fold(key, axis), 1, n, n)[0, 0].double().numpy() - 1, sigma, mode="reflect", truncate=3
        )
        for axis in ("columns", "rows")
    )
    places = [rows + down, columns + across]
    expected = [scipy.ndimage.map_coordinates(one, places, order=1, mode="reflect") for one in moved]
    actual = corruptions.elastic_transform(x, key, *CORRUPTIONS[name][2][strength - 1])
    assert np.abs(actual[0].numpy() - np.stack(expected)).max() < 1e-9


def test_shot_noise_has_the_mean_and_the_variance_of_photons():
    """Of a level v and c photons for white: v, and v / c."""
    grey = torch.full((1, 1, 300, 300), 102 / 255, dtype=torch.float64)
    for photons in (3, 60, 500):
        noisy = corruptions.shot_noise(grey, KEY[:1], photons)
        assert noisy.mean().item() == pytest.approx(0.4, abs=4 * (0.4 / photons / 90000) ** 0.5)
        assert noisy.var().item() == pytest.approx(0.4 / photons, rel=0.03)
        expected = scipy.stats.poisson.ppf(rng.uniform(KEY[:1], 1, 300, 300).double().numpy(), 0.4 * photons) / photons
        assert np.abs(noisy.numpy() - expected).max() < 1e-12


def test_brightness_is_that_of_colorsys():
    x = torch.rand(1, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[0, :, 0, 0] = 0
    actual = corruptions.brightness(x, KEY[:1], 0.3)
    for row, column in np.ndindex(6, 6):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[0, :, row, column].tolist())
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))
        assert actual[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-12)


def test_contrast_and_whole_levels_by_hand():
    image = torch.tensor([[0.0, 100], [200, 100]])[None, None] / 255
    halved = (corruptions.contrast(image.double(), KEY[:1], 0.5) * 255).round()
    assert halved.tolist() == [[[[50, 100], [150, 100]]]]
    levels = torch.tensor([-1, 0.5 * 255, 99.9999, 100, 300], dtype=torch.float64)
    assert (corruptions.whole(levels / 255) * 255).round().tolist() == [0, 127, 99, 100, 255]


def test_a_line_of_motion_is_behind_each_pixel():
    """At angle 0 a white column is smeared over those before it, with the weights of half a Gaussian."""
    x = torch.zeros(1, 1, 3, 9, dtype=torch.float64)
    x[..., 6] = 1
    blurred = pixels.motion(x, 1, 1.0, torch.tensor([0.0]))
    weights = np.exp([0, -0.5, -2])
    assert blurred[0, 0, 1].tolist() == pytest.approx([0, 0, 0, 0, *(weights / weights.sum())[::-1], 0, 0])


def test_small_images_have_the_parameters_of_cifar_and_large_ones_those_of_imagenet():
    """The noise of strength 1: 0.04 up to 96 px, and 0.08."""
    for size, spread in ((32, 0.04), (96, 0.04), (97, 0.08), (128, 0.08)):
        grey = torch.full((1, 3, size, size), 0.5)
        assert corrupt(grey, "gaussian_noise", 1, KEY[:1]).std().item() == pytest.approx(spread, rel=0.05)
    assert {len(table) for _, *tables in CORRUPTIONS.values() for table in tables} == {len(STRENGTHS)}


def test_grey_images_are_corrupted_too_and_other_channels_refused():
    grey = scenes(32)[:, :1]
    assert all(corrupt(grey, name, 3, KEY).shape == grey.shape for name in NAMES)
    with pytest.raises(ValueError, match="of 1 or 3 channels"):
        corrupt(torch.rand(1, 4, 32, 32), "fog", 1, KEY[:1])
    with pytest.raises(ValueError, match="corruption 'frost' of strength 1: there are gaussian_noise, "):
        corrupt(grey, "frost", 1, KEY)
    with pytest.raises(ValueError, match="of strength 6"):
        corrupt(grey, "fog", 6, KEY)
