"""Logistic regression on frozen features by L-BFGS, to the optimum: no learning rate, no epochs, only the penalty.

C is scikit-learn's: the loss is C times the summed cross-entropy, plus half the squared norm of the weights without the
bias. DINOv2 chooses it from 45 values on a tenth of the training labels; DINO's low-shot numbers are of this kind too.
"""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit.evaluate.linear import Head
from sslvit.evaluate.metrics import check, top
from sslvit.evaluate.split import hold_out

log = logging.getLogger(__name__)
PENALTIES = (0.001, 0.01, 0.1, 1.0)
WHOLE = 4096  # weights, up to which the whole curvature is computed
SAMPLE = 4000  # images that it is computed on
ROWS = 1 << 17  # images that are in memory at once


def fit(
    features: Tensor,
    labels: Tensor,
    c: float,
    *,
    classes: int | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    steps: int = 1000,
    tolerance: float = 1e-6,
    standard: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights d c and bias c of the optimum, in the dtype of the features; from a near `start` in fewer steps.

    standard: a mean and a deviation that standardise the features. Features may be mapped from a file: no more than
    ROWS of them are in memory at once.
    """
    check(features[:ROWS], labels[:ROWS])
    if c <= 0:
        raise ValueError(f"c must be above 0, got {c}")
    n, d = features.shape
    classes = classes or int(labels.max()) + 1
    shift, scale = (features.mean(0), None) if standard is None else standard

    def piece(rows: Tensor) -> Tensor:
        rows = rows.to(shift.dtype) - shift
        return torch.cat([rows if scale is None else rows / scale, rows.new_ones(len(rows), 1)], 1)

    whole = piece(features) if n <= ROWS else None
    weights, bias = start or (shift.new_zeros(d, classes), shift.new_zeros(classes))
    offset = shift @ weights if scale is None else shift.new_zeros(classes)
    first = torch.cat([weights, (bias + offset)[None]]).T.contiguous()
    penalty = torch.cat([shift.new_full((d,), 1 / (c * n)), shift.new_zeros(1)])
    every = max(1, n // SAMPLE)
    some = piece(features[::every]) if whole is None else whole[::every]
    back, point = whitened(some, n, first, penalty)
    point = point.requires_grad_()
    # The tolerance is of the gradient's largest entry in these coordinates.
    optimizer = torch.optim.LBFGS(
        [point], max_iter=steps, tolerance_grad=tolerance, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:  # the mean, not the sum: L-BFGS's first step and tolerances keep their scale for any n
        optimizer.zero_grad()
        if whole is not None:
            both = back(point)
            value = F.cross_entropy(F.linear(whole, both), labels) + (penalty * both.square()).sum() / 2
            value.backward()
            return value
        value = (penalty * back(point).square()).sum() / 2
        value.backward()
        total = value.detach()
        for rows, truth in zip(features.split(ROWS), labels.split(ROWS), strict=True):
            part = F.cross_entropy(F.linear(piece(rows), back(point)), truth, reduction="sum") / n
            part.backward()
            total += part.detach()
        return total

    optimizer.step(loss)
    if optimizer.state[point]["func_evals"] >= steps:
        log.warning("logistic regression with C %g is not at its optimum after %d steps", c, steps)
    weights, bias = back(point.detach()).T.split([d, 1])
    return weights.contiguous(), bias[0] if scale is not None else bias[0] - shift @ weights


def whitened(some: Tensor, n: int, first: Tensor, penalty: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Coordinates in which the loss curves alike in all directions, so that L-BFGS needs few steps: the way back from
    them to weights k d, and the first weights in them. some: of the n images. m d, k d, d -> ..., k d

    With several times more images than weights, by the curvature at the first weights on a sample of the images; else
    by the features' covariance, the curvature if all classes were alike. The optimum is the same in any coordinates.
    """
    k, d = first.shape
    if k * d > min(WHOLE, n // 4):
        root, inverse = (each.to(some) for each in root_of((some.T @ some).double() / (len(some) * k), penalty))
        return lambda point: point @ inverse, first @ root
    chances = F.linear(some, first).softmax(-1)
    curvature = torch.empty(k, d, k, d, dtype=torch.float64, device=some.device)
    for a in range(k):
        for b in range(a, k):
            weight = chances[:, a] * (float(a == b) - chances[:, b])
            curvature[a, :, b] = ((weight[:, None] * some).T @ some).double() / len(some)
            if a != b:
                curvature[b, :, a] = curvature[a, :, b].T
    root, inverse = (each.to(some) for each in root_of(curvature.view(k * d, k * d), penalty.repeat(k)))
    return lambda point: (point @ inverse).view(k, d), first.flatten() @ root


def root_of(curvature: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky root of the curvature with the penalty, and its inverse. Flat directions, such as the same bias for
    all classes, get a little curvature, and more if rounding asks for it."""
    own = curvature.diagonal().clone()
    for share in 10.0 ** torch.arange(-5, 1):
        least = share * own.mean()
        biases = torch.maximum(1000 * least, penalty.max().double())
        curvature.diagonal().copy_(own + torch.where(penalty > 0, penalty.double().clamp(min=least), biases))
        root, failed = torch.linalg.cholesky_ex(curvature)
        if not failed:
            break
    else:
        raise ValueError("the curvature of these features has no Cholesky root: are they finite?")
    return root, torch.linalg.solve_triangular(root, torch.eye(len(root)).to(root), upper=False)


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
    settings, _ = max(tried, key=lambda one: one[1])  # ties: the smallest
    best = fit(features, labels, settings["c"], classes=classes, start=starts[settings["c"]], tolerance=1e-5)
    return Head(*best, settings, tried)


def standardized_probe(
    train: Tensor, labels: Tensor, *, classes: int | None = None, seed: int = 0
) -> tuple[Head, Tensor, Tensor]:
    """The recipes' head for standardised features, with the mean and deviation that standardise them."""
    mean, deviation = train.mean(0), train.std(0) + 1e-5
    return logistic_probe((train - mean) / deviation, labels, classes=classes, seed=seed), mean, deviation


def logistic(train: Tensor, labels: Tensor, test: Tensor, *, classes: int | None = None, seed: int = 0) -> Tensor:
    """Probabilities, from features standardised by the training images': n d, n, m d -> m classes"""
    head, mean, deviation = standardized_probe(train, labels, classes=classes, seed=seed)
    return head.probabilities((test - mean) / deviation)
