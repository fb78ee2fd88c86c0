"""The corruptions: pixels of imagecorruptions with the same random numbers where that is installed, and what holds of
each by arithmetic."""

import imagecorruptions_here as oracle
import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from sslvit import rng
from sslvit.data.readers import shapes
from sslvit.evaluate.robustness.corruptions import CORRUPTIONS, NAMES, corrupt

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

    uniform, normal, integers = [], [], []
    if name == "gaussian_noise":
        normal = [numbers(rng.normal, key, c, h, w)]
    elif name == "shot_noise":
        uniform = [numbers(rng.uniform, key, c, h, w)]
    elif name == "impulse_noise":
        uniform = [numbers(rng.uniform, rng.fold(key, i), c, h, w) for i in (0, 1)]
    elif name == "glass_blur":
        _, reach, times = CORRUPTIONS[name][1][strength - 1]
        for time in range(times):
            one = rng.integers(rng.fold(key, time), 2 * reach, h, w, 2)[0].numpy() - reach
            rows, columns = (range(n - reach, reach, -1) for n in (h, w))
            integers += [one[row, column] for row in rows for column in columns]
    elif name == "motion_blur":
        uniform = [numbers(rng.uniform, key)]
    elif name == "snow":
        normal = [numbers(rng.normal, rng.fold(key, "flakes"), 1, h, w)]
        uniform = [numbers(rng.uniform, rng.fold(key, "angle"))]
    elif name == "fog":
        side, counted = 1 << (max(h, w) - 1).bit_length(), 0
        for level in range(side.bit_length() - 1):
            for counted in range(counted + 1, counted + 4):  # noqa: B020
                uniform.append(numbers(rng.uniform, rng.fold(key, counted), 2**level, 2**level))
    elif name == "elastic_transform":
        uniform = [numbers(rng.uniform, rng.fold(key, axis), 1, h, w) for axis in ("columns", "rows")]
    return {"uniform": uniform, "normal": normal, "integers": integers}


def differences(name: str, strength: int, size: int = SIZE) -> torch.Tensor:
    theirs, images = oracle.corruptions(), scenes(size)
    picture = Image.fromarray(rearrange((images[0] * 255).byte(), "c h w -> h w c").numpy())
    with oracle.drawing(**draws(name, strength, tuple(images.shape[1:]))):
        expected = torch.from_numpy(np.uint8(getattr(theirs, name)(picture, strength)).copy()).long()
    actual = rearrange(corrupt(images, name, strength, KEY)[0] * 255, "c h w -> h w c")
    return (actual.round().long() - expected).abs()


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_those_of_imagecorruptions(name):
    for strength in (1, 3, 5):
        off = differences(name, strength)
        assert off.max() <= 1, (strength, off.max())
        assert (off > 0).double().mean() < 0.02, strength
