"""Views: whose draws, which bits, and what each view is made of."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sslvit import rng
from sslvit.config import ImagesConfig
from sslvit.views import batching
from sslvit.views.crop import Crop, draw_crop
from sslvit.views.pretraining import (
    ContrastivePair,
    ContrastiveView,
    CropFlip,
    EvalView,
    MultiCrop,
    StrongPair,
    eval_view,
)
from sslvit.views.supervised import SupervisedView

VIEWS = {
    "light": lambda size: CropFlip(size),
    "moco_v3": lambda size: ContrastivePair(size),
    "dino": lambda size: MultiCrop(size, size // 2, small=2),
    "deit": lambda size: SupervisedView.deit(size),
    "plain_vit": lambda size: SupervisedView.plain_vit(size),
    "plain": lambda size: EvalView(size),
    "centre": lambda size: EvalView(size, resize=size + 5),
}


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def keys(count: int, epoch: int = 0) -> torch.Tensor:
    return rng.key(0, "views", epoch, torch.arange(count))


def rows(draw) -> torch.Tensor:
    """Everything that was drawn, a row per sample."""
    if isinstance(draw, torch.Tensor):
        return draw.reshape(len(draw), -1).double()
    return torch.cat([rows(part) for part in draw if part is not None], dim=-1)


# Which draws


@pytest.mark.parametrize(
    ("canvas", "scale"),
    [((64, 48), (0.08, 1.0)), ((64, 48), (0.05, 0.25)), ((30, 150), (0.2, 1.0))],
)
def test_boxes_are_distributed_as_torchvisions(canvas, scale):
    """20,000 draws each. In the last case ten tries often fail."""
    stats = pytest.importorskip("scipy.stats")
    count = 20_000
    extents = torch.tensor(canvas).expand(count, 2)
    ours = draw_crop(keys(count), extents, scale, (3 / 4, 4 / 3), 0.5)
    torch.manual_seed(0)
    crop, image = v2.RandomResizedCrop(8, scale, antialias=True), torch.empty(1, *canvas)
    theirs = [crop.make_params([image]) for _ in range(count)]
    for name in ("top", "left", "height", "width"):
        assert stats.ks_2samp(getattr(ours, name), [draw[name] for draw in theirs]).pvalue > 0.01
    areas = [draw["height"] * draw["width"] for draw in theirs]
    assert stats.ks_2samp(ours.height * ours.width, areas).pvalue > 0.01
    assert stats.binomtest(int(ours.flip.sum()), count, 0.5).pvalue > 0.01


def test_when_no_try_fits_the_largest_central_box_is_taken_as_torchvision_takes_it():
    for canvas in ((16, 400), (401, 16), (7, 7)):
        scale = (5.0, 6.0) if canvas == (7, 7) else (0.5, 1.0)
        ours = draw_crop(keys(5), torch.tensor(canvas).expand(5, 2), scale, (3 / 4, 4 / 3), 0.5)
        theirs = v2.RandomResizedCrop(8, scale, antialias=True).make_params([torch.empty(1, *canvas)])
        for name in ("top", "left", "height", "width"):
            assert getattr(ours, name).tolist() == [theirs[name]] * 5


def test_probabilities_and_sigmas_are_moco_v3s():
    stats = pytest.importorskip("scipy.stats")
    count = 20_000
    extents = torch.tensor([32, 32]).expand(count, 2)
    for number, blur, solarize in ((0, 1.0, 0.0), (1, 0.1, 0.2)):
        draw = ContrastivePair(224).views[number].draw(rng.fold(keys(count), "view", number), extents)
        assert stats.kstest(draw.sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 0.01
        for flags, expected in (
            (draw.blur, blur),
            (draw.solarize, solarize),
            (draw.grey, 0.2),
            (draw.jitter.chosen, 0.8),
        ):
            assert stats.binomtest(int(flags.sum()), count, expected).pvalue > 0.01


@pytest.mark.parametrize(
    ("view", "reach"),
    [
        (ContrastivePair(32).views[0], (0.4, 0.4, 0.2, 0.1)),  # MoCo v3's, BYOL's and VICReg's
        (StrongPair(32).views[0], (0.8, 0.8, 0.8, 0.2)),  # SimCLR's color_jitter at strength 1
        (StrongPair(32, strength=0.5).views[1], (0.4, 0.4, 0.4, 0.1)),
        (StrongPair(32, color=False).views[1], (0.8, 0.8, 0.0, 0.0)),
    ],
    ids=["moco_v3", "simclr", "simclr at half strength", "simclr without colour"],
)
def test_colours_change_by_as_much_as_the_papers_say(view, reach):
    count = 20_000
    factors = view.draw(keys(count), torch.tensor([32, 32]).expand(count, 2)).jitter.factors
    for number, (most, centre) in enumerate(zip(reach, (1, 1, 1, 0), strict=True)):
        assert factors[:, number].min() == pytest.approx(centre - most, abs=1e-3)
        assert factors[:, number].max() == pytest.approx(centre + most, abs=1e-3)


# What the released code gives each augmentation, in one view each: MoCo v3's main_moco.py, DINO's main_dino.py.
MOCO_V3_PAIR = (
    {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 1.0, "solarize": 0.0},
    {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 0.1, "solarize": 0.2},
)
DINO_CROPS = (*MOCO_V3_PAIR, MOCO_V3_PAIR[0] | {"blur": 0.5}, MOCO_V3_PAIR[0] | {"blur": 0.5})


@pytest.mark.parametrize(
    ("views", "chances"),
    [(ContrastivePair(32), MOCO_V3_PAIR), (MultiCrop(32, 16, small=2), DINO_CROPS)],
    ids=["moco_v3", "dino"],
)
def test_two_augmentations_are_independent_with_their_probabilities(views, chances):
    """Of one view and of different views of an image, in 40,000 images; sigma, too, knows nothing of what is chosen."""
    count = 40_000
    extents, happened, expected, sigmas = torch.tensor([32, 32]).expand(count, 2), {}, {}, []
    for number, (view, chance) in enumerate(zip(views.views, chances, strict=True)):
        draw = view.draw(rng.fold(keys(count), "view", number), extents)
        flags = {"flip": draw.crop.flip, "jitter": draw.jitter.chosen, "grey": draw.grey}
        flags |= {"blur": draw.blur, "solarize": draw.solarize}
        happened |= {(number, name): flag for name, flag in flags.items()}
        expected |= {(number, name): p for name, p in chance.items()}
        sigmas.append((draw.sigma - view.sigma[0]) / (view.sigma[1] - view.sigma[0]))
    for one, other in itertools.combinations(happened, 2):
        product = expected[one] * expected[other]
        together = (happened[one] & happened[other]).double().mean().item()
        assert abs(together - product) <= 5 * math.sqrt(product * (1 - product) / count), (one, other)
    for (number, name), flag in happened.items():
        for sigma in sigmas:
            if 0 < expected[number, name] < 1:  # a mean of uniform numbers, of deviation 1 / sqrt(12)
                error = abs(sigma[flag].double().mean().item() - 0.5)
                assert error <= 5 / math.sqrt(12 * flag.sum()), (number, name)


def test_flipping_and_erasing_are_independent_with_deits_probabilities():
    count, view = 40_000, SupervisedView.deit(32)
    draw = view.draw(rng.fold(keys(count), "view", 0), torch.tensor([32, 32]).expand(count, 2))
    for together, product in (
        (draw.crop.flip & draw.erasing.chosen, 0.125),
        (draw.crop.flip & ~draw.erasing.chosen, 0.375),
    ):
        assert abs(together.double().mean().item() - product) <= 5 * math.sqrt(product * (1 - product) / count)


def test_no_two_of_ten_thousand_draws_are_equal():
    """Five epochs of 1,000 samples of two views: no draw is like another, in any real number of it."""
    extents = torch.tensor([224, 224]).expand(1000, 2)
    draws = [
        view.draw(rng.fold(keys(1000, epoch), "view", number), extents)
        for epoch in range(5)
        for number, view in enumerate((ContrastiveView(224), ContrastiveView(224)))
    ]
    assert len(torch.cat([rows(draw) for draw in draws]).unique(dim=0)) == 10_000
    factors = torch.cat([draw.jitter.factors for draw in draws])
    assert len(factors.unique(dim=0)) == 10_000
    boxes = torch.cat([torch.stack(draw.crop[:4], dim=-1) for draw in draws])
    assert len(boxes.unique(dim=0)) > 9_990  # whole numbers: some meet by chance


# Which bits


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [27, 32, 49])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_the_same_to_the_last_bit_in_any_batch(name, size, channels):
    """Alone, in other company, in reversed order, on two threads, in other pieces; odd sizes leave vectors unfilled."""
    view, count = VIEWS[name](size), 11
    pixels, key = pictures(count, channels, size + 9, size + 4), keys(count)
    extents = torch.tensor([size + 9, size + 4]) - torch.arange(count).unsqueeze(-1) % 5
    together = view(pixels, key, extents)
    alone = [view(pixels[i : i + 1], key[i : i + 1], extents[i : i + 1]) for i in range(count)]
    backwards = view(pixels.flip(0), key.flip(0), extents.flip(0))
    for number, images in enumerate(together):
        assert torch.equal(images, torch.cat([views[number] for views in alone]))
        assert torch.equal(images, backwards[number].flip(0))


@pytest.mark.parametrize(("size", "count"), [(32, 60), (96, 12), (224, 3)])
@pytest.mark.parametrize("name", ["light", "moco_v3", "deit"])
def test_neither_threads_nor_pieces_change_a_bit(name, size, count, monkeypatch):
    view, pixels, key = VIEWS[name](size), pictures(count, 3, size, size), keys(count)
    expected = view(pixels, key)
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        got = view(pixels, key)
        torch.set_num_threads(threads)
        assert all(map(torch.equal, got, expected))
    for piece, large in ((1 << 16, 1 << 16), (1 << 18, 1), (1 << 25, 1 << 25)):
        monkeypatch.setattr(batching, "PIECE", piece)
        monkeypatch.setattr(batching, "LARGE", large)
        assert all(map(torch.equal, view(pixels, key), expected))


@pytest.mark.parametrize("name", VIEWS)
def test_pixels_outside_the_extents_are_never_seen(name):
    pixels, extents = pictures(4, 3, 60, 70), torch.tensor([[40, 30], [20, 70], [60, 25], [33, 33]])
    dirty = pixels.clone()
    for image, (height, width) in zip(dirty, extents.tolist(), strict=True):
        image[:, height:] = 255
        image[:, :, width:] = 255
    assert all(map(torch.equal, VIEWS[name](32)(pixels, keys(4), extents), VIEWS[name](32)(dirty, keys(4), extents)))


@pytest.mark.parametrize("name", VIEWS)
def test_a_larger_canvas_changes_no_bit(name):
    """Not even one so large that each of its samples is a piece of its own."""
    pixels = pictures(4, 3, 50, 61)
    extents = torch.tensor([[50, 61], [40, 30], [33, 61], [50, 17]])
    canvas = torch.zeros(4, 3, 170, 200, dtype=torch.uint8)
    canvas[:, :, :50, :61] = pixels
    assert all(map(torch.equal, VIEWS[name](32)(pixels, keys(4), extents), VIEWS[name](32)(canvas, keys(4), extents)))


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_floats_in_0_1_of_their_size(name):
    for size in (28, 64):
        for images in VIEWS[name](size)(pictures(8, 3, 50, 40), keys(8)):
            assert images.dtype == torch.float32
            assert images.shape[:2] == (8, 3)
            assert images.shape[2] in (size, size // 2)
            assert 0 <= images.min() <= images.max() <= 1


def test_epochs_and_views_differ_and_a_key_repeats():
    pixels = pictures(8, 3, 32, 32)
    first, second = ContrastivePair(32)(pixels, keys(8))
    assert not torch.equal(first, second)
    assert torch.equal(first, ContrastivePair(32)(pixels, keys(8))[0])
    assert not torch.equal(first, ContrastivePair(32)(pixels, keys(8, epoch=1))[0])


# What a view is made of


@pytest.mark.parametrize(("size", "number"), [(32, 0), (32, 1), (96, 0), (64, 1)])
def test_a_moco_v3_view_is_torchvisions_operations_in_its_order(size, number):
    """Float images, the drawn parameters, one sample at a time."""
    view = ContrastivePair(size).views[number]
    view = dataclasses.replace(view, solarize=0.0 if number == 0 else 0.5, blur=max(view.blur, 0.5))
    pixels, extents = pictures(24, 3, 80, 100), torch.tensor([80, 100]).expand(24, 2)
    draw = view.draw(rng.fold(keys(24), "view", number), extents)
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    ours, solarized = view.apply(pixels, draw), 0
    for row, pixel in enumerate(pixels):
        box = [int(x[row]) for x in draw.crop[:4]]
        image = F.resized_crop(pixel.double() / 255, *box, [size, size], F.InterpolationMode.BILINEAR, antialias=True)
        if draw.jitter.chosen[row]:
            for place in draw.jitter.order[row].tolist():
                image = changes[place](image, float(draw.jitter.factors[row, place]))
        if draw.grey[row]:
            image = F.rgb_to_grayscale(image, 3)
        if draw.blur[row]:
            sigma = float(draw.sigma[row])
            image = F.gaussian_blur(image, [2 * math.ceil(4 * sigma) + 1] * 2, [sigma] * 2)
        if draw.solarize[row]:
            image = torch.where(image >= 128 / 255, 1 - image, image)
            solarized += 1
        if draw.crop.flip[row]:
            image = image.flip(-1)
        error = (ours[row] - image).abs()
        # A pixel within rounding of the threshold may fall on either side of it.
        assert (error > 1e-5).double().mean() < (1e-3 if draw.solarize[row] else 1e-9)
    assert solarized > 0 or number == 0


def test_a_moco_v3_view_is_near_torchvisions_uint8_pipeline():
    """Which truncates after each of its seven operations: below 3/255 in the mean, on smooth pictures."""
    view = ContrastivePair(64).views[0]
    noise = torch.rand(16, 3, 12, 15, generator=torch.Generator().manual_seed(0))
    pixels = (F.resize(noise, [80, 100], antialias=True) * 255).to(torch.uint8)
    draw = view.draw(keys(16), torch.tensor([80, 100]).expand(16, 2))
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    ours, errors = view.apply(pixels, draw), []
    for row, image in enumerate(pixels):
        image = F.resized_crop(image, *[int(x[row]) for x in draw.crop[:4]], [64, 64], antialias=True)
        if draw.jitter.chosen[row]:
            for place in draw.jitter.order[row].tolist():
                image = changes[place](image, float(draw.jitter.factors[row, place]))
        image = F.rgb_to_grayscale(image, 3) if draw.grey[row] else image
        sigma = float(draw.sigma[row])
        image = F.gaussian_blur(image, [2 * math.ceil(4 * sigma) + 1] * 2, [sigma] * 2)
        image = image.flip(-1) if draw.crop.flip[row] else image
        errors.append((255 * ours[row] - image).abs())
    assert torch.stack(errors).mean() < 3


def test_a_wide_view_is_torchvisions_whose_boxes_know_nothing_of_its_shape():
    """RandomResizedCrop((h, w)) draws boxes of 3:4 to 4:3, and resizes them to h x w."""
    pixels, view = pictures(64, 3, 90, 120), CropFlip((16, 40), ratio=(3 / 4, 4 / 3))
    crop = view.draw(keys(64), torch.tensor([90, 120]).expand(64, 2))
    ours = view.apply(pixels, crop)
    assert ours.shape == (64, 3, 16, 40)
    square = CropFlip(32).draw(keys(64), torch.tensor([90, 120]).expand(64, 2))
    assert all(torch.equal(a, b) for a, b in zip(crop, square, strict=True))
    assert 0.73 < (crop.width / crop.height).min() < (crop.width / crop.height).max() < 1.37
    for row, pixel in enumerate(pixels):
        box, mode = [int(x[row]) for x in crop[:4]], F.InterpolationMode.BICUBIC
        image = F.resized_crop(pixel.double() / 255, *box, [16, 40], mode, antialias=True).clamp(0, 1)
        torch.testing.assert_close(ours[row].double(), image.flip(-1) if crop.flip[row] else image, atol=1e-5, rtol=0)


def test_dino_gives_two_large_views_and_the_small_ones():
    view = MultiCrop(64, 32, small=3, scale=(0.25, 1.0), small_scale=(0.05, 0.25))
    views = view(pictures(2, 3, 80, 80), keys(2))
    assert [images.shape[-1] for images in views] == [64, 64, 32, 32, 32]
    assert [v.blur for v in view.views] == [1.0, 0.1, 0.5, 0.5, 0.5]
    assert [v.solarize for v in view.views] == [0.0, 0.2, 0.0, 0.0, 0.0]
    assert len({tuple(images.flatten().tolist()) for images in views[2:]}) == 3


def test_plain_views_of_the_right_size_are_the_pixels():
    pixels = pictures(3, 3, 32, 32)
    assert torch.equal(EvalView(32)(pixels, keys(3))[0], pixels / 255)
    assert torch.equal(EvalView(32, resize=32)(pixels, keys(3))[0], pixels / 255)
    canvas = pictures(3, 3, 40, 40)
    assert torch.equal(EvalView(32)(canvas, keys(3), torch.full((3, 2), 32))[0], canvas[:, :, :32, :32] / 255)


def test_a_light_view_of_two_channels_or_five_is_the_same_crop_of_each():
    pixels = pictures(4, 3, 40, 40)
    (three,) = CropFlip(32)(pixels, keys(4))
    (five,) = CropFlip(32)(torch.cat([pixels, pixels[:, :2]], 1), keys(4))
    assert torch.equal(five, torch.cat([three, three[:, :2]], 1))


def test_colours_that_five_channels_do_not_have_are_refused_by_name():
    pixels = pictures(2, 5, 40, 40)
    with pytest.raises(ValueError, match="saturation and hue and grey mean nothing on 5 channels"):
        ContrastivePair(32)(pixels, keys(2))
    view = ContrastiveView(32, strengths=(0.4, 0.4, 0.0, 0.0), grey=0.0, blur=0.5, solarize=0.2)
    assert view(pixels, keys(2))[0].shape == (2, 5, 32, 32)


@pytest.mark.parametrize(
    ("views", "sizes"), [(ContrastivePair(32), (32, 32)), (MultiCrop(32, 16, small=2), (32, 32, 16, 16))]
)
def test_without_color_pairs_and_crops_accept_five_channels_and_are_otherwise_equal(views, sizes):
    pixels, plain = pictures(4, 5, 40, 40), dataclasses.replace(views, color=False)
    made = plain(pixels, keys(4))
    assert [view.shape for view in made] == [(4, 5, size, size) for size in sizes]
    for with_colour, without in zip(views.views, plain.views, strict=True):
        assert without == dataclasses.replace(with_colour, strengths=(0.4, 0.4, 0.0, 0.0), grey=0.0)


def test_what_is_not_a_batch_is_refused_with_its_shape():
    pixels, key = pictures(2, 3, 8, 8), keys(2)
    with pytest.raises(ValueError, match="float32"):
        CropFlip(8)(pixels / 255, key)
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        CropFlip(8)(pixels[0], key)
    with pytest.raises(ValueError, match="2 images need as many keys"):
        ContrastivePair(8)(pixels, keys(3))
    with pytest.raises(ValueError, match="leave the canvas"):
        EvalView(8)(pixels, key, torch.tensor([[8, 9], [8, 8]]))
    with pytest.raises(ValueError, match="leaves no centre"):
        EvalView(8, resize=7)(pixels, key)


@pytest.mark.parametrize("name", VIEWS)
def test_an_image_of_one_pixel_is_one_colour(name):
    for images in VIEWS[name](16)(torch.full((2, 3, 1, 1), 77, dtype=torch.uint8), keys(2)):
        if name in ("light", "plain", "centre"):
            assert torch.equal(images, torch.full_like(images, 77 / 255))
        assert images.isfinite().all()


# The evaluation view


def steps(height: int, width: int) -> torch.Tensor:
    """A picture with edges in both directions and a slope: c H W"""
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    planes = [(y // 9 + x // 7) % 2 * 200 + 20, 255 * y // height + 0 * x, 255 * x // width + 0 * y]
    return torch.stack(planes).to(torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (256, 256), (301, 1000), (120, 90), (224, 224)])
def test_photographs_are_evaluated_on_torchvisions_center_crop_of_224_out_of_256(height, width):
    picture = steps(height, width)
    resize = v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    theirs = v2.CenterCrop(224)(resize(picture.double() / 255)).clamp(0, 1)
    (ours,) = eval_view(224)(picture[None], keys(1))
    assert (ours[0] - theirs).abs().max() < 2e-3
    (squeezed,) = eval_view(224, 0)(picture[None], keys(1))
    whole = v2.functional.resize(picture.double() / 255, [224, 224], v2.InterpolationMode.BICUBIC, antialias=True)
    assert (squeezed[0] - whole.clamp(0, 1)).abs().max() < 2e-3


@pytest.mark.parametrize(("size", "wanted"), [(224, 256), (192, 219), (384, 438), (97, 110), (96, 96), (32, 32)])
def test_0875_of_the_shorter_side_is_kept_above_96_pixels_and_all_of_it_up_to_there(size, wanted):
    """219 and 438 are DeiT's int(256 / 224 * size)."""
    assert eval_view(size) == EvalView(size, resize=(wanted, wanted))


@pytest.mark.parametrize("side", [28, 32, 64, 96])
def test_thumbnails_of_the_size_are_evaluated_as_they_are(side):
    pixels = pictures(3, 3, side, side)
    assert torch.equal(eval_view(side)(pixels, keys(3))[0], pixels / 255)


def test_a_crop_of_one_keeps_the_centre_square_of_an_oblong_picture():
    picture = steps(40, 60)
    (ours,) = eval_view(40, 1)(picture[None], keys(1))
    assert torch.equal(ours[0], picture[:, :, 10:50] / 255)


def test_an_oblong_size_is_covered_by_the_smallest_picture_that_does():
    picture = steps(100, 100)
    (ours,) = eval_view((25, 50), 1)(picture[None], keys(1))
    theirs = F.center_crop(
        F.resize(picture.double() / 255, [50, 50], F.InterpolationMode.BICUBIC, antialias=True), [25, 50]
    )
    assert (ours[0] - theirs.clamp(0, 1)).abs().max() < 2e-3


@pytest.mark.parametrize("kept", [-0.1, 0.01, 1.1, 224.0, math.nan])
def test_what_is_no_share_of_a_side_is_refused(kept):
    with pytest.raises(ValueError, match=r"--eval_crop is .*from 0\.1 to 1, or 0"):
        eval_view(224, kept)


# How large a canvas the smallest crops need


@pytest.mark.parametrize(
    ("view", "size", "share"),
    [
        (CropFlip(224), 224, 0.2),
        (ContrastivePair(224), 224, 0.08),
        (MultiCrop(224, 96), 96, 0.05),
        (MultiCrop(224, 32), 224, 0.4),
        (SupervisedView(224), 224, 0.05),
        (SupervisedView.deit(224), 224, 0.08),
    ],
)
def test_on_its_canvas_the_smallest_crop_of_a_4_3_photograph_has_the_views_pixels(view, size, share):
    assert view.canvas % 32 == 0
    assert share * view.canvas * 3 / 4 * view.canvas >= size**2
    assert share * (view.canvas - 32) * 3 / 4 * (view.canvas - 32) < size**2


def test_on_its_canvas_an_8_percent_crop_is_nearly_as_sharp_as_torchvisions(
    tmp_path,
):
    """Of 1600 x 1200 pixels, by the mean step between neighbouring pixels of the view. The default canvas of 512 leaves
    less than half of that."""
    noise = torch.rand(3, 600, 800, generator=torch.Generator().manual_seed(0)).round()  # squares of 2 x 2 pixels
    picture = (noise.repeat_interleave(2, 1).repeat_interleave(2, 2) * 255).to(torch.uint8)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "0.png")
    top, left, height, width = box = (300, 500, 350, 450)  # 8.2 %
    theirs = F.resized_crop(picture.double() / 255, *box, [224, 224], F.InterpolationMode.BICUBIC, antialias=True)
    steps = {}
    for canvas in (None, CropFlip(224, scale=(0.08, 1.0)).canvas, 1600):
        samples = ImagesConfig(data=str(tmp_path), canvas=canvas).source().read(np.arange(1))
        scale = samples.extents[0, 1].item() / 1600
        part = [torch.tensor([round(scale * x)]) for x in (top, left, height, width)]
        (ours,) = CropFlip(224).apply(samples.pixels, Crop(*part, flip=torch.tensor([False])))
        steps[canvas] = (ours.diff(dim=-1).abs().mean() / theirs.clamp(0, 1).diff(dim=-1).abs().mean()).item()
        if canvas == 1600:  # nothing is reduced
            assert (ours - theirs.clamp(0, 1)).abs().max() < 2e-3
    assert steps[1600] == pytest.approx(1, abs=1e-3)
    assert steps[928] > 0.75
    assert steps[None] < 0.5
