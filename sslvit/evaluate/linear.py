"""Linear probe: heads with many learning rates and weight decays are trained at once on frozen features, one is chosen.

All heads see the same batches: the features are read once, and the logits of all are one matrix product, (k c) d
times d b. Each head comes out as if it were trained alone. The choice is made on a held-out tenth of the training
labels, and the chosen head is trained again on all of them, as the papers' probes are; with a single setting nothing is
held out. No function here takes a test set.
"""

from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from sslvit import rng
from sslvit.evaluate.metrics import check
from sslvit.evaluate.protocols import Protocol
from sslvit.evaluate.split import hold_out
from sslvit.objectives import schedule

MOMENTUM, TRUST, EPSILON = 0.9, 0.001, 1e-6


class Heads(NamedTuple):
    """One for each rate and decay. A norm in front of the heads is folded into them."""

    weights: Tensor  # k d c
    biases: Tensor  # k c


class Head(NamedTuple):
    weights: Tensor  # d c
    bias: Tensor  # c
    settings: dict[str, float]  # the chosen ones
    held_out: list[tuple[dict[str, float], float]]  # accuracies of all settings; empty if there was one

    def probabilities(self, features: Tensor) -> Tensor:
        check(features)
        return (features @ self.weights + self.bias).softmax(-1)


def probe(
    features: Tensor, labels: Tensor, protocol: Protocol, *, augmented: Tensor | None = None, seed: int = 0
) -> Head:
    """A head trained on all of these labels, by the settings that are best on a held-out tenth of them: n d, n.

    augmented: v n d, the features of v augmented versions of the images, which take turns by epoch.
    """
    check(features, labels)
    versions, classes = features[None] if augmented is None else augmented, int(labels.max()) + 1
    tried, settings = [], {"rate": protocol.rates[0], "decay": protocol.decays[0]}
    if len(protocol.rates) * len(protocol.decays) > 1:
        rows, held = hold_out(labels, seed=seed)
        heads = train_heads(versions[:, rows], labels[rows], protocol, classes=classes, seed=seed)
        logits = einsum(features[held], heads.weights, "n d, k d c -> k n c") + rearrange(heads.biases, "k c -> k 1 c")
        finite = logits.isfinite().all(-1).all(-1)
        if not finite.any():
            raise ValueError(f"every head diverged (NaN or inf): the rates {protocol.rates} are too high")
        accuracy = (logits.argmax(-1) == labels[held]).double().mean(-1) * finite  # a head that diverged is never best
        grid = [{"rate": rate, "decay": decay} for rate, decay in product(protocol.rates, protocol.decays)]
        tried = list(zip(grid, accuracy.tolist(), strict=True))
        settings, _ = max(tried, key=lambda one: one[1])  # ties: the first
    chosen = replace(protocol, rates=(settings["rate"],), decays=(settings["decay"],))
    best = train_heads(versions, labels, chosen, classes=classes, seed=seed)
    weights, bias = best.weights[0], best.biases[0]
    if not (weights.isfinite().all() and bias.isfinite().all()):
        raise ValueError(f"the head diverged (NaN or inf): the rate {settings['rate']:g} is too high")
    return Head(weights, bias, settings, tried)


def train_heads(versions: Tensor, labels: Tensor, protocol: Protocol, *, classes: int, seed: int = 0) -> Heads:
    """A head for each rate and decay: v n d, n. Epoch e reads version e modulo v."""
    n, d = versions.shape[1:]
    grid = list(product(protocol.rates, protocol.decays))
    rates, decays = torch.tensor(grid, dtype=torch.float64, device=versions.device).unbind(1)
    start = rng.normal(rng.key(seed, "linear", "start"), d, classes).mul_(0.01).to(versions.device)
    heads = _Heads(start, rates, decays, protocol.optimizer)
    norm = nn.BatchNorm1d(d, EPSILON, affine=False, track_running_stats=False) if protocol.norm else nn.Identity()
    batch_size = min(protocol.batch_size, n)
    scale, batches = batch_size / 256, -(-n // batch_size)
    for epoch in range(protocol.epochs):
        order = rng.permutation(rng.key(seed, "linear", "order", epoch), n).to(versions.device)
        version = versions[epoch % len(versions)]
        for batch, rows in enumerate(order.split(batch_size)):
            if protocol.norm and len(rows) == 1:  # one image has no deviation
                continue
            progress = (epoch + (batch / batches if protocol.moves == "step" else 0)) / protocol.epochs
            factor = scale * schedule.warmup_cosine(progress, 1.0, warmup=protocol.warmup / protocol.epochs)
            x = norm(version.index_select(0, rows))  # several times faster than indexing
            heads.step(x, F.one_hot(labels[rows], classes).to(start), factor)
    weights, biases = rearrange(heads.weights, "k c d -> k d c"), rearrange(heads.biases, "k c 1 -> k c")
    if protocol.norm:
        # MAE evaluates with running averages over batches. Cached features give what those approach, without the
        # share of their start, 0.9^batches, that they would still hold after a short training.
        variance, mean = torch.var_mean(versions, (0, 1), correction=0)
        weights = weights / rearrange((variance + EPSILON).sqrt(), "d -> d 1")
        biases = biases - einsum(mean, weights, "d, k d c -> k c")
    return Heads(weights, biases)


class _Heads:
    """k softmax classifiers with the gradient of their cross-entropy written out as two matrix products. The batch is
    the last axis of the logits, along which a softmax over few classes is fastest."""

    def __init__(self, start: Tensor, rates: Tensor, decays: Tensor, optimizer: str):
        self.weights = repeat(start, "d c -> k c d", k=len(rates)).contiguous()
        self.biases = start.new_zeros(*self.weights.shape[:2], 1)
        self.speeds = torch.zeros_like(self.weights), torch.zeros_like(self.biases)
        self.rates, self.decays = (rearrange(x.to(start), "k -> k 1 1") for x in (rates, decays))
        self.decaying, self.lars = bool(decays.any()), optimizer == "lars"

    def step(self, x: Tensor, targets: Tensor, factor: float) -> None:
        """x: b d, targets: b c; the rates are multiplied by the factor."""
        logits = torch.addmm(self.biases.flatten(0, 1), self.weights.flatten(0, 1), x.T)
        probabilities = logits.view(*self.weights.shape[:2], len(x)).softmax(1)
        # The gradient (P - Y)'X / b; Y'X is the same for all heads.
        to_weights = (probabilities.flatten(0, 1) @ x).view_as(self.weights).sub_(targets.T @ x).div_(len(x))
        to_biases = (probabilities.sum(2, keepdim=True) - targets.sum(0)[:, None]).div_(len(x))
        if self.decaying:
            to_weights += self.decays * self.weights
            if not self.lars:  # which exempts vectors
                to_biases += self.decays * self.biases
        if self.lars:
            size, change = (t.square().sum((1, 2), keepdim=True).sqrt() for t in (self.weights, to_weights))
            to_weights *= torch.where((size > 0) & (change > 0), TRUST * size / change, 1.0)
        own, gradients = (self.weights, self.biases), (to_weights, to_biases)
        for values, speed, gradient in zip(own, self.speeds, gradients, strict=True):
            speed.mul_(MOMENTUM).add_(gradient)
            values.sub_(speed * (self.rates * factor))
