"""Linear probes: heads trained together are as if alone, optimizers are torch's and MAE's, choices never see a test."""

import inspect
import time
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from sslvit import rng
from sslvit.data.spec import open_source
from sslvit.evaluate import logistic
from sslvit.evaluate.attentive import AttentiveHead, Settings, attentive_probe
from sslvit.evaluate.features import extract
from sslvit.evaluate.linear import Head, probe, train_heads
from sslvit.evaluate.logistic import fit, logistic_probe
from sslvit.evaluate.metrics import top
from sslvit.evaluate.protocols import DINO_B, DINO_S, DINOV2, GRID, MAE, MOCO_V3, PROTOCOLS, Protocol
from sslvit.evaluate.split import hold_out
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.processes.collectives import start
from sslvit.views.pretraining import EvalView

CROSS_ENTROPY = F.cross_entropy
SMALL = Protocol(rates=(0.03, 0.3, 3.0), decays=(0.0, 0.01), batch_size=256, epochs=4)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, ...]:
    """Standardised features of a random ViT: 1200 digits to learn from, 597 to be asked about."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    vit = ViT(ViTConfig(image_size=8, patch_size=2, width=32, depth=2, heads=2, channels=1)).eval()
    with torch.no_grad():
        x = vit(pixels).patches.mean(1)
    x = (x - x[:1200].mean(0)) / x[:1200].std(0)
    labels = torch.tensor(labels)
    return x[:1200], labels[:1200], x[1200:], labels[1200:]


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_head_among_many_is_the_head_trained_alone(digits, optimizer):
    x, y, *_ = digits
    grid = replace(SMALL, optimizer=optimizer, norm=True)
    together = train_heads(x[None], y, grid, classes=10)
    for i, (rate, decay) in enumerate([(r, d) for r in grid.rates for d in grid.decays]):
        alone = train_heads(x[None], y, replace(grid, rates=(rate,), decays=(decay,)), classes=10)
        torch.testing.assert_close(together.weights[i], alone.weights[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(together.biases[i], alone.biases[0], rtol=1e-3, atol=1e-4)


def by_autograd(x: Tensor, y: Tensor, protocol: Protocol, rate: float, decay: float, seed: int = 0) -> nn.Linear:
    """The same training written with torch's modules and optimizer, for a batch that divides the set."""
    head = nn.Linear(x.shape[1], 10).double()
    head.weight.data = rng.normal(rng.key(seed, "linear", "start"), x.shape[1], 10).double().T * 0.01
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    steps = len(x) // protocol.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, protocol.epochs * steps)
    for epoch in range(protocol.epochs):
        order = rng.permutation(rng.key(seed, "linear", "order", epoch), len(x))
        for rows in order.split(protocol.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(head(x[rows].double()), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return head


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_training_is_that_of_torchs_sgd_and_cosine(digits, decay):
    x, y, *_ = digits
    protocol = Protocol(rates=(0.3,), decays=(decay,), batch_size=240, epochs=3)
    ours = train_heads(x[None], y, protocol, classes=10)
    theirs = by_autograd(x, y, protocol, rate=0.3 * 240 / 256, decay=decay)
    torch.testing.assert_close(ours.weights[0].double(), theirs.weight.data.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.biases[0].double(), theirs.bias.data, rtol=1e-4, atol=1e-5)


def test_lars_scales_weights_by_their_trust_ratio_and_leaves_biases_alone(digits):
    x, y = digits[0][:64], digits[1][:64]
    protocol = Protocol(rates=(2.0,), decays=(0.5,), batch_size=64, epochs=1, optimizer="lars")
    ours = train_heads(x[None], y, protocol, classes=10)  # one step
    # MAE's util/lars.py, by hand: dp += decay w; dp *= 0.001 |w| / |dp|; w -= rate dp. Biases neither decay nor trust.
    start = rng.normal(rng.key(0, "linear", "start"), 32, 10).double() * 0.01
    error = ((x.double() @ start).softmax(-1) - F.one_hot(y, 10)) / 64
    gradient = x.double().T @ error + 0.5 * start
    step = 2.0 * 64 / 256
    expected = start - step * 0.001 * start.norm() / gradient.norm() * gradient
    torch.testing.assert_close(ours.weights[0].double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.biases[0].double(), -step * error.sum(0), rtol=1e-4, atol=1e-7)


def test_behind_the_norm_scale_and_shift_of_a_feature_are_nothing(digits):
    x, y, *_ = digits
    protocol = replace(SMALL, norm=True, epochs=2)
    plain, moved = probe(x, y, protocol), probe(x * torch.logspace(-1, 2, 32) + 7, y, protocol)
    assert plain.settings == moved.settings
    torch.testing.assert_close(
        plain.probabilities(x), moved.probabilities(x * torch.logspace(-1, 2, 32) + 7), rtol=0, atol=1e-3
    )


def test_the_norm_is_folded_into_the_heads(digits):
    x, y, *_ = digits
    still = train_heads(x[None], y, Protocol(rates=(0.0,), batch_size=400, epochs=1, norm=True), classes=10)
    start = rng.normal(rng.key(0, "linear", "start"), 32, 10) * 0.01  # rate 0: the first weights, behind the norm
    seen = nn.BatchNorm1d(32, affine=False, eps=1e-6)(x) @ start
    torch.testing.assert_close(x @ still.weights[0] + still.biases[0], seen, rtol=1e-3, atol=1e-4)


def test_the_choice_is_the_best_of_the_held_out_part_and_is_trained_again_on_all(digits):
    x, y, *_ = digits
    protocol = replace(SMALL, batch_size=240)
    head = probe(x, y, protocol)
    rows, held = hold_out(y)
    heads = train_heads(x[None, rows], y[rows], protocol, classes=10)
    accuracies = [top(x[held] @ w + b, y[held]) for w, b in zip(heads.weights, heads.biases, strict=True)]
    assert [value for _, value in head.held_out] == pytest.approx(accuracies)
    best = max(range(6), key=accuracies.__getitem__)
    assert head.settings == head.held_out[best][0]
    rate = head.settings["rate"] * 240 / 256
    theirs = by_autograd(x, y, protocol, rate=rate, decay=head.settings["decay"])  # of all 1,200 rows
    torch.testing.assert_close(head.weights.double(), theirs.weight.data.T, rtol=1e-3, atol=1e-3)


def test_where_there_is_one_rate_nothing_is_held_out(digits):
    x, y, *_ = digits
    protocol = Protocol(rates=(0.3,), batch_size=240, epochs=3)
    head = probe(x, y, protocol)
    theirs = by_autograd(x, y, protocol, rate=0.3 * 240 / 256, decay=0.0)  # of all 1,200 rows
    torch.testing.assert_close(head.weights.double(), theirs.weight.data.T, rtol=1e-4, atol=1e-5)
    assert head.held_out == []


@pytest.mark.parametrize("rates", [(3.0,), (0.5, 3.0)])
@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_every_labelled_image_is_learned_from(kind, rates):
    """Each image has a feature that no other has, and a class by chance: who has not seen it can only guess."""
    images, labels = torch.eye(80), torch.randint(0, 4, (80,), generator=torch.Generator().manual_seed(1))
    if kind == "linear":
        head = probe(images, labels, Protocol(rates=rates, batch_size=80, epochs=300))
    else:
        settings = Settings(rates=tuple(rate / 100 for rate in rates), batch_size=80, epochs=60)
        images = images[:, None]
        head, _ = attentive_probe(images, labels, settings)
    assert top(head.probabilities(images), labels) == 1.0


def test_a_last_batch_of_one_image_has_no_deviation_and_is_left_out(digits):
    x, y = digits[0][:65], digits[1][:65]
    probe(x, y, replace(SMALL, rates=(0.1,), decays=(0.0,), norm=True, batch_size=64))


def test_a_head_that_diverged_is_not_chosen(digits):
    x, y, *_ = digits
    head = probe(x, y, replace(SMALL, rates=(0.1, 1e38), decays=(0.0,)))
    assert head.settings["rate"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="every head diverged"):
        probe(x, y, replace(SMALL, rates=(1e38, 2e38), decays=(0.0,)))
    with pytest.raises(ValueError, match=r"the rate 1e\+38 is too high"):
        probe(x, y, replace(SMALL, rates=(1e38,), decays=(0.0,)))


def test_a_wide_grid_finds_what_its_best_rate_finds_alone(digits):
    x, y, test, test_labels = digits
    many = top(probe(x, y, GRID).probabilities(test), test_labels)
    alone = max(
        top(probe(x, y, replace(GRID, rates=(rate,), decays=(decay,))).probabilities(test), test_labels)
        for rate in GRID.rates
        for decay in GRID.decays
    )
    # The best on the test set, which nobody may look at. A held-out tenth (120 digits, of which a third is right) tells
    # accuracies apart to about sqrt(0.33 * 0.67 / 120), 4.3 points.
    assert many > alone - 0.043


@pytest.mark.parametrize("name", ["grid", "dinov2"])
def test_the_head_that_is_chosen_is_worth_what_it_is_worth_alone(digits, name):
    x, y, test, test_labels = digits
    many = probe(x, y, PROTOCOLS[name])
    chosen = {"rates": (many.settings["rate"],), "decays": (many.settings["decay"],)}
    alone = probe(x, y, replace(PROTOCOLS[name], **chosen))
    # 0.3 points of 597 digits are one.
    assert abs(top(many.probabilities(test), test_labels) - top(alone.probabilities(test), test_labels)) < 0.003


def test_no_probe_can_be_given_a_test_set():
    for function in (probe, train_heads, logistic_probe, attentive_probe, fit):
        assert not any("test" in name for name in inspect.signature(function).parameters), function


def test_augmented_versions_take_turns_by_epoch(digits):
    x, y, *_ = digits
    protocol = replace(SMALL, epochs=2)
    mixed = train_heads(torch.stack([x, x]), y, protocol, classes=10)
    torch.testing.assert_close(mixed.weights, train_heads(x[None], y, protocol, classes=10).weights)
    other = train_heads(torch.stack([x, -x]), y, protocol, classes=10)
    first_only = train_heads(torch.stack([x, -x]), y, replace(protocol, epochs=1), classes=10)
    torch.testing.assert_close(
        first_only.weights, train_heads(x[None], y, replace(protocol, epochs=1), classes=10).weights
    )
    assert not torch.allclose(other.weights, mixed.weights, atol=1e-2)


def test_the_named_protocols_have_the_papers_numbers():
    # MoCo v3's main_lincls: --lr 3, batch 1024, 90 epochs; MAE's main_linprobe: blr 0.1, 16384, warm-up 10, 90 epochs;
    # DINO's eval_linear: 0.001 for 256, 100 epochs; DINOv2's eval/linear: 13 rates from 1e-5 to 0.1.
    for protocol, effective in ((MOCO_V3, 12.0), (MAE, 6.4), (DINO_S, 0.004), (DINO_B, 0.004)):
        assert protocol.rates[0] * protocol.batch_size / 256 == pytest.approx(effective)
        assert protocol.decays == (0.0,)
    assert (MOCO_V3.epochs, MAE.epochs, DINO_S.epochs) == (90, 90, 100)
    assert (MAE.optimizer, MAE.norm, MAE.warmup, MOCO_V3.norm) == ("lars", True, 10, False)
    assert (DINO_S.readouts, DINO_B.readouts) == (("cls:4",), ("both",))
    assert len(DINOV2.rates) == 13
    assert (min(DINOV2.rates), max(DINOV2.rates)) == (1e-5, 0.1)
    assert len(DINOV2.readouts) == 4


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_named_protocol_runs_on_a_set_smaller_than_its_batch(digits, name):
    x, y, test, _ = digits
    probabilities = probe(x, y, replace(PROTOCOLS[name], epochs=12)).probabilities(test)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(test)))


@pytest.mark.parametrize("images", [1, 2])  # by the features' covariance, and by the whole curvature
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_logistic_regression_is_scikit_learns(digits, c, images):
    train, labels, test, test_labels = (x.double() if x.is_floating_point() else x for x in digits)
    train, labels = train.repeat(images, 1), labels.repeat(images)
    assert (logistic.WHOLE > 10 * 33 <= len(train) // 4) == (images == 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its deprecations are not ours
        oracle = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(train.numpy(), labels.numpy())
    weights, bias = fit(train, labels, c)
    torch.testing.assert_close(weights.T, torch.tensor(oracle.coef_), rtol=0, atol=1e-3)
    ours = (train @ weights + bias).softmax(-1)
    torch.testing.assert_close(ours, torch.tensor(oracle.predict_proba(train.numpy())), rtol=0, atol=1e-3)
    accuracy = oracle.score(test.numpy(), test_labels.numpy())
    assert top(test @ weights + bias, test_labels) == pytest.approx(accuracy, abs=0.002)


@pytest.mark.parametrize("whole", [0, 4096])
def test_the_optimum_is_the_same_in_any_coordinates_and_from_any_start(digits, whole, monkeypatch):
    train, labels = digits[0].double().repeat(2, 1), digits[1].repeat(2)
    reference, _ = fit(train, labels, 0.1, tolerance=1e-8)
    monkeypatch.setattr(logistic, "WHOLE", whole)
    monkeypatch.setattr(logistic, "SAMPLE", 50)  # of which the curvature says little
    start = torch.randn(2, train.shape[1], 10, generator=torch.Generator().manual_seed(0)).double()
    weights, bias = fit(train, labels, 0.1, start=(start[0], start[1, 0]), tolerance=1e-8)
    torch.testing.assert_close(weights, reference, rtol=0, atol=1e-5)
    weights.requires_grad_()
    loss = F.cross_entropy(train @ weights + bias, labels) + weights.square().sum() / (2 * 0.1 * len(train))
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().max() < 1e-6


def test_the_probe_of_the_recipes_is_at_scikit_learns_accuracy_in_float32(digits):
    train, labels, test, test_labels = digits
    train, labels = train.repeat(2, 1), labels.repeat(2)
    head = logistic_probe(train, labels, penalties=(0.001, 0.01, 0.1, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = LogisticRegression(C=head.settings["c"], max_iter=5000, tol=1e-8).fit(train.numpy(), labels.numpy())
    ours, theirs = top(head.probabilities(test), test_labels), oracle.score(test.numpy(), test_labels.numpy())
    assert ours == pytest.approx(theirs, abs=0.002)


@pytest.mark.parametrize("c", [1e-6, 1.0, 1e6])
def test_features_without_curvature_in_some_directions_are_fitted_too(c):
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (4000,), generator=draw)
    dead = torch.cat([5.0 * F.one_hot(labels, 3), torch.zeros(4000, 20)], 1)
    thin = torch.randn(4000, 2, generator=draw) @ torch.randn(2, 60, generator=draw)
    for features, some in ((dead, labels), (thin, labels), (dead, torch.zeros_like(labels))):
        classes = int(some.max()) + 1
        for first in (None, (torch.full((features.shape[1], classes), 1e5), torch.zeros(classes))):
            weights, bias = fit(features, some, c, start=first)
            assert weights.isfinite().all()
            assert bias.isfinite().all()
    assert top(dead @ fit(dead, labels, c)[0], labels) == 1.0


def test_an_optimum_that_was_not_reached_is_logged(digits, caplog):
    fit(digits[0], digits[1], 100.0, steps=2)
    assert "not at its optimum after 2 steps" in caplog.text


def test_the_curvature_at_the_first_weights_spares_most_steps(digits, monkeypatch):
    train, labels = digits[0].double(), digits[1]
    start, counts = fit(train, labels, 0.1), []
    for whole in (0, 10**6):
        monkeypatch.setattr(logistic, "WHOLE", whole)
        seen = []
        monkeypatch.setattr(
            logistic.F, "cross_entropy", lambda *arguments, seen=seen: seen.append(1) or CROSS_ENTROPY(*arguments)
        )
        fit(train.repeat(4, 1), labels.repeat(4), 0.05, start=start, tolerance=1e-7)
        counts.append(len(seen))
    assert counts[1] < counts[0] / 2


def test_logistic_regression_in_float32_scores_as_in_float64(digits):
    train, labels, test, test_labels = digits
    numbers = []
    for dtype in (torch.float32, torch.float64):
        weights, bias = fit(train.to(dtype), labels, 1.0)
        numbers.append(top(test.to(dtype) @ weights + bias, test_labels))
    assert numbers[0] == pytest.approx(numbers[1], abs=0.002)


def test_logistic_regression_of_one_feature_by_hand():
    # x = -1 and 1 for classes 0 and 1: weights (-w, w) minimise 2 C log(1 + exp(-2 w)) + w^2.
    x, y = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.tensor([0, 1])
    weights, bias = fit(x, y, 1.0)
    w = weights[0, 1]
    torch.testing.assert_close(weights, torch.stack([-w, w])[None], rtol=0, atol=1e-6)
    torch.testing.assert_close(bias, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(2 * w, 4 / (1 + (2 * w).exp()), rtol=0, atol=1e-5)  # the derivative is zero


def test_the_penalty_is_chosen_on_the_held_out_part_and_fitted_to_all(digits):
    x, y, *_ = digits
    head = logistic_probe(x, y, penalties=(1e-6, 0.1))
    assert isinstance(head, Head)
    assert head.settings == {"c": 0.1}
    weights, _ = fit(x, y, 0.1)
    torch.testing.assert_close(head.weights, weights, rtol=0, atol=1e-3)  # the same optimum, from another start


def test_the_penalty_is_chosen_by_scikit_learns_held_out_accuracy():
    """Of few noisy features in many dimensions all that was fitted to is right, whatever the penalty."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 200, generator=draw, dtype=torch.float64)
    features[:, :3] += F.one_hot(labels, 3)
    penalties = (1e-3, 1e-1, 1e3)
    rows, held = hold_out(labels)
    expected = []
    for c in penalties:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            oracle = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(features[rows].numpy(), labels[rows].numpy())
        expected.append(oracle.score(features[held].numpy(), labels[held].numpy()))
    assert max(expected) < 0.9
    head = logistic_probe(features, labels, penalties=penalties)
    assert [accuracy for _, accuracy in head.held_out] == pytest.approx(expected, abs=0.04)  # one image of 30
    assert head.settings["c"] == penalties[max(range(3), key=expected.__getitem__)]


def test_the_attentive_head_is_its_formula():
    head, tokens = AttentiveHead(8, 3, heads=2).eval(), torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0))
    normed = tokens / (1 + 1e-6) ** 0.5  # the running statistics are still 0 and 1
    keys, values = normed @ head.key.weight.T, normed @ head.value.weight.T
    gathered = []
    for k in range(2):
        part = slice(4 * k, 4 * k + 4)
        attention = (keys[..., part] @ head.query[k, 0] / 4**0.5).softmax(-1)
        gathered.append((attention[..., None] * values[..., part]).sum(1))
    expected = (torch.cat(gathered, -1) @ head.classify.weight.T + head.classify.bias).softmax(-1)
    torch.testing.assert_close(head.probabilities(tokens), expected.detach())


def test_an_attentive_probe_finds_a_patch_that_the_mean_buries():
    # One of 16 tokens carries the class, by a mark in dimension 0; the others carry a class too, of no meaning.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(900) % 3
    words = torch.randint(0, 3, (900, 16), generator=generator)
    place = torch.randint(0, 16, (900,), generator=generator)
    words[torch.arange(900), place] = labels
    marks = F.one_hot(place, 16)[..., None]
    tokens = torch.cat([marks, F.one_hot(words, 3), torch.zeros(900, 16, 4)], -1).float()
    settings = Settings(rates=(0.01,), batch_size=128, epochs=30, heads=2)
    head, accuracy = attentive_probe(tokens[:600], labels[:600], settings)
    assert accuracy == {}  # of one rate nothing is chosen
    assert top(head.probabilities(tokens[600:]), labels[600:]) > 0.95
    mean = probe(tokens[:600].mean(1), labels[:600], GRID)
    assert top(mean.probabilities(tokens[600:].mean(1)), labels[600:]) < 0.75


def test_an_attentive_head_is_trained_at_the_rate_that_was_best_on_held_out_images():
    labels = torch.arange(120) % 3
    tokens = F.one_hot(labels, 4)[:, None].float()
    settings = Settings(rates=(1e-9, 0.01, 1e-8), batch_size=32, epochs=30)
    head, accuracy = attentive_probe(tokens, labels, settings)
    assert accuracy[0.01] > max(accuracy[1e-9], accuracy[1e-8])
    alone, _ = attentive_probe(tokens, labels, replace(settings, rates=(0.01,)))
    assert torch.equal(head.probabilities(tokens), alone.probabilities(tokens))


@pytest.mark.timing
@pytest.mark.slow
def test_many_heads_cost_little_more_than_one():
    """Of a probe, that is the features of 4,000 images and the training on them; the least of three turns each."""
    accelerator, vit = start(threads=1), ViT.variant("XS/8", image_size=32)
    source = open_source("shapes:n=4000", image_size=32)
    seconds = {}
    for rates in ((0.1,), DINOV2.rates) * 3:
        began = time.perf_counter()
        actual = extract(vit, source, EvalView(32), accelerator, readouts=("mean",))
        probe(actual.by_readout["mean"], actual.labels, replace(GRID, rates=rates, decays=(0.0,)))
        seconds[rates] = min(seconds.get(rates, 1e9), time.perf_counter() - began)
    assert seconds[DINOV2.rates] < 1.5 * seconds[(0.1,)]
    x, labels, alone = torch.randn(10_000, 384), torch.randint(10, (10_000,)), {}
    for rates in ((0.1,), DINOV2.rates) * 5:
        began = time.perf_counter()
        probe(x, labels, replace(GRID, rates=rates, decays=(0.0,), epochs=5))
        alone[rates] = min(alone.get(rates, 1e9), time.perf_counter() - began)
    print(f"the heads alone: {alone[DINOV2.rates] / alone[(0.1,)]:.2f} times")


@pytest.mark.timing
@pytest.mark.slow
def test_extraction_is_the_forward_pass_for_85_percent_of_its_time():
    accelerator, vit, forward, spent = start(), ViT.variant("XS/7", image_size=28), ViT.forward, []

    class Timed(ViT):
        def forward(self, *arguments):
            began = time.perf_counter()
            encoded = forward(self, *arguments)
            spent.append(time.perf_counter() - began)
            return encoded

    vit.__class__ = Timed
    source = open_source("shapes:n=20000", image_size=28)
    began = time.perf_counter()
    extract(vit, source, EvalView(28), accelerator)
    share = sum(spent) / (time.perf_counter() - began)
    print(f"{100 * share:.1f} % of extraction is the forward pass")
    assert share > 0.85
