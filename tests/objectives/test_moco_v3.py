"""MoCo v3 against the official sequence of a step written out, with timm's ViT and torch's batch norm, in float64.

Where other packages differ from the paper and its code (read in these versions, not tested here):
- stable-pretraining 0.1.8 has no factor of 2 tau, halves the sum of both directions, and its predictor ends without
  batch norm; batch norm is of one process, and its patch projection is trained.
- lightly 1.6.0 and solo-learn 1.0.2 have no MoCo v3 as published.
"""

import math
from copy import deepcopy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.moco_v3 import MoCoV3
from sslvit.objectives.objective import Batch

STEPS = 5


def small_vit(**changes) -> ViT:
    sizes = {"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 3}
    return ViT(ViTConfig(**(sizes | {"position": "sincos_moco_v3", "init": "moco_v3", "seed": 1} | changes)))


def small_moco(vit: ViT | None = None, **options) -> MoCoV3:
    return MoCoV3(vit or small_vit(), **({"hidden": 32, "dimension": 16} | options))


def batch_of(step: int = 0, b: int = 6) -> Batch:
    images = rng.uniform(rng.key(step, "images", torch.arange(b)), 2, 3, 16, 16).double()
    images = images.cumsum(-1) / 16 ** (
        1 + images[:, :1, :1, :1, :1]
    )  # not all alike to the network, as noise would be
    return Batch(images.unbind(1), rng.key(step, "forward", torch.arange(b)))


class Official(nn.Module):
    """The official builder's sequence; the teacher is called momentum encoder, and moves inside forward."""

    def __init__(self, ours: MoCoV3):
        super().__init__()
        self.base_encoder = VisionTransformer(
            img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=0
        ).double()
        self.base_encoder.load_state_dict(ours.backbone.state_dict())
        self.base_encoder.pos_embed.requires_grad = False
        for p in self.base_encoder.patch_embed.parameters():
            p.requires_grad = False
        self.projector = self.mlp([24, 32, 32, 16]).double()
        self.projector.load_state_dict(ours.projector.state_dict())
        self.predictor = self.mlp([16, 32, 16]).double()
        self.predictor.load_state_dict(ours.predictor.state_dict())
        self.momentum_encoder, self.momentum_projector = deepcopy(self.base_encoder), deepcopy(self.projector)
        for p in [*self.momentum_encoder.parameters(), *self.momentum_projector.parameters()]:
            p.requires_grad = False

    @staticmethod
    def mlp(widths: list[int]) -> nn.Sequential:
        layers = []
        for layer in range(len(widths) - 1):
            layers.append(nn.Linear(widths[layer], widths[layer + 1], bias=False))
            if layer < len(widths) - 2:
                layers += [nn.BatchNorm1d(widths[layer + 1]), nn.ReLU(inplace=True)]
            else:
                layers.append(nn.BatchNorm1d(widths[layer + 1], affine=False))
        return nn.Sequential(*layers)

    def forward(self, x1: Tensor, x2: Tensor, m: float) -> Tensor:
        q1 = self.predictor(self.projector(self.base_encoder(x1)))
        q2 = self.predictor(self.projector(self.base_encoder(x2)))
        with torch.no_grad():
            for base, momentum in (
                (self.base_encoder, self.momentum_encoder),
                (self.projector, self.momentum_projector),
            ):
                for b, t in zip(base.parameters(), momentum.parameters(), strict=True):
                    t.data = t.data * m + b.data * (1 - m)
            k1 = self.momentum_projector(self.momentum_encoder(x1))
            k2 = self.momentum_projector(self.momentum_encoder(x2))
        return self.contrastive_loss(q1, k2) + self.contrastive_loss(q2, k1)

    @staticmethod
    def contrastive_loss(q: Tensor, k: Tensor, tau: float = 0.2) -> Tensor:
        q, k = q / (q * q).sum(1, keepdim=True) ** 0.5, k / (k * k).sum(1, keepdim=True) ** 0.5
        logits = torch.einsum("nc,mc->nm", q, k) / tau
        terms = [torch.logsumexp(logits[i], 0) - logits[i, i] for i in range(len(q))]
        return sum(terms) / len(q) * 2 * tau


def official_momentum(step: int, momentum: float) -> float:
    return 1 - 0.5 * (1 + math.cos(math.pi * step / STEPS)) * (1 - momentum)


def standardised(images: Tensor) -> Tensor:
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()[..., None, None]
    return (images - mean) / deviation


def counterparts(ours: MoCoV3, official: Official) -> list[tuple[str, nn.Module, nn.Module]]:
    return [
        ("backbone", ours.backbone, official.base_encoder),
        ("projector", ours.projector, official.projector),
        ("predictor", ours.predictor, official.predictor),
        ("teacher", ours.teacher_backbone, official.momentum_encoder),
        ("teacher's projector", ours.teacher_projector, official.momentum_projector),
    ]


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    # With the usual epsilon of 1e-8, Adam would make steps of gradients that are rounding.
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1, eps=1e-3)


@pytest.mark.parametrize("momentum", [0.99, 0.5])
def test_five_steps_are_the_official_sequence_in_float64(momentum):
    """Losses, gradients, weights of student and teacher, and the running statistics of both."""
    ours = small_moco(momentum=momentum).double()
    official = Official(ours)
    optimizers = optimizer_of(ours), optimizer_of(official)
    for step in range(STEPS):
        batch = batch_of(step)
        expected = official(*map(standardised, batch.views), official_momentum(step, momentum))
        loss, _ = ours(batch, step / STEPS)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        for optimizer, value in zip(optimizers, (loss, expected), strict=True):
            optimizer.zero_grad()
            value.backward()
        for part, mine, theirs in counterparts(ours, official):
            for name, value in theirs.state_dict().items():
                torch.testing.assert_close(mine.state_dict()[name], value, rtol=1e-8, atol=1e-10, msg=f"{part} {name}")
            check_gradients(trained(mine), trained(theirs))
        for optimizer in optimizers:
            optimizer.step()
        ours.after_step((step + 1) / STEPS)


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def check_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Relative to the largest of each. The final norm's bias is none to batch norm: its gradient is rounding."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = float(expected.abs().max())
        assert (scale < 1e-12) == name.endswith("norm.bias"), name
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=max(1e-7 * scale, 1e-12), msg=name)


def test_the_move_after_the_last_step_changes_nothing():
    ours = small_moco()
    for p in ours.backbone.parameters():
        p.data += 1
    before = [p.clone() for p in ours.teacher_backbone.parameters()]
    ours.after_step(1.0)
    assert all(torch.equal(p, q) for p, q in zip(ours.teacher_backbone.parameters(), before, strict=True))


def test_when_all_logits_are_equal_the_loss_is_4_tau_ln_b():
    for b, temperature in ((6, 0.2), (9, 1.0)):
        ours = small_moco(temperature=temperature).double()
        nn.init.zeros_(ours.predictor[3].weight)  # queries of zero
        loss, metrics = ours(batch_of(b=b), 0.0)
        assert loss.item() == pytest.approx(4 * temperature * math.log(b), rel=1e-12)
        assert metrics["uniformity"] == pytest.approx(-4)


def test_agreeing_pairs_among_orthogonal_others_have_the_loss_of_a_softmax():
    ours = small_moco()
    loss, metrics = ours.contrast(3 * torch.eye(16).double(), 5 * torch.eye(16).double())
    expected = 2 * 0.2 * math.log(1 + 15 * math.exp(-1 / 0.2))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["accuracy"] == 1
    assert metrics["alignment"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_in_chunks_the_loss_and_the_gradients_are_those_of_the_whole_batch(drop_path):
    whole, chunks = (small_moco(small_vit(drop_path=drop_path), chunks=chunks).double() for chunks in (1, 4))
    batch = batch_of(b=10)  # chunks of 3, 3, 3 and 1
    results = []
    for objective in (whole, chunks):
        loss, _ = objective(batch, 0.0)
        loss.backward()
        results.append((loss, trained(objective)))
    (loss, gradients), (loss_in_chunks, gradients_in_chunks) = results
    torch.testing.assert_close(loss_in_chunks, loss, rtol=1e-12, atol=0)
    check_gradients(gradients_in_chunks, gradients)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(chunks.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("chunks", [1, 3])
def test_drop_path_draws_for_each_view_and_for_student_and_teacher_anew(chunks):
    """Of one image seen twice: what is dropped together in both views would agree for no reason of the image's."""
    ours = small_moco(small_vit(drop_path=0.5), chunks=chunks).double()
    batch = batch_of(b=12)
    batch = Batch((batch.views[0],) * 2, batch.key)
    features = [x for name in ("student", "teacher") for x in ours.read(ours.backbone, batch, name)]
    for one in range(4):
        for other in range(one):
            same = (features[one] - features[other]).abs().amax(1) < 1e-12
            assert same.sum() < 6  # one of four images drops and keeps alike by chance, of one block with a rate


def test_in_chunks_autograd_keeps_a_fraction_of_the_memory():
    kept = {}
    for chunks in (1, 4):
        objective, sizes = small_moco(small_vit(depth=6), chunks=chunks), []
        batch = batch_of(b=32)
        batch = Batch(tuple(view.float() for view in batch.views), batch.key)

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            objective(batch, 0.0)
        kept[chunks] = sum(sizes)
    assert kept[4] < kept[1] / 4


def test_the_patch_projection_stays_as_it_was_drawn_unless_asked_for():
    assert {name for name, p in small_moco().backbone.named_parameters() if not p.requires_grad} == {
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    assert all(p.requires_grad for p in small_moco(freeze_patch_projection=False).backbone.parameters())


def test_the_heads_have_the_papers_shapes_and_no_biases():
    ours = MoCoV3(small_vit())
    linear = [m for m in (*ours.projector, *ours.predictor) if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [
        (24, 4096), (4096, 4096), (4096, 256), (256, 4096), (4096, 256)
    ]  # fmt: skip
    assert all(m.bias is None for m in linear)
    assert [ours.projector[-1].affine, ours.predictor[-1].affine] == [False, False]


def test_the_papers_vit_s_has_twelve_heads_and_fixed_positions():
    vit = ViT.variant("S-moco_v3/16", image_size=224, position="sincos_moco_v3", init="moco_v3")
    assert (vit.width, vit.depth, vit.heads) == (384, 12, 12)
    assert "pos_embed" not in dict(vit.named_parameters())


def test_bfloat16_costs_digits_but_not_the_statistics():
    ours = small_moco()
    batch = batch_of()
    batch = Batch(tuple(view.float() for view in batch.views), batch.key)
    exact, _ = ours(batch, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = ours(batch, 0.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"class_token": False}, {}, "class_token=True"),
        ({}, {"temperature": 0.0}, "temperature 0.0"),
        ({}, {"momentum": 1.5}, "momentum 1.5"),
        ({}, {"chunks": 0}, "chunks 0"),
    ],
)
def test_impossible_arguments_are_refused_with_their_values(changes, options, message):
    with pytest.raises(ValueError, match=message):
        small_moco(small_vit(**changes), **options)


def test_one_view_is_not_two():
    batch = batch_of()
    with pytest.raises(ValueError, match="not 1"):
        small_moco()(Batch(batch.views[:1], batch.key), 0.0)
