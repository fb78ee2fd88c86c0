"""The picture of a confusion matrix shows what it should, for any number of classes."""

import numpy as np
import pytest
import torch
from PIL import Image

from sslvit.reports.confusion import LARGEST, RIGHT, WRONG, draw_confusion


def test_rights_and_wrongs_have_colours_of_their_own_and_rare_ones_are_seen(tmp_path):
    counts = torch.tensor([[90, 10], [0, 0]])  # a class of which there is no image
    draw_confusion(counts, None, tmp_path / "new" / "c.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "c.png")).reshape(-1, 3).astype(int)
    shares = {"right": (0.9, RIGHT), "wrong": (0.1, WRONG)}
    for share, ink in shares.values():
        expected = (255 - share**0.5 * (255 - ink)).astype(int)
        assert (abs(pixels - expected).max(1) <= 1).sum() > 200  # of a cell of 36 x 36, less what the number covers


@pytest.mark.parametrize("classes", [1, 10, 100, 1000, 2000])
def test_a_picture_of_any_number_of_classes_fits_a_screen(classes, tmp_path):
    draw_confusion(torch.eye(classes).long(), tuple("x" * 99 for _ in range(classes)), tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert max(picture.size) <= max(LARGEST, classes) + 200
