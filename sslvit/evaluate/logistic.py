"""Logistic regression on frozen features by L-BFGS, to the optimum: no rate, no epochs, only the penalty.

C is scikit-learn's: the loss is C times the summed cross-entropy, plus half the squared norm of the weights, not of the
bias. DINOv2 chooses it from 45 values on a tenth of the training labels, DINO's low-shot numbers are of this kind too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit.evaluate.linear import Head
from sslvit.evaluate.metrics import check, top
from sslvit.evaluate.split import hold_out

PENALTIES = tuple(10.0**exponent for exponent in range(-6, 4))  # of DINOv2's range 10^-6 to 10^5


def fit(
    features: Tensor,
    labels: Tensor,
    c: float,
    *,
    classes: int | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    steps: int = 1000,
    tolerance: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The weights d c and bias c of the optimum, in the dtype of the features; from `start` it is reached sooner."""
    check(features, labels)
    if c <= 0:
        raise ValueError(f"c {c} must be above 0")
    n, d = features.shape
    classes = classes or int(labels.max()) + 1
    basis, scale = well_conditioned(features, classes, 1 / (c * n))
    mean = features.mean(0)
    weights, bias = start or (features.new_zeros(d, classes), features.new_zeros(classes))
    inputs, first = (features - mean) @ basis, torch.linalg.solve(basis, weights).T  # k d: 3 times as fast as d k
    parameters = [x.contiguous().clone().requires_grad_() for x in (first, bias + mean @ weights)]
    # The mean, which is the sum up to a factor, keeps L-BFGS's first step and tolerances at the same scale for any n.
    # The tolerance is of the gradient's largest entry, as scikit-learn's 1e-4 is.
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, tolerance_grad=tolerance, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(inputs, *parameters), labels)
        value = value + (scale * parameters[0]).square().sum() / (2 * c * n)
        value.backward()
        return value

    optimizer.step(loss)
    weights, bias = (x.detach() for x in parameters)
    weights = basis @ weights.T
    return weights, bias - mean @ weights


def well_conditioned(features: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Coordinates d d of the weights in which the loss curves alike in all directions, and so L-BFGS needs few steps,
    and their lengths d. They are orthogonal: the squared norm of the weights is the sum of squares, times lengths."""
    curvature, directions = torch.linalg.eigh(torch.cov(features.T.double(), correction=0).view(features.shape[1], -1))
    scale = (curvature.clamp(min=0) / classes + penalty).rsqrt()
    return (directions * scale).to(features.dtype), scale.to(features.dtype)


def logistic_probe(
    features: Tensor,
    labels: Tensor,
    *,
    penalties: tuple[float, ...] = PENALTIES,
    classes: int | None = None,
    seed: int = 0,
) -> Head:
    """C chosen on a held-out tenth of these labels, and then fitted to all of them: n d, n."""
    check(features, labels)
    rows, held = hold_out(labels, seed=seed)
    classes = classes or int(labels.max()) + 1
    fitted, tried, starts = None, [], {}
    for c in sorted(penalties):
        fitted = starts[c] = fit(features[rows], labels[rows], c, classes=classes, start=fitted, tolerance=1e-4)
        tried.append(({"c": c}, top(torch.addmm(fitted[1], features[held], fitted[0]), labels[held])))
    settings, _ = max(tried, key=lambda one: one[1])  # of equals the smallest
    best = fit(features, labels, settings["c"], classes=classes, start=starts[settings["c"]], tolerance=1e-5)
    return Head(*best, settings, tried)


def logistic(train: Tensor, labels: Tensor, test: Tensor, *, classes: int | None = None, seed: int = 0) -> Tensor:
    """Probabilities of the test images, of features standardised by the training images': n d, n, m d -> m classes"""
    mean, deviation = train.mean(0), train.std(0) + 1e-5
    head = logistic_probe(
        (train - mean) / deviation, labels, penalties=(0.001, 0.01, 0.1, 1.0), classes=classes, seed=seed
    )
    return head.probabilities((test - mean) / deviation)
