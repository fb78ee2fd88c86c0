"""DINOv2 against lightly's three losses and against its formulas written out, for 20 steps in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distillation_twins import Twin, apart, batch_of, train_both, written_out_pairs, written_out_patches
from torch import Tensor

from sslvit import rng
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.dinov2 import DINOv2
from sslvit.objectives.gram import gram_loss
from sslvit.objectives.koleo import nearest
from sslvit.objectives.sinkhorn import sinkhorn
from sslvit.recipes.dinov2 import PAPER
from sslvit.training.optim import parameter_groups

SIZES = {"outputs": 40, "hidden": 32, "bottleneck": 16}


def small_vit(**changes) -> ViT:
    return ViT(ViTConfig(**({"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 3} | changes)))


def small_dinov2(**changes) -> DINOv2:
    return DINOv2(small_vit(), **({"drop_path": 0.0, "temperature_warmup": 0.5} | SIZES | changes))


def knopp(logits: Tensor, temperature: float) -> Tensor:
    """sinkhorn_knopp_teacher of dinov2/loss: a K x B matrix whose rows and columns are normalised in turn."""
    q = np.exp(logits.numpy() / temperature).T
    outputs, samples = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= outputs * q.sum(1, keepdims=True)
        q /= samples * q.sum(0, keepdims=True)
    return torch.from_numpy(q.T * samples)


def written_out_koleo(features: Tensor) -> Tensor:
    """koleo_loss.py in double loops."""
    unit = [x / x.square().sum().sqrt() for x in features]
    logs = []
    for i, x in enumerate(unit):
        distances = torch.stack([(x - y + 1e-8).square().sum().sqrt() for j, y in enumerate(unit) if j != i])
        logs.append((distances.min() + 1e-8).log())
    return -torch.stack(logs).mean()


class WrittenOut:
    """ssl_meta_arch.py: 1 / 18 of each pair with 8 small crops, that is, the mean; patches; KoLeo of each crop."""

    def __init__(self, objective: DINOv2):
        self.of = objective

    def __call__(self, classes, student, seen, patches, mask, features, temperature) -> Tensor:
        of = self.of
        hidden = [t[m] for t, m in zip(seen, mask, strict=True)]
        counts = [len(each) for each in hidden]
        if of.assignment == "sinkhorn":
            targets = list(knopp(torch.cat(classes), temperature).chunk(2))
            patch_targets = list(knopp(torch.cat(hidden), temperature).split(counts))
        else:
            targets = [((t - of.centre) / temperature).softmax(-1) for t in classes]
            patch_targets = [((t - of.patch_centre) / temperature).softmax(-1) for t in hidden]
            of.centre = 0.9 * of.centre + 0.1 * torch.cat(classes).mean(0)
            of.patch_centre = 0.9 * of.patch_centre + 0.1 * torch.cat(hidden).mean(0)
        loss = written_out_pairs(targets, [s / 0.1 for s in student])
        loss = loss + written_out_patches(patch_targets, [s / 0.1 for s in patches])
        return loss + 0.1 * sum(written_out_koleo(crop) for crop in features)


class Lightlys(WrittenOut):
    def __init__(self, objective: DINOv2):
        super().__init__(objective)
        losses = pytest.importorskip("lightly.loss", exc_type=ImportError)
        if objective.assignment == "sinkhorn":
            pytest.skip("lightly's two losses centre")
        self.pairs = losses.DINOLoss(output_dim=40, student_temp=0.1).double()
        self.patches = losses.IBOTPatchLoss(output_dim=len(objective.patch_centre), student_temp=0.1).double()
        self.pairs.center = objective.centre.view(1, 1, -1).clone()
        self.patches.center.center = objective.patch_centre.view(1, -1).clone()
        self.koleo = losses.KoLeoLoss()

    def __call__(self, classes, student, seen, patches, mask, features, temperature) -> Tensor:
        loss = self.pairs(classes, student, teacher_temp=temperature)
        hidden = torch.cat([t[m] for t, m in zip(seen, mask, strict=True)])
        loss = loss + self.patches(hidden, torch.cat(patches), mask.unflatten(1, (4, 4)), teacher_temp=temperature)
        self.of.centre, self.of.patch_centre = self.pairs.center.flatten(), self.patches.center.value.flatten()
        return loss + 0.1 * sum(self.koleo(crop) for crop in features)


@pytest.mark.parametrize("losses", [WrittenOut, Lightlys])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_head": (28, 12, 36)},
        {"assignment": "sinkhorn"},
        {"assignment": "sinkhorn", "patch_head": (28, 12, 36)},
    ],
    ids=["shared head", "two heads", "Sinkhorn", "Sinkhorn, two heads"],
)
def test_20_steps_are_the_official_ones_in_float64(losses, options):
    objective = apart(small_dinov2(**options)).double()
    twin = Twin(objective, losses, lr=1e-3)
    twin.losses = losses(twin.networks)
    train_both(objective, twin, 20, lambda batch: objective.hidden(batch.key, (4, 4)), lr=1e-3)


def test_sinkhorn_is_swavs_in_lightly():
    swav = pytest.importorskip("lightly.loss.swav_loss", exc_type=ImportError)
    logits = rng.normal(rng.key(0), 30, 12).double() / 3
    theirs = swav.sinkhorn(logits, iterations=3, epsilon=0.06)
    torch.testing.assert_close(sinkhorn(logits, 0.06), theirs, rtol=1e-9, atol=1e-15)


def test_sinkhorn_uses_outputs_equally_and_gives_each_sample_one():
    logits = rng.normal(rng.key(1), 64, 8).double()
    logits[:, 0] += 5  # which a softmax would give to all
    shares = sinkhorn(logits, 1.0, rounds=50)
    torch.testing.assert_close(shares.sum(1), torch.ones(64).double())
    torch.testing.assert_close(shares.sum(0), torch.full((8,), 8.0).double(), rtol=1e-3, atol=0)
    assert logits.softmax(-1).sum(0)[0] > 50
    assert sinkhorn(torch.zeros(0, 8), 0.04).shape == (0, 8)
    large = torch.tensor([[1000.0, 999.9], [999.9, 1000.0]])  # e^25000 would overflow
    torch.testing.assert_close(sinkhorn(large, 0.04), sinkhorn(large - 1000, 0.04), rtol=1e-3, atol=0)


def test_the_nearest_other_one_is_of_the_same_group():
    points = torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [1, 0.1], [-1, 0], [-1, 0.2], [3, 3]]).double()
    root = math.sqrt(2)
    unit = F.normalize(points, dim=-1)
    near = float((unit[2] - unit[0]).norm())
    expected = {7: [near, float((unit[1] - unit[6]).norm()), 0.0, 0.0], 2: [root, root, 0.0, 0.0], 8: [near]}
    for group, distances in expected.items():
        torch.testing.assert_close(nearest(points, group)[: len(distances)].tolist(), distances, atol=1e-7, rtol=1e-7)
    assert len(nearest(points, 2)) == 6  # the seventh is alone
    assert len(nearest(points[:1], 64)) == 0


def test_koleo_is_of_the_class_token_before_the_head_and_pushes_neighbours_apart():
    objective = apart(small_dinov2(koleo_weight=1.0, patch_weight=0.0)).double()
    other = apart(small_dinov2(koleo_weight=0.0, patch_weight=0.0)).double()
    batch = batch_of(b=6)
    (with_it, metrics), (without, _) = objective(batch, 0.5), other(batch, 0.5)
    torch.testing.assert_close(with_it - without, metrics["koleo"])
    objective.zero_grad()
    (with_it - 0.0).backward()
    head = objective.student_head.mlp[0].weight.grad.clone()
    without.backward()
    torch.testing.assert_close(head, other.student_head.mlp[0].weight.grad)  # the head does not see it
    assert not torch.allclose(objective.student.norm.weight.grad, other.student.norm.weight.grad)


def written_out_gram(patches: Tensor, anchor: Tensor) -> Tensor:
    """Pair by pair; how many cosines are negative does not matter."""
    terms = []
    for ours, theirs in zip(patches, anchor, strict=True):
        for i in range(len(ours)):
            for j in range(len(ours)):
                cosines = [x[i] @ x[j] / (x[i] @ x[i] * (x[j] @ x[j])).sqrt() for x in (ours, theirs)]
                terms.append((cosines[0] - cosines[1]) ** 2)
    return torch.stack(terms).mean()


def test_gram_anchoring_holds_the_cosines_of_masked_patches_to_those_of_whole_crops():
    options = {"gram_start": 0.5, "gram_every": 0.5}
    objective = apart(small_dinov2(gram_weight=2.0, **options)).double()
    without = apart(small_dinov2(**options)).double()
    with torch.no_grad():
        for name, parameter in objective.gram.backbone.named_parameters():
            parameter += 0.1 * rng.normal(rng.key("gram", name), *parameter.shape)
    batch = batch_of(b=2)
    assert torch.equal(objective(batch, 0.4)[0], without(batch, 0.4)[0])
    crops, mask = torch.cat(batch.views[:2]), objective.hidden(batch.key, (4, 4)).mask
    student, anchor = objective.student, objective.gram.backbone(crops).patches
    tokens = torch.where(mask.unsqueeze(-1), objective.mask_token, student.embed(crops))
    gram = written_out_gram(student.encode(student.add_positions(tokens)).patches, anchor.detach())
    (loss, metrics), (other, _) = objective(batch, 0.5), without(batch, 0.5)
    torch.testing.assert_close(metrics["gram"], gram.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, other + 2 * gram, rtol=1e-9, atol=0)
    weights = list(student.parameters())
    ours, theirs = (torch.autograd.grad(x, weights) for x in (loss, 2 * gram))
    rest = torch.autograd.grad(other, without.student.parameters())
    for mine, one, two in zip(ours, theirs, rest, strict=True):
        torch.testing.assert_close(mine, one + two, rtol=1e-7, atol=1e-10)


def test_cosines_of_either_sign_count():
    patches, anchor = torch.eye(2).double()[None], torch.tensor([[[1.0, 0.0], [-3.0, 0.0]]]).double()
    assert gram_loss(patches, anchor).item() == pytest.approx(0.5)  # two of four cosines are 0 instead of -1
    assert gram_loss(patches, 5 * patches).item() == pytest.approx(0)


@pytest.mark.parametrize(("start", "taken"), [(0.3, [3, 5, 7]), (0.0, [0, 2, 4])])
def test_the_anchor_is_the_teacher_of_the_start_then_of_two_renewals_also_after_a_restart(start, taken):
    """Of ten steps; the teacher's bias is the number of steps that were taken."""
    options = {"gram_weight": 2.0, "gram_start": start, "gram_every": 0.2, "gram_renewals": 2}
    objective, batch = small_dinov2(**options).double(), batch_of(b=2)

    def bias(vit: ViT) -> Tensor:
        return vit.norm.bias.detach()

    bias(objective.backbone).zero_()
    bias(objective.gram.backbone).fill_(0.0)
    for step in range(10):
        _, metrics = objective(batch, step / 10)
        due = [one for one in taken if one <= step]
        assert ("gram" in metrics) == bool(due)
        if due:
            assert torch.equal(bias(objective.gram.backbone), torch.full((24,), float(due[-1])).double())
        bias(objective.student).fill_(step + 1.0)
        objective.momentum = 0.0
        objective.seen_progress = 0.0  # where the teacher becomes the student
        objective.after_step((step + 1) / 10)
        again = small_dinov2(**options).double()
        again.load_state_dict(objective.state_dict())
        objective = again


def test_the_patch_embedding_learns_at_a_fifth_and_both_last_layers_are_held():
    objective = small_dinov2(patch_head=(28, 12, 36), freeze_last_layer=0.1)
    scales = {p: group["scale"] for group in parameter_groups(objective, 0.1, layer_decay=0.9) for p in group["params"]}
    assert scales[objective.student.patch_embed.proj.weight] == pytest.approx(0.2 * 0.9**3)
    assert scales[objective.student.pos_embed] == pytest.approx(0.9**3)
    assert scales[objective.student_head.weight_v] == 1.0
    held = {id(p) for p in objective.frozen_parameters(0.05)}
    last = [
        getattr(head, name)
        for head in (objective.student_head, objective.student_patch_head)
        for name in ("weight_v", "weight_g")
    ]
    assert held == {id(p) for p in last}
    assert objective.frozen_parameters(0.1) == []


def test_the_shared_head_reads_patches_and_a_head_of_their_own_has_its_sizes():
    shared, apart_ = small_dinov2(), small_dinov2(patch_head=(28, 12, 36))
    assert shared.patch_head is None
    assert shared.patch_centre.shape == (40,)
    assert apart_.patch_head.weight_v.shape == (36, 12)
    assert apart_.patch_centre.shape == (36,)
    assert not torch.equal(apart_.patch_head.mlp[0].weight[:5, :5], apart_.head.mlp[0].weight[:5, :5])


def test_the_short_schedule_has_its_rate_and_its_steps():
    """4e-3 * sqrt(2048 / 1024); 125,000 steps of 2,048 images, warm-up for 10 times 1,250."""
    config, images = PAPER.with_rate(), 1_281_167
    assert config.lr == pytest.approx(4e-3 * math.sqrt(2))
    assert config.epochs * images / 2048 == pytest.approx(125_000, rel=2e-3)
    assert config.warmup_epochs * images / 2048 == pytest.approx(12_500, rel=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assignment": "softmax"}, "assignment must be centering or sinkhorn, got 'softmax'"),
        ({"koleo_group": 1}, "koleo_group 1: "),
        ({"gram_weight": -1.0}, "gram_weight -1.0 must be at least 0"),
        ({"gram_start": 1.5}, "gram_start 1.5 must lie in"),
        ({"mask_ratios": (0.0, 0.5)}, "mask_ratios 0 0.5"),
    ],
)
def test_impossible_arguments_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        small_dinov2(**options)
