"""Supervised classification: closed forms, a float64 transcription, torch's own loss, and what mixing keeps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sslvit import rng
from sslvit.errors import DataError
from sslvit.models.resnet import BiT, BiTConfig
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.objective import Batch
from sslvit.objectives.supervised import Supervised, balanced

CLASSES = 5


def small_vit(**changes) -> ViT:
    return ViT(ViTConfig(**({"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 3} | changes)))


def small_bit() -> BiT:
    return BiT(BiTConfig(image_size=16, blocks=(1, 1), width_factor=0.5, root="3x3"))


def hybrid() -> ViT:
    return small_vit(image_size=64, patch_size=16, hybrid="R")


def batch_of(b: int = 6, size: int = 16, dtype: torch.dtype = torch.float32) -> Batch:
    ids = torch.arange(b)
    return Batch((rng.uniform(rng.key(0, ids), 3, size, size).to(dtype),), rng.key(0, "forward", ids), ids % CLASSES)


@torch.no_grad()
def with_a_head(objective: Supervised) -> Supervised:
    """The head starts at zero, which would hide everything behind it."""
    for name, p in objective.head.named_parameters():
        p += 0.3 * rng.normal(rng.key(name), *p.shape)
    return objective


@pytest.mark.parametrize(("backbone", "size"), [(small_vit, 16), (small_bit, 16), (hybrid, 64)])
@pytest.mark.parametrize("options", [{}, {"representation": 12, "label_smoothing": 0.1}, {"mixup": 0.2, "cutmix": 1.0}])
def test_the_first_loss_is_ln_classes(backbone, size, options):
    objective = Supervised(backbone(), classes=CLASSES, **options)
    loss, _ = objective(batch_of(size=size), 0.0)
    assert loss.item() == pytest.approx(math.log(CLASSES), rel=1e-6)
    with_a_head(objective)(batch_of(size=size), 0.0)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("readout", ["cls", "mean", "both"])
@pytest.mark.parametrize("representation", [None, 12])
def test_loss_and_gradients_equal_a_transcription_in_float64(readout, representation):
    weights = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.25])
    options = {"classes": CLASSES, "label_smoothing": 0.1, "class_weights": weights}
    objective = Supervised(small_vit(), readout=readout, representation=representation, **options)
    with_a_head(objective).double()
    batch = batch_of(dtype=torch.float64)
    loss, metrics = objective(batch, 0.5)
    terms, hits = [], 0
    for image, label in zip(batch.views[0], batch.labels.tolist(), strict=True):
        cls, patches = objective.backbone(image[None])
        parts = {"cls": [cls[0]], "mean": [patches[0].sum(0) / len(patches[0])]}
        features = torch.cat(parts.get(readout, parts["cls"] + parts["mean"]))
        if representation:
            features = torch.tanh(objective.pre_logits.weight @ features + objective.pre_logits.bias)
        logits = objective.head.weight @ features + objective.head.bias
        for k in range(CLASSES):
            truth = 0.1 / CLASSES + (0.9 if k == label else 0.0)
            terms.append(float(weights[k]) * truth * (logits.exp().sum().log() - logits[k]))
        hits += int(logits.argmax() == label)
    expected = torch.stack(terms).sum() / len(batch.labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert metrics["accuracy"].item() == pytest.approx(hits / len(batch.labels))
    # A class token that nobody reads moves the mean patch too, through attention.
    trained = dict(objective.named_parameters())
    ours, theirs = (torch.autograd.grad(value, list(trained.values())) for value in (loss, expected))
    for name, a, b in zip(trained, ours, theirs, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()), msg=name)


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_the_loss_of_mixed_images_equals_a_reference_in_float64(options):
    """Images and labels are mixed here by numpy, from the same uniform draws, by the formulas of the two papers."""
    objective = with_a_head(Supervised(small_vit(), classes=CLASSES, label_smoothing=0.1, **options)).double()
    batch = batch_of(b=8, dtype=torch.float64)
    loss, _ = objective(batch, 0.0)
    key = rng.fold(batch.key, "mix")[::2]

    def beta(name: str, alpha: float) -> list[float]:
        draws = rng.uniform(rng.fold(key, name), 64, 2).double().numpy() ** (1 / alpha)
        return [next(x / (x + y) for x, y in pair if 0 < x + y <= 1) for pair in draws]

    images, truth = batch.views[0].numpy(), np.full((8, CLASSES), 0.1 / CLASSES)
    truth[np.arange(8), batch.labels.numpy()] += 0.9
    switch, centre = (rng.uniform(rng.fold(key, name), 2).double().numpy() for name in ("switch", "centre"))
    mixed, soft = images.copy(), truth.copy()
    for pair in range(4):
        own = np.ones((16, 16))
        if "cutmix" not in options or (len(options) == 2 and switch[pair, 0] >= 0.5):
            own *= beta("share", options["mixup"])[pair]
        else:
            half = (1 - beta("box share", 1.0)[pair]) ** 0.5 / 2
            near = [abs((np.arange(16) + 0.5) / 16 - middle) < half for middle in centre[pair]]
            own[np.outer(*near)] = 0
        for one, other in ((2 * pair, 2 * pair + 1), (2 * pair + 1, 2 * pair)):
            mixed[one] = own * images[one] + (1 - own) * images[other]
            soft[one] = own.mean() * truth[one] + (1 - own.mean()) * truth[other]
    logits = objective.head(objective.backbone(torch.from_numpy(mixed)).cls)
    expected = -(torch.from_numpy(soft) * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_the_loss_is_torchs_cross_entropy_of_soft_labels():
    weights = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.25])
    objective = with_a_head(Supervised(small_vit(), classes=CLASSES, label_smoothing=0.2, class_weights=weights))
    batch, seen = batch_of(), []
    objective.head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    loss, _ = objective(batch, 0.0)
    soft = F.one_hot(batch.labels, CLASSES) * 0.8 + 0.04
    torch.testing.assert_close(loss, F.cross_entropy(seen[0], soft, weight=weights), rtol=1e-6, atol=0)


def test_balanced_weights_count_each_class_alike_and_average_one_over_the_images():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    weights = balanced(labels, 3)
    assert weights[labels].mean().item() == pytest.approx(1.0)
    assert (weights * torch.bincount(labels)).tolist() == pytest.approx([100 / 3] * 3)
    assert torch.equal(balanced(labels, 4), torch.cat([weights, torch.zeros(1)]))  # one that is held out
    with pytest.raises(DataError, match="of 2 classes, and labels up to 2"):
        balanced(labels, 2)


@pytest.mark.parametrize(("labels", "message"), [(None, "none"), ([0, 7], "0 to 7"), ([-1, 2], "-1 to 2")])
def test_labels_that_are_missing_or_out_of_range_are_bad_data(labels, message):
    objective, batch = Supervised(small_vit(), classes=CLASSES), batch_of(b=2)
    with pytest.raises(DataError, match=message):
        objective(batch._replace(labels=None if labels is None else torch.tensor(labels)), 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 1}, "1 class"),
        ({"classes": 3, "label_smoothing": 1.0}, "label_smoothing 1.0"),
        ({"classes": 3, "mixup": 1.5}, "mixup 1.5"),
        ({"classes": 3, "class_weights": torch.ones(4)}, r"\(4,\)"),
        ({"classes": 3, "readout": "all"}, "all"),
    ],
)
def test_impossible_arguments_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        Supervised(small_vit(), **options)


def test_evaluation_mixes_nothing():
    objective = with_a_head(Supervised(small_vit(), classes=CLASSES, mixup=0.8))
    plain = with_a_head(Supervised(small_vit(), classes=CLASSES))
    batch = batch_of()
    expected, _ = plain(batch, 0.0)
    assert not torch.equal(objective(batch, 0.0)[0], expected)
    assert torch.equal(objective.eval()(batch, 0.0)[0], expected)


def test_dropout_is_drawn_from_the_key():
    objective = with_a_head(Supervised(small_vit(dropout=0.3), classes=CLASSES))
    batch = batch_of()
    first, _ = objective(batch, 0.0)
    assert torch.equal(objective(batch, 0.0)[0], first)
    assert not torch.equal(objective(batch._replace(key=batch.key + 1), 0.0)[0], first)


def test_the_readout_is_the_class_token_where_there_is_one():
    assert Supervised(small_vit(), classes=2).readout == "cls"
    assert Supervised(small_vit(class_token=False), classes=2).readout == "mean"
    assert Supervised(small_bit(), classes=2).readout == "mean"


@pytest.mark.parametrize("backbone", [small_vit, small_bit])
def test_it_learns_to_tell_dark_from_bright(backbone):
    objective = Supervised(backbone(), classes=2, mixup=0.2)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    ids = torch.arange(32)
    images = 0.3 * rng.uniform(rng.key(0, ids), 3, 16, 16) + 0.4 * (ids % 2)[:, None, None, None]
    for step in range(30):
        loss, _ = objective(Batch((images,), rng.key(0, "forward", step, ids), ids % 2), step / 30)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loss, metrics = objective.eval()(Batch((images,), rng.key(0, ids), ids % 2), 1.0)
    assert metrics["accuracy"] == 1.0
    assert loss < 0.2
