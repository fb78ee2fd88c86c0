"""The pictures of what a model sees show what they are given, and their letters can be read on a phone."""

from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from sslvit.evaluate.seen import ImageMap, NearestPatches, PatchColors
from sslvit.reports import sheets
from sslvit.reports.figures import STOPS
from sslvit.reports.sheets import COLORS, head_sheet, map_sheet, nearest_sheet, patch_sheet
from sslvit.reports.tiles import GAP, INK, font_for, in_rows, tile_size, tiled, wrapped

PHONE = 358  # pixels of a picture on a page of 390


@pytest.mark.parametrize("width", [100, 400, 532, 720, 1200])
def test_letters_are_at_least_eleven_pixels_on_a_phone(width):
    font, line = font_for(width)
    assert font.size * min(1, PHONE / width) >= 11
    assert line > font.size


def test_long_names_are_broken_between_words_and_rows_are_even():
    font, _ = font_for(100)
    lines = wrapped("last layer on image", font, 80)
    assert " ".join(lines) == "last layer on image"
    assert len(lines) == 2
    assert all(font.getlength(line) <= 80 for line in lines)
    for count, lengths in {3: [3], 5: [5], 7: [4, 3], 12: [4, 4, 4], 13: [5, 5, 3], 25: [5] * 5}.items():
        assert [len(row) for row in in_rows([("", None)] * count)] == lengths


def test_a_name_is_written_once_where_rows_have_the_same():
    tile = np.zeros((8, 8, 3), np.uint8)
    once, each = (tiled([[("a", tile)], [(second, tile)]], (128, 128)) for second in ("a", "b"))
    assert once.height < each.height


def test_each_patch_is_one_square_of_its_color():
    colors = torch.linspace(0, 1, 2 * 6 * 3).reshape(2, 6, 3)
    seen = PatchColors(torch.zeros(2, 6), torch.ones(2, 6).bool(), colors, 1 - colors, torch.ones(3))
    width, height = tile_size(16, 24)
    picture = np.asarray(patch_sheet(torch.ones(1, 1, 16, 24), seen, (2, 3)))[-height - GAP : -GAP]
    for column, expected in ((1, colors), (2, 1 - colors)):
        tile = picture[:, GAP + column * (width + GAP) :][:, :width]
        blocks = tile.reshape(2, height // 2, 3, width // 3, 3)
        assert (blocks == blocks[:, :1, :, :1]).all()  # no color between two patches
        assert blocks[:, 0, :, 0].reshape(6, 3).tolist() == (255 * expected[0]).round().int().tolist()


def test_each_head_is_bright_where_it_looks():
    last = torch.zeros(1, 2, 2, 2)
    last[0, 0, 0, 1], last[0, 1, 1, 0] = 0.1, 0.9
    picture = np.asarray(head_sheet(torch.ones(1, 3, 8, 8), last, "the class token attends"))[-128 - GAP : -GAP]
    for head, (row, column) in enumerate([(0, 1), (1, 0)], start=1):
        tile = picture[:, GAP + head * (128 + GAP) :][:, :128].reshape(2, 64, 2, 64, 3)
        assert (tile[row, :, column] == STOPS[-1]).all()
        assert (tile == STOPS[-1]).all(-1).sum() == 64 * 64


def test_a_frame_lies_around_its_patch_and_covers_nothing_of_it():
    images = torch.full((2, 3, 32, 32), 0.5)
    nearest = NearestPatches(torch.tensor([7]), torch.tensor([6]), torch.tensor([0.25]))
    picture = np.asarray(nearest_sheet(images, 5, nearest, (4, 4)))[-128 - GAP : -GAP]
    for i, (row, column) in enumerate([(1, 1), (1, 2)]):
        tile = picture[:, GAP + i * (128 + GAP) :][:, :128]
        inside = tile[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        assert (inside == inside[0, 0]).all()
        assert (tile[32 * row - 1, 32 * column : 32 * column + 32] == [255, 60, 60]).all()
        assert (tile[32 * row - 3, 32 * column : 32 * column + 32] == 0).all()
        assert (tile[64 + 8 :] == inside[0, 0]).all()


def lab(color: tuple[int, int, int]) -> np.ndarray:
    """CIELAB under D65, https://www.w3.org/TR/css-color-4/#color-conversion-code."""
    c = np.array(color) / 255
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ c
    x, y, z = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_colors_of_classes_differ_from_each_other_and_from_the_paper():
    assert len(COLORS) == sheets.NAMED == 12
    for one, other in combinations([*COLORS, (255, 255, 255), INK], 2):
        assert np.linalg.norm(lab(one) - lab(other)) > 20, (one, other)  # 2.3 is the least difference that is seen


def of(picture: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels of a color."""
    return np.argwhere((np.asarray(picture) == color).all(-1))


def test_a_map_places_images_by_both_axes_and_names_a_few_classes():
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    thumbs, labels = torch.ones(3, 3, 8, 8), torch.tensor([4, 7, 9])
    picture = map_sheet(ImageMap(points, "a method"), thumbs, labels, tuple("abcdefghij"))
    square = picture.crop((0, 0, 720, picture.height - 60))  # less the legend
    a, b, c = (of(square, color).mean(0) for color in COLORS[:3])  # rows, columns
    assert b - a == pytest.approx([0, 720 - 2 * 44], abs=2)
    assert c - a == pytest.approx([-(720 - 2 * 44) / 2, 0], abs=2)  # upwards, by the same scale
    for color in COLORS[:3]:
        assert len(of(picture, color)) > len(of(square, color))  # and once in the legend


def test_of_many_classes_or_none_no_color_is_named():
    made = ImageMap(torch.rand(13, 2, generator=torch.Generator().manual_seed(0)), "a method")
    few, many, none = (
        map_sheet(made, torch.ones(13, 1, 8, 8), y) for y in (torch.arange(13) % 12, torch.arange(13), None)
    )
    assert few.height > many.height == none.height
    for picture in (many, none):
        assert not any(len(of(picture, color)) for color in COLORS if len(set(color)) > 1)  # letters have greys


def test_images_on_a_map_do_not_cover_each_other_and_the_others_are_dots():
    places = np.random.default_rng(0).integers(0, 400, (80, 2))
    shown = sheets.apart(places, 50)
    assert 5 < len(shown) < 80
    assert all(abs(places[i] - places[j]).max() >= 50 for i, j in combinations(shown, 2))
    for i in set(range(80)) - set(shown):
        assert min(abs(places[shown] - places[i]).max(1)) < 50
