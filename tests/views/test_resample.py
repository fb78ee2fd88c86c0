"""Crop, resize, flip and blur against torchvision and against closed forms."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as F

from sslvit import rng
from sslvit.views.crop import Crop, centered, draw_crop, resized
from sslvit.views.resample import Blur, Resize, mirrored

MODES = {"bilinear": F.InterpolationMode.BILINEAR, "bicubic": F.InterpolationMode.BICUBIC}
SIZES = [  # of the canvas and of the output
    ((40, 60), (32, 32)),
    ((28, 28), (28, 28)),
    ((300, 200), (96, 96)),
    ((20, 30), (64, 48)),
    ((256, 256), (224, 224)),
]


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def crops(count: int, canvas: tuple[int, int], seed: int = 0) -> Crop:
    extents = torch.tensor(canvas).expand(count, 2)
    return draw_crop(rng.key(seed, torch.arange(count)), extents, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)


def cut(pixels: torch.Tensor, crop: Crop, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """All in one piece, upright, in [0, 1]."""
    resize = Resize(pixels, resized(crop, size), size, interpolation, len(pixels))
    return (resize(slice(0, len(pixels))) / 255).clamp(0, 1).transpose(2, 3)


def theirs(image: torch.Tensor, crop: Crop, row: int, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    box = [int(x[row]) for x in crop[:4]]
    out = F.resized_crop(image, *box, size=list(size), interpolation=MODES[interpolation], antialias=True)
    return out.flip(-1) if crop.flip[row] else out


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize(("canvas", "size"), SIZES)
def test_a_crop_resized_and_flipped_is_torchvisions_on_floats(canvas, size, interpolation):
    """In float64: its float32 is off by 1e-5, because it places the taps in float32."""
    pixels, crop = pictures(8, 3, *canvas), crops(8, canvas)
    ours = cut(pixels, crop, size, interpolation)
    for row, image in enumerate(pixels):
        expected = theirs(image.double() / 255, crop, row, size, interpolation).clamp(0, 1)
        torch.testing.assert_close(ours[row].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize(("canvas", "size"), SIZES)
def test_a_crop_is_torchvisions_on_uint8_up_to_its_rounding(canvas, size, interpolation):
    """On uint8 torchvision rounds and clamps to 0..255 after each axis, not only at the end. The pictures stay away
    from 0 and 255, where the cubic's overshoot would be cut twice: in white noise that makes up to 20/255."""
    pixels, crop = pictures(8, 3, *canvas) // 2 + 64, crops(8, canvas)
    ours = cut(pixels, crop, size, interpolation)
    for row, image in enumerate(pixels):
        error = (255 * ours[row] - theirs(image, crop, row, size, interpolation)).abs()
        assert error.mean() < 0.5
        assert error.max() < 2


def test_one_image_in_a_large_canvas_gives_the_same_bits_as_in_a_batch():
    pixels, crop = pictures(6, 3, 130, 90), crops(6, (130, 90))
    together = cut(pixels, crop, (64, 48), "bicubic")
    resize = Resize(pixels, resized(crop, (64, 48)), (64, 48), "bicubic", 1)
    for row in range(6):
        image = (resize(slice(row, row + 1)) / 255).clamp(0, 1).transpose(2, 3)
        assert torch.equal(image[0], together[row])


@pytest.mark.parametrize("interpolation", MODES)
def test_the_identity_keeps_every_value(interpolation):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    axes = centered(torch.tensor([[16, 16]]), None, (16, 16))
    resized_ = Resize(pixels, axes, (16, 16), interpolation, 1)(slice(0, 1)).transpose(2, 3)
    assert torch.equal(resized_, pixels.float())


def test_the_centre_of_a_resized_image_is_torchvisions():
    extents = torch.tensor([[100, 150], [151, 100], [64, 64], [77, 201]])
    pixels = pictures(4, 3, 160, 210)
    resize = Resize(pixels, centered(extents, (72, 72), (64, 61)), (64, 61), "bicubic", 4)
    ours = (resize(slice(0, 4)) / 255).clamp(0, 1).transpose(2, 3)
    for row, (height, width) in enumerate(extents.tolist()):
        image = pixels[row, :, :height, :width].float() / 255
        whole = F.resize(image, [72], interpolation=MODES["bicubic"], antialias=True)
        torch.testing.assert_close(ours[row], F.center_crop(whole, [64, 61]).clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(28, 28), (32, 40), (96, 96), (224, 224)])
def test_a_blur_is_torchvisions_gaussian(size):
    sigma = torch.tensor([0.1, 0.3, 0.7, 1.0, 1.6, 2.0])
    images = pictures(6, 3, *size) / 255
    ours = Blur(sigma, size, 3)(images.transpose(2, 3).contiguous(), list(range(6)))
    for row, s in enumerate(sigma.tolist()):
        kernel = 2 * math.ceil(4 * s) + 1
        expected = F.gaussian_blur(images[row], [kernel, kernel], [s, s])
        torch.testing.assert_close(ours[row], expected, atol=2e-6, rtol=0)


def test_a_blur_larger_than_the_image_keeps_its_mean_and_never_indexes_outside():
    """8 taps to a side on 5 pixels: torchvision refuses; reflection goes on."""
    walk = [0, 1, 2, 3, 4, 3, 2, 1]
    first, second = mirrored(5, 8, 2).tolist()
    assert first == [[walk[(row + x) % 8] for x in range(-8, 9)] for row in range(5)]
    assert second == [[5 + walk[(row + x) % 8] for x in range(-8, 9)] for row in range(5)]
    assert mirrored(1, 3, 1).tolist() == [[[0] * 7]]
    flat = torch.full((1, 3, 5, 1), 0.25)
    blurred = Blur(torch.tensor([2.0]), (5, 1), 3)(flat.transpose(2, 3).contiguous(), [0])
    torch.testing.assert_close(blurred, flat, atol=1e-6, rtol=0)


def test_a_blurs_bits_do_not_depend_on_wider_blurs_beside_it():
    images = (pictures(4, 3, 33, 27) / 255).transpose(2, 3).contiguous()
    sigma = torch.tensor([0.2, 2.0, 0.9, 1.4])
    blur = Blur(sigma, (33, 27), 3)
    together = blur(images, [0, 1, 2, 3])
    for row in range(4):
        image = images[row : row + 1]
        assert torch.equal(blur(image, [row])[0], together[row])
        assert torch.equal(Blur(sigma[row : row + 1], (33, 27), 3)(image, [0])[0], together[row])


def test_how_far_pillows_blur_is_from_the_gaussian():
    """Pillow's three box blurs, which MoCo v3 and DINO use: within 2 % of full scale on a smooth picture away from
    the border."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    picture = (127.5 + 60 * (x / 4).sin() + 60 * (y / 7).cos()).round().to(torch.uint8)
    for sigma in (0.5, 1.0, 2.0):
        pillow = Image.fromarray(picture.numpy()).filter(ImageFilter.GaussianBlur(sigma))
        ours = Blur(torch.tensor([sigma]), (64, 64), 1)((picture.T / 255)[None, None].contiguous(), [0])
        error = (ours[0, 0] * 255 - torch.from_numpy(np.asarray(pillow).copy())).abs()[10:-10, 10:-10]
        assert error.max() < 0.02 * 255
