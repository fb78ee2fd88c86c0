"""Segmentation heads: loss and gradients of the linear one against torch's own layers; what the pyramid sees."""

import pytest
import torch
from torch import nn

from sslvit.errors import DataError
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.objective import Batch
from sslvit.objectives.segmentation import Segmentation, feature_maps


def small(**changes) -> ViT:
    sizes = {"image_size": (16, 24), "patch_size": 4, "width": 24, "depth": 3, "heads": 3}
    return ViT(ViTConfig(**(sizes | changes))).double()


def batch(classes=4, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 3, 16, 24, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, classes, (3, 16, 24), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = 255
    return images, masks


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_linear_head_is_torchs_batch_norm_and_convolution(blocks):
    objective = Segmentation(small(), classes=4, blocks=blocks, seed=3).double()
    images, masks = batch()
    norm, classify = nn.BatchNorm2d(24 * blocks).double(), nn.Conv2d(24 * blocks, 4, 1).double()
    classify.load_state_dict(objective.head.classify.state_dict())
    encoded = objective.backbone.intermediate(images, blocks)
    maps = torch.cat([one.patches.transpose(1, 2).reshape(3, 24, 4, 6) for one in encoded], 1)
    scores = nn.functional.interpolate(classify(norm(maps)), (16, 24), mode="bilinear", align_corners=False)
    expected = nn.CrossEntropyLoss(ignore_index=255)(scores, masks)
    (expected_gradient,) = torch.autograd.grad(expected, objective.backbone.patch_embed.proj.weight)

    loss, metrics = objective(Batch((images, masks[:, None].double() / 255), torch.arange(3)), 0.0)
    (gradient,) = torch.autograd.grad(loss, objective.backbone.patch_embed.proj.weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    seen = masks != 255
    assert metrics["accuracy"].item() == pytest.approx((scores.argmax(1) == masks)[seen].double().mean().item())
    assert torch.allclose(objective.head.norm.running_var, norm.running_var)


def test_a_batch_without_any_class_has_no_loss_and_no_gradient():
    objective = Segmentation(small(), classes=4).double()
    images, _ = batch()
    loss, _ = objective(Batch((images, torch.ones(3, 1, 16, 24, dtype=torch.float64)), torch.arange(3)), 0.0)
    loss.backward()
    assert loss.item() == 0
    assert objective.head.classify.weight.grad.abs().max() == 0


def test_every_number_up_to_254_survives_as_a_share_of_255():
    classes = torch.arange(256)
    assert torch.equal(((classes / 255) * 255).round().long(), classes)


def test_the_pyramid_reads_four_blocks_and_is_four_times_as_fine():
    objective = Segmentation(small(depth=8), classes=5, head="pyramid").double()
    assert objective.layers == [1, 3, 5, 7]
    images, _ = batch()
    assert objective.scores(images).shape == (3, 5, 16, 24)
    maps = feature_maps(objective.backbone, images, objective.layers)
    assert maps.shape == (3, 4 * 24, 4, 6)
    last = objective.backbone.feature_map(images)
    assert torch.allclose(maps[:, -24:], last)
    # All levels reach the scores.
    maps = maps.detach().requires_grad_()
    objective.head(maps)[:, 0, 5, 5].sum().backward()
    assert (maps.grad.unflatten(1, (4, 24)).abs().amax((0, 2, 3, 4)) > 0).all()


def test_a_shallow_vit_gives_a_block_to_several_levels():
    objective = Segmentation(small(depth=2), classes=5, head="pyramid").double()
    assert objective.layers == [0, 0, 1, 1]
    images, _ = batch()
    maps = feature_maps(objective.backbone, images, objective.layers)
    assert torch.equal(maps[:, :24], maps[:, 24:48])


def test_one_class_is_refused():
    with pytest.raises(DataError, match="1 class leaves nothing to segment"):
        Segmentation(small(), classes=1)
