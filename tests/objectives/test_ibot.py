"""iBOT against lightly's losses and against the official loop written out, for 20 steps in float64."""

import math

import pytest
import torch
from distillation_twins import Twin, apart, batch_of, train_both, written_out_pairs, written_out_patches
from torch import Tensor

from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.distillation import about_targets
from sslvit.objectives.ibot import IBOT
from sslvit.objectives.objective import Batch
from sslvit.recipes.ibot import PAPER

SIZES = {"outputs": 40, "hidden": 32, "bottleneck": 16}


def small_vit(**changes) -> ViT:
    return ViT(ViTConfig(**({"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 3} | changes)))


def small_ibot(**changes) -> IBOT:
    return IBOT(small_vit(), **({"drop_path": 0.0, "temperature_warmup": 0.5} | SIZES | changes))


class WrittenOut:
    """main_ibot.py, iBOTLoss: both centres move towards the means of this step after it has used the old ones."""

    def __init__(self, objective: IBOT):
        self.of = objective  # the twin's copy, whose centres are moved

    def __call__(self, classes, student, seen, patches, mask, features, temperature) -> Tensor:
        of = self.of
        targets = [((t - of.centre) / temperature).softmax(-1) for t in classes]
        loss = written_out_pairs(targets, [s / 0.1 for s in student])
        patch_targets = [((t[m] - of.patch_centre) / temperature).softmax(-1) for t, m in zip(seen, mask, strict=True)]
        loss = loss + written_out_patches(patch_targets, [s / 0.1 for s in patches])
        of.centre = 0.9 * of.centre + 0.1 * torch.cat(classes).mean(0)
        of.patch_centre = 0.9 * of.patch_centre + 0.1 * torch.cat(seen).mean(0)
        return loss


class Lightlys(WrittenOut):
    def __init__(self, objective: IBOT):
        super().__init__(objective)
        losses = pytest.importorskip("lightly.loss", exc_type=ImportError)
        self.pairs = losses.DINOLoss(output_dim=40, student_temp=0.1, center_momentum=0.9).double()
        self.pairs.center = objective.centre.view(1, 1, -1).clone()
        # Its centre follows the hidden patches, as DINOv2's; iBOT's is moved here, by all patches.
        self.patches = losses.IBOTPatchLoss(output_dim=40, student_temp=0.1, center_momentum=1.0).double()

    def __call__(self, classes, student, seen, patches, mask, features, temperature) -> Tensor:
        of = self.of
        self.patches.center.center = of.patch_centre.view(1, -1)
        loss = self.pairs(classes, student, teacher_temp=temperature)
        hidden = torch.cat([t[m] for t, m in zip(seen, mask, strict=True)])
        loss = loss + self.patches(hidden, torch.cat(patches), mask.unflatten(1, (4, 4)), teacher_temp=temperature)
        of.centre = self.pairs.center.flatten()
        of.patch_centre = 0.9 * of.patch_centre + 0.1 * torch.cat(seen).mean(0)
        return loss


@pytest.mark.parametrize("losses", [WrittenOut, Lightlys])
def test_20_steps_are_the_official_ones_in_float64(losses):
    objective = apart(small_ibot()).double()
    twin = Twin(objective, losses, lr=1e-3)
    twin.losses = losses(twin.networks)
    train_both(objective, twin, 20, lambda batch: objective.hidden(batch.key, (4, 4)), lr=1e-3)


def test_half_the_crops_are_whole_and_a_crop_without_a_mask_counts_as_nothing():
    objective = apart(small_ibot()).double()
    batch = batch_of(b=40)
    hidden = objective.hidden(batch.key, (4, 4))
    assert hidden.mask.shape == (80, 16)
    assert 25 < int((~hidden.mask.any(1)).sum()) < 55
    assert not torch.equal(hidden.mask[:40], hidden.mask[40:])  # each large crop has a mask of its own
    _, metrics = objective(batch, 0.5)
    rows = [i for i in range(80) if hidden.mask[i].any()]
    # The mean over all crops is the mean over those with a mask, times their share.
    with torch.no_grad():
        seen = objective.backbone(torch.cat(batch.views[:2]))
        targets = ((objective.head(seen.patches) - objective.patch_centre) / 0.07).softmax(-1)
        tokens = objective.student.embed(torch.cat(batch.views[:2]))
        tokens[hidden.mask] = objective.mask_token.flatten()
        logits = objective.student_head(objective.student.encode(objective.student.add_positions(tokens)).patches) / 0.1
        each = -(targets * logits.log_softmax(-1)).sum(-1)
        masked = torch.stack([each[i][hidden.mask[i]].mean() for i in rows]).mean()
    assert metrics["patch_loss"].item() == pytest.approx(float(masked) * len(rows) / 80, rel=1e-9)


def test_a_batch_without_any_hidden_patch_has_the_loss_of_the_classes_and_no_gradient_of_the_token():
    objective = small_ibot(mask_ratios=(0.001, 0.002)).double()  # less than a patch
    loss, metrics = objective(batch_of(), 0.5)
    loss.backward()
    assert metrics["hidden"] == 0
    assert metrics["patch_loss"] == 0
    assert loss.item() == pytest.approx(float(metrics["teacher_entropy"] + metrics["divergence"]), rel=1e-12)
    assert not objective.mask_token.grad.any()


def test_a_uniform_teacher_and_student_cost_ln_k_twice_over_where_half_is_masked():
    objective = small_ibot().double()
    with torch.no_grad():
        for head in (objective.head, objective.student_head):
            head.weight_v[:] = head.weight_v[0]
    batch = batch_of(b=8)
    masked = objective.hidden(batch.key, (4, 4)).mask.any(1).double().mean()
    loss, metrics = objective(batch, 0.5)
    assert loss.item() == pytest.approx(math.log(40) * (1 + float(masked)), rel=1e-9)
    assert metrics["patch_teacher_information"].item() == pytest.approx(0, abs=1e-9)
    assert metrics["patch_teacher_outputs"].item() == pytest.approx(40, rel=1e-9)


def test_small_crops_are_whole_and_the_teacher_sees_whole_large_ones():
    objective, batch = apart(small_ibot()).double(), batch_of()
    before = objective.encode(batch, first=2).detach()
    with torch.no_grad():
        objective.mask_token += 1
    torch.testing.assert_close(objective.encode(batch, first=2), before)
    parts = [Batch(tuple(v[s] for v in batch.views), batch.key[s]) for s in (slice(0, 3), slice(3, 6))]
    for part in parts:  # micro-batches: the centres move by the mean over all
        objective(part, 0.3)
    whole = apart(small_ibot()).double()
    whole.mask_token.data += 1
    whole(batch, 0.3)
    for one in (objective, whole):
        one.after_step(0.4)
    torch.testing.assert_close(objective.patch_centre, whole.patch_centre, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(objective.centre, whole.centre, rtol=1e-12, atol=1e-15)


def test_a_teacher_without_hidden_patches_reports_zeros_and_no_nonsense():
    metrics = about_targets(torch.zeros(1, 0, 8), "patch_teacher")
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(
        ("patch_teacher_entropy", "patch_teacher_outputs", "patch_teacher_information"), 0.0
    )


@pytest.mark.parametrize(
    ("vit", "options", "message"),
    [
        ({"class_token": False}, {}, "IBOT reads the class token"),
        ({"image_size": (4, 16)}, {}, "this is 1 x 4 patches"),
        ({}, {"mask_ratios": (0.5, 0.1)}, r"mask_ratios 0.5 0.1: give two shares"),
    ],
)
def test_impossible_arguments_are_refused_with_their_values(vit, options, message):
    with pytest.raises(ValueError, match=message):
        IBOT(small_vit(**vit), **SIZES, **options)


def test_the_papers_rate_is_its():
    assert PAPER.with_rate().lr == pytest.approx(2e-3)  # 5e-4 * 1024 / 256


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("view", [0, 2])
def test_what_is_not_finite_reaches_nothing_when_the_step_is_not_taken(value, view):
    """Attention carries it to the class token, so the loss tells of it wherever it is, hidden or not."""
    objective, spared = small_ibot().double(), small_ibot().double()
    good, bad = batch_of(), batch_of(seed=1)
    bad.views[view][3, 1, 5, 5] = value
    loss, _ = objective(bad, 0.1)
    assert not loss.isfinite()
    for one in (objective, spared):  # the loop goes on with the next batch
        one(good, 0.2)
        one.after_step(0.3)
    for name, tensor in objective.state_dict().items():
        assert torch.equal(tensor, spared.state_dict()[name]), name
        assert tensor.isfinite().all(), name
