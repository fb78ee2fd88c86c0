"""The views as a GPU makes them: the CPU's up to rounding, in few kernels, and nothing waits for the device."""

import math
from dataclasses import replace

import pytest
import torch
from fake_device import FakeDevice, Waits
from torchvision.transforms.v2 import functional as F

from sslvit import rng
from sslvit.processes.device import in_one_copy
from sslvit.views import kernels
from sslvit.views.batching import checked
from sslvit.views.crop import resized
from sslvit.views.kernels import Part, distorted, fitted
from sslvit.views.pretraining import (
    ContrastivePair,
    ContrastiveView,
    CropFlip,
    EqualCrops,
    EvalView,
    MultiCrop,
    StrongPair,
)
from sslvit.views.supervised import SupervisedView


def pictures(count: int, channels: int = 3, height: int = 90, width: int = 77) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, height // 6, width // 6, generator=generator)
    return F.resize(coarse, [height, width], antialias=True).clamp(0, 1).mul(255).to(torch.uint8)


def keys(count: int) -> torch.Tensor:
    return rng.key(0, "views", torch.arange(count))


@pytest.mark.parametrize(
    ("views", "channels"),
    [
        (ContrastivePair(64), 3),
        (ContrastivePair((48, 64), color=False), 5),
        (ContrastivePair(32, color=False), 1),
        (MultiCrop(64, 32, small=4), 3),
        (MultiCrop(32, 32, small=1), 3),
        (StrongPair((48, 64)), 3),
        (EqualCrops(64, 32, small=2), 3),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.size}" if not isinstance(value, int) else str(value),
)
def test_all_views_at_once_are_those_made_one_by_one(views, channels):
    """By other arithmetic: no rows, seven steps of mixing. Images of several sizes on a canvas."""
    pixels, key = pictures(16, channels), keys(16)
    extents = torch.tensor([90, 77]) - torch.arange(16).unsqueeze(-1) % 7
    alone, together = views(pixels, key, extents), views.together(pixels, *checked(pixels, key, extents))
    assert len(alone) == len(together)
    for one, other in zip(alone, together, strict=True):
        assert other.is_contiguous()
        assert one.shape == other.shape
        difference = (one - other).abs()
        # A value within rounding of the threshold may be solarized on either side.
        assert (difference > 1e-5).float().mean() < 1e-4


@pytest.mark.parametrize("size", [64, (48, 40)])
def test_a_view_is_torchvisions_operations_in_the_drawn_order(size):
    """In float64, one sample at a time: every order of the four colour operations occurs."""
    view = replace(ContrastiveView(size), blur=0.5, sigma=(0.3, 1.5), solarize=0.3, grey=0.3)
    pixels, height, width = pictures(200), *pair(size)
    drawn = view.draw(keys(200), torch.tensor([90, 77]).expand(200, 2))
    (ours,) = distorted(pixels, [Part(drawn, (height, width))], view.interpolation)
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    orders = set()
    for row, pixel in enumerate(pixels):
        box = [int(x[row]) for x in drawn.crop[:4]]
        image = F.resized_crop(pixel.double() / 255, *box, [height, width], antialias=True)
        if drawn.jitter.chosen[row]:
            orders.add(tuple(drawn.jitter.order[row].tolist()))
            for place in drawn.jitter.order[row].tolist():
                image = changes[place](image, float(drawn.jitter.factors[row, place]))
        image = F.rgb_to_grayscale(image, 3) if drawn.grey[row] else image
        if drawn.blur[row]:
            sigma = float(drawn.sigma[row])
            image = F.gaussian_blur(image, [2 * math.ceil(4 * sigma) + 1] * 2, [sigma] * 2)
        image = torch.where(image >= 128 / 255, 1 - image, image) if drawn.solarize[row] else image
        image = image.flip(-1) if drawn.crop.flip[row] else image
        assert ((ours[row] - image).abs() > 1e-5).double().mean() < 1e-3
    assert len(orders) == 24


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_is_torchvisions_in_float64(interpolation):
    pixels, view = pictures(16), CropFlip((40, 56), interpolation=interpolation)
    crop = view.draw(keys(16), torch.tensor([90, 77]).expand(16, 2))
    ours = fitted(pixels, resized(crop, (40, 56)), (40, 56), interpolation)
    for row, pixel in enumerate(pixels):
        box, mode = [int(x[row]) for x in crop[:4]], F.InterpolationMode(interpolation)
        image = F.resized_crop(pixel.double() / 255, *box, [40, 56], mode, antialias=True).clamp(0, 1)
        torch.testing.assert_close(ours[row].double(), image.flip(-1) if crop.flip[row] else image, atol=1e-6, rtol=0)


def test_a_sample_is_the_same_to_the_last_bit_in_any_batch():
    views, pixels, key = MultiCrop(33, 17, small=2), pictures(11), keys(11)
    extents = torch.tensor([90, 77]) - torch.arange(11).unsqueeze(-1) % 5
    whole = views.together(pixels, key, extents)
    for row in range(11):
        part = slice(row, row + 1)
        alone = views.together(pixels[part], key[part], extents[part])
        assert all(torch.equal(one[0], many[row]) for one, many in zip(alone, whole, strict=True))


def test_tensors_sent_together_are_those_that_were_sent():
    sent = [torch.tensor([True, False, True]), 5, torch.arange(3, dtype=torch.int32), torch.tensor([7, -(2**40)])]
    sent += [torch.tensor([[0.5, -2.0]]), torch.zeros(0), torch.tensor([[1.5]], dtype=torch.float64).expand(2, 2)]
    there = in_one_copy(sent, torch.device("cpu"))
    assert there.pop(1) == sent.pop(1)
    for one, other in zip(sent, there, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.slow
def test_the_arithmetic_of_a_pair_is_one_graph():
    """torch.compile, without a break, for batches of several sizes, with the same results."""

    def made(pixels, rows, owner, colors, blurs):
        (images,) = kernels.resampled(pixels, rows, owner, "bilinear")
        return kernels.solarized(kernels.blurred(kernels.colored(images, colors), blurs), colors.threshold)

    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    for count in (6, 9):
        pixels, extents = pictures(count), torch.tensor([90, 77]).expand(count, 2)
        drawn = replace(ContrastiveView(32), blur=0.5, solarize=0.5).draw(keys(count), extents)
        rows = kernels.placed(pixels, [(resized(drawn.crop, (32, 32)), (32, 32))], "bilinear")
        owner = kernels.owners(tuple(rows.shapes), pixels.device)
        given = pixels, rows, owner, kernels.plan(drawn, (32, 32), 3), kernels.plan_blurs(drawn, (32, 32))
        torch.testing.assert_close(compiled(*given), made(*given), atol=1e-5, rtol=0)


VIEWS = [
    CropFlip(64), EvalView(64), EvalView(64, 70), ContrastiveView(64), ContrastivePair(64), StrongPair(64),
    MultiCrop(64, 32), EqualCrops(64, 32), SupervisedView.deit(64), SupervisedView.plain_vit(64),
]  # fmt: skip


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: type(view).__name__)
def test_no_view_waits_for_the_device(view):
    """Keys and extents stay on the host. 64 images: every operation is drawn."""
    with FakeDevice() as device:
        pixels = torch.empty(64, 3, 80, 72, dtype=torch.uint8, device="cuda")
        made = view(pixels, keys(64), torch.tensor([80, 72]).expand(64, 2))
        assert {images.device.type for images in made} == {"cuda"}
        assert {images.dtype for images in made} == {torch.float32}
    assert device.kernels.total() > 0


def test_what_waits_is_noticed():
    with FakeDevice():
        there = torch.zeros(3, device="cuda")
        for wait in (
            lambda: there.sum().item(), lambda: there.cpu(), lambda: there[there > 0], lambda: there.nonzero(),
            lambda: torch.tensor([1.0], device="cuda"), lambda: torch.ones(3).to("cuda", non_blocking=True),
            lambda: there[[0, 2]], lambda: there + torch.ones(3)
        ):  # fmt: skip
            with pytest.raises(Waits):
                wait()


@pytest.mark.parametrize(
    ("view", "most"), [(ContrastivePair(224), 150), (MultiCrop(224, 96), 200), (CropFlip(224), 50)]
)
def test_the_views_of_a_batch_are_few_kernels(view, most):
    with FakeDevice() as device:
        view(torch.empty(64, 3, 256, 256, dtype=torch.uint8, device="cuda"), keys(64))
    print(f"{type(view).__name__}: {device.kernels.total()} kernels, {device.host.total()} operations on the host")
    assert device.kernels.total() <= most
