"""The small crops of a recipe: as --crops says, and else of a size that fits the images."""

import pytest

from sslvit.models.vit import ViT
from sslvit.objectives.dino import DINO
from sslvit.views.pretraining import small_crops


@pytest.mark.parametrize(
    ("model", "image_size", "expected"),
    [("mu/4", 32, (16, 16)), ("mu/7", 28, (14, 14)), ("mu/16", 224, (96, 96)), ("mu/14", 224, (98, 98))],
)
def test_alone_a_number_of_small_crops_has_half_the_side_or_96_of_224(model, image_size, expected):
    """96 is no multiple of 14, 98 is the nearest."""
    objective = DINO(ViT.variant(model, image_size=image_size), outputs=8, hidden=8, bottleneck=8)
    usual = objective.default_views(image_size, 3).small_size
    patch = objective.backbone.patch_size
    assert small_crops((4,), usual, patch) == (4, expected)
    assert small_crops((3, 2 * patch[0]), usual, patch) == (3, (2 * patch[0],) * 2)
    assert small_crops((3, patch[0], 2 * patch[0]), usual, patch) == (3, (patch[0], 2 * patch[0]))
    with pytest.raises(ValueError, match=f"--crops 3 {patch[0] + 1}: sides must be multiples"):
        small_crops((3, patch[0] + 1), usual, patch)
