"""SimCLR, VICReg and LeJEPA in float64 against their definitions, written out, and against lightly where it is there.

The definitions use numpy and loops over images; gradients are compared through the embeddings.
"""

import cmath
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from objectives_zoo import vit
from torch import Tensor

from sslvit import rng
from sslvit.objectives.lejepa import LeJEPA, sigreg
from sslvit.objectives.objective import Batch, Objective
from sslvit.objectives.simclr import SimCLR, nt_xent
from sslvit.objectives.vicreg import VICReg, redundancy, shortfall

B, D = 12, 6


def embeddings(views: int, name: str = "") -> Tensor:
    return rng.normal(rng.key(0, name), views, B, D).double().requires_grad_()


def batch(views: int) -> Batch:
    ids = torch.arange(B)
    images = tuple(rng.uniform(rng.key(1, view, ids), 3, 16, 16) for view in range(views))
    return Batch(tuple(image.double() for image in images), rng.key(2, ids))


def same_with_gradient(ours: Tensor, theirs: Tensor, through: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    (mine,), (other,) = (torch.autograd.grad(one, through, retain_graph=True) for one in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-10)


# SimCLR


def test_the_contrastive_loss_is_that_of_its_definition():
    """Equation 1 of the paper, image by image: l(i, j) over all k other than i, and the mean over both directions."""
    z, temperature = embeddings(2), 0.3
    rows = torch.cat([z[0], z[1]])
    total = rows.new_zeros(())
    for i in range(2 * B):
        similar = [F.cosine_similarity(rows[i], rows[k], dim=0) / temperature for k in range(2 * B)]
        others = torch.stack([one for k, one in enumerate(similar) if k != i])
        total = total - (similar[(i + B) % (2 * B)] - others.exp().sum().log())
    loss, _ = nt_xent(torch.cat([z[0], z[1]]), temperature)
    same_with_gradient(loss, total / (2 * B), z)


def test_the_contrastive_loss_is_lightlys():
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    z = embeddings(2)
    loss, _ = nt_xent(torch.cat([z[0], z[1]]), 0.1)
    same_with_gradient(loss, lightly.NTXentLoss(temperature=0.1)(z[0], z[1]), z)


def test_the_accuracy_is_that_of_finding_the_other_view():
    rows = torch.eye(B, dtype=torch.float64)
    loss, metrics = nt_xent(torch.cat([rows, rows]), 0.5)
    assert metrics["accuracy"] == 1
    # The partner has cosine 1, the 2 B - 2 others 0.
    assert loss.item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 2 * B - 2)))


def test_simclrs_last_norm_has_a_scale_and_no_shift():
    objective = SimCLR(vit(0), hidden=32, dimension=16)
    last = objective.projector[-1]
    assert last.weight.requires_grad
    assert not last.bias.requires_grad
    assert not last.bias.any()
    assert [type(layer).__name__ for layer in objective.projector] == [
        "Linear",
        "BatchNorm",
        "ReLU",
        "Linear",
        "BatchNorm",
    ]


# VICReg


def test_vicregs_terms_are_those_of_their_definitions():
    z = embeddings(2)
    objective = VICReg(vit(0).double(), dimension=D).double()
    objective.expander = torch.nn.Identity()
    arrays = z.detach().numpy()
    variance = np.mean([np.maximum(0, 1 - np.sqrt(a.var(0, ddof=1) + 1e-4)).mean() for a in arrays])
    covariance = sum((np.cov(a.T)[~np.eye(D, dtype=bool)] ** 2).sum() / D for a in arrays)
    assert sum(shortfall(x) for x in z).item() / 2 == pytest.approx(variance, rel=1e-12)
    assert sum(redundancy(x) for x in z).item() == pytest.approx(covariance, rel=1e-12)


def test_vicregs_loss_is_the_weighted_sum_over_its_expanders_outputs():
    objective, given = VICReg(vit(0, drop_path=0.0), dimension=D, weights=(3.0, 5.0, 7.0)).double(), batch(2)
    loss, metrics = objective(given, 0.0)
    first, second = (objective.expander(objective.backbone(view).cls).detach().numpy() for view in given.views)
    invariance = ((first - second) ** 2).mean()
    variance = np.mean([np.maximum(0, 1 - np.sqrt(a.var(0, ddof=1) + 1e-4)).mean() for a in (first, second)])
    covariance = sum((np.cov(a.T)[~np.eye(D, dtype=bool)] ** 2).sum() / D for a in (first, second))
    assert loss.item() == pytest.approx(3 * invariance + 5 * variance + 7 * covariance, rel=1e-9)
    assert metrics["covariance"].item() == pytest.approx(covariance, rel=1e-9)


def test_vicregs_loss_is_lightlys():
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    z = embeddings(2)
    ours = 25 * F.mse_loss(z[0], z[1]) + 25 * sum(map(shortfall, z)) / 2 + sum(map(redundancy, z))
    theirs = lightly.VICRegLoss(lambda_param=25, mu_param=25, nu_param=1, eps=1e-4)(z[0], z[1])
    same_with_gradient(ours, theirs, z)


# LeJEPA


def unit(m: int) -> Tensor:
    return F.normalize(rng.normal(rng.key(3), D, m).double(), dim=0)


def epps_pulley(x: np.ndarray, most: float, knots: int) -> float:
    """N times the integral over [-most, most] of |mean exp(itx) - exp(-t^2/2)|^2 exp(-t^2/2), with complex numbers."""
    t = np.linspace(-most, most, knots)
    empirical = np.array([sum(cmath.exp(1j * one * value) for value in x) / len(x) for one in t])
    integrand = np.abs(empirical - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)
    return float(np.trapezoid(integrand, t)) * len(x)


def test_sigreg_is_the_mean_statistic_of_epps_and_pulley_along_each_direction():
    z, directions = embeddings(3), unit(5)
    along = (z @ directions).detach().numpy()
    expected = np.mean([epps_pulley(along[v, :, m], 3.0, 33) for v in range(3) for m in range(5)])
    assert sigreg(z, directions).item() == pytest.approx(expected, rel=1e-9)


def test_its_seventeen_points_are_near_the_integral():
    x = rng.normal(rng.key(4), 200).double().numpy() * 1.5 + 0.3
    z = torch.tensor(x).reshape(1, -1, 1)
    quad = pytest.importorskip("scipy.integrate").quad

    def integrand(t: float) -> float:
        return abs(np.exp(1j * t * x).mean() - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2)

    exact = len(x) * quad(integrand, -3, 3)[0]
    assert sigreg(z, torch.ones(1, 1, dtype=torch.float64)).item() == pytest.approx(exact, rel=0.01)


def test_sigreg_is_lightlys(monkeypatch):
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    z, theirs, directions = embeddings(2), lightly.SIGReg(num_vectors=7).double(), unit(7)
    monkeypatch.setattr(theirs, "_generate_unit_vectors", lambda *_, **__: directions)
    # Theirs has its weights in float32 to begin with.
    ours = sigreg(z, directions)
    other = torch.stack([theirs(view) for view in z]).mean()
    torch.testing.assert_close(ours, other, rtol=1e-6, atol=0)
    (mine,), (its,) = (torch.autograd.grad(one, z) for one in (ours, other))
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-8)


def test_lejepas_loss_is_made_of_the_distance_to_the_mean_of_the_large_views():
    objective, given = (
        LeJEPA(vit(0, drop_path=0.0), weight=0.1, directions=9, hidden=16, dimension=D).double(),
        batch(4),
    )
    loss, metrics = objective(given, 0.25)
    features = torch.cat([objective.backbone(view).cls for view in given.views])
    z = objective.projector(features).detach().reshape(4, B, D)
    centre = (z[0] + z[1]) / 2
    invariance = sum(((centre - one) ** 2).mean() for one in z) / 4
    expected = 0.9 * invariance + 0.1 * sigreg(z, objective.draw(0.25, z))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert metrics["invariance"].item() == pytest.approx(invariance.item(), rel=1e-9)


def test_directions_are_of_length_one_new_in_each_step_and_the_same_for_everybody():
    objective, like = LeJEPA(vit(0), directions=9, hidden=16, dimension=D), torch.zeros(1, D)
    first = objective.draw(0.25, like)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(9))
    assert torch.equal(first, objective.draw(0.25, like))
    assert not torch.equal(first, objective.draw(0.2500001, like))
    other = LeJEPA(vit(1), directions=9, hidden=16, dimension=D, seed=1)  # a restored run, whatever it was made with
    assert torch.equal(first, other.draw(0.25, like))


def test_gaussian_embeddings_have_a_small_statistic_and_collapsed_ones_a_large_one():
    directions = unit(64)
    gaussian = rng.normal(rng.key(5), 1, 4000, D).double()
    # For a standard normal the expectation is the integral of (1 - exp(-t^2)) exp(-t^2 / 2) over [-3, 3].
    t = np.linspace(-3, 3, 6001)
    expected = np.trapezoid((1 - np.exp(-(t**2))) * np.exp(-(t**2) / 2), t)
    assert sigreg(gaussian, directions).item() == pytest.approx(expected, rel=0.3)
    assert sigreg(torch.zeros(1, 4000, D).double(), directions).item() > 1000 * expected


@pytest.mark.parametrize("kind", [SimCLR, VICReg, LeJEPA])
def test_one_view_and_a_backbone_without_a_class_token_are_refused(kind: type[Objective]):
    options = {"dimension": 8} | ({} if kind is VICReg else {"hidden": 8})
    with pytest.raises(ValueError, match=r"2 views of (one size|an image)|at least 2 views"):
        kind(vit(0), **options)(batch(1), 0.0)
    with pytest.raises(ValueError, match="build it with class_token=True"):
        kind(vit(0, class_token=False), **options)


def test_views_of_two_sizes_and_a_single_image_are_refused():
    small = Batch((batch(1).views[0], torch.rand(B, 3, 8, 8).double()), batch(1).key)
    for objective in (SimCLR(vit(0), hidden=8, dimension=8), VICReg(vit(0), dimension=8)):
        with pytest.raises(ValueError, match=r"2 views of one size, and got \[\(16, 16\), \(8, 8\)\]"):
            objective(small, 0.0)
    with pytest.raises(ValueError, match="two images at least"):
        nt_xent(torch.ones(2, 4), 0.1)


def test_vicregs_views_are_resized_bicubically_as_the_official_ones():
    views = VICReg(vit(0), dimension=8).default_views(224, 3).views
    assert {view.interpolation for view in views} == {"bicubic"}
    assert [view.solarize for view in views] == [0.0, 0.2]
