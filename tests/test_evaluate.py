"""Protocols against scikit-learn, closed forms and toy sets; extraction sees every image once, in order."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge

from sslvit.data.labels import Labels
from sslvit.data.source import ArraySource
from sslvit.data.views import Plain
from sslvit.distributed import start
from sslvit.evaluate.features import extract
from sslvit.evaluate.fewshot import choose_shots, fewshot, ridge
from sslvit.evaluate.knn import knn, knn_votes
from sslvit.evaluate.logistic import fit
from sslvit.vit import ViT


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, ...]:
    """Features of a random ViT: 1200 digits to learn from, 597 to be asked about."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    vit = ViT(image_size=8, patch_size=2, width=32, depth=2, heads=2, channels=1).eval()
    with torch.no_grad():
        x = vit(pixels).patches.mean(1)
    labels = torch.tensor(labels)
    return x[:1200], labels[:1200], x[1200:], labels[1200:]


def test_knn_votes_are_those_of_a_loop_in_numpy(digits):
    train, labels, test, test_labels = digits
    a, b = (F.normalize(x.double(), dim=-1).numpy() for x in (train, test))
    similarity = b @ a.T
    winners = []
    for row in similarity:
        votes = np.zeros(10)
        for i in np.argsort(-row, kind="stable")[:20]:
            votes[labels[i]] += np.exp(row[i] / 0.07)
        winners.append(votes.argmax())
    assert torch.equal(knn_votes(train.double(), labels, test.double()).argmax(-1), torch.tensor(winners))
    assert knn(train.double(), labels, test.double(), test_labels) == pytest.approx(
        float((np.array(winners) == test_labels.numpy()).mean()), abs=1e-7
    )


@pytest.mark.parametrize("chunk", [1, 7, 597, 10_000])
def test_knn_does_not_depend_on_its_chunks(digits, chunk):
    train, labels, test, _ = digits
    winners = knn_votes(train, labels, test, chunk=chunk).argmax(-1)
    assert torch.equal(winners, knn_votes(train, labels, test).argmax(-1))


def test_knn_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 1, 1])
    votes = knn_votes(train, labels, torch.tensor([[2.0, 0.0]]), k=20, temperature=1.0)
    # relative to the best similarity, 1: exp(0) for class 0; exp(0 - 1) + exp(0.1 / sqrt(1.01) - 1) for class 1
    expected = [1.0, np.exp(-1) + np.exp(0.1 / 1.01**0.5 - 1)]
    torch.testing.assert_close(votes[0], torch.tensor(expected, dtype=torch.float32))
    assert knn(train, labels, train, labels, k=1) == 1.0


@pytest.mark.parametrize(("n", "d"), [(300, 33), (20, 33)], ids=["primal", "dual"])
def test_ridge_weights_are_scikit_learns(digits, n, d):
    x = F.pad(digits[0][:n].double(), (0, 1), value=100.0)
    assert x.shape[1] == d
    y = 2.0 * F.one_hot(digits[1][:n], 10).double() - 1
    oracle = Ridge(alpha=2.0**10, fit_intercept=False, solver="cholesky").fit(x.numpy(), y.numpy()).coef_.T
    torch.testing.assert_close(ridge(x, y), torch.tensor(oracle), rtol=1e-4, atol=1e-9)


def test_shots_are_balanced_drawn_and_seeded(digits):
    labels = digits[1]
    rows = choose_shots(labels, 5, seed=0)
    assert torch.equal(labels[rows].bincount(), torch.full((10,), 5))
    assert torch.equal(rows, choose_shots(labels, 5, seed=0))
    assert not torch.equal(rows, choose_shots(labels, 5, seed=1))
    scarce = torch.tensor([0, 0, 0, 1])
    assert torch.equal(scarce[choose_shots(scarce, 2, seed=0)].bincount(), torch.tensor([2, 1]))


def test_few_shot_reports_mean_and_spread_of_its_draws(digits):
    result = fewshot(*digits, shots=5, draws=3)
    assert len(set(result.draws)) > 1
    assert result.mean == pytest.approx(np.mean(result.draws))
    assert result.spread == pytest.approx(np.std(result.draws))


def test_separable_classes_are_separated():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    x = 10 * F.one_hot(labels, 3) + torch.randn(300, 3, generator=generator)
    assert fewshot(x[:150], labels[:150], x[150:], labels[150:], shots=10).mean == 1.0
    assert knn(x[:150], labels[:150], x[150:], labels[150:]) == 1.0


def test_logistic_regression_is_scikit_learns(digits):
    train, labels, test, test_labels = digits
    mean, deviation = train.mean(0), train.std(0, correction=0) + 1e-5
    a, b = ((x - mean) / deviation for x in (train, test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its deprecations are not ours
        oracle = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8).fit(a.numpy(), labels.numpy())
    weight, bias = fit(a.double(), labels, 1.0, steps=2000)
    ours = (a.double() @ weight + bias).softmax(-1)
    torch.testing.assert_close(ours, torch.tensor(oracle.predict_proba(a.numpy())).double(), rtol=0, atol=1e-3)
    accuracy = float((oracle.predict(b.numpy()) == test_labels.numpy()).mean())
    mine = ((b.double() @ weight + bias).argmax(-1) == test_labels).double().mean()
    assert float(mine) == pytest.approx(accuracy, abs=0.002)


def numbered(size: int) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (size, 3, 8, 8), np.uint8)
    return ArraySource(pixels, name="noise", fingerprint=str(size), labels=Labels(np.arange(size), None, ""))


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_extraction_sees_each_image_once_in_order_whatever_the_batch(size):
    accelerator = start(threads=1)
    vit = ViT(image_size=8, patch_size=4, width=16, depth=1, heads=1)
    source = numbered(size)
    whole = extract(vit, source, Plain(8), accelerator)
    single = extract(vit, source, Plain(8), accelerator, batch_size=1)
    assert torch.equal(whole.ids, torch.arange(size))
    assert torch.equal(whole.labels, torch.arange(size))
    images = torch.from_numpy(source.pixels) / 255
    with torch.no_grad():
        encoded = vit.eval()(images)
    torch.testing.assert_close(whole.by_readout["mean"], encoded.patches.mean(1))
    torch.testing.assert_close(whole.by_readout["cls"], encoded.cls)
    for readout in ("cls", "mean", "both"):
        torch.testing.assert_close(whole.by_readout[readout], single.by_readout[readout], rtol=1e-5, atol=1e-6)
