"""kNN and few-shot against scikit-learn, closed forms and toy sets; extraction sees every image once, in order."""

from pathlib import Path

import numpy as np
import preloaded
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from sslvit.data.labels import Labels
from sslvit.data.source import ArraySource
from sslvit.errors import DataError
from sslvit.evaluate.features import extract, left_out
from sslvit.evaluate.fewshot import fewshot, ridge, ridge_scores
from sslvit.evaluate.knn import knn, knn_votes, neighbors
from sslvit.evaluate.probing import ProbeOptions, probed
from sslvit.evaluate.stored import stored
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.processes.collectives import start
from sslvit.views.pretraining import CropFlip, EvalView


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, ...]:
    """Features of a random ViT: 1200 digits to learn from, 597 to be asked about."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    vit = ViT(ViTConfig(image_size=8, patch_size=2, width=32, depth=2, heads=2, channels=1)).eval()
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


def test_knn_predicts_as_scikit_learns(digits):
    train, labels, test, _ = digits
    a, b = (F.normalize(x.double(), dim=-1).numpy() for x in (train, test))

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    oracle = KNeighborsClassifier(20, weights=weights, metric="cosine", algorithm="brute").fit(a, labels.numpy())
    votes = knn_votes(train, labels, test)
    assert np.array_equal(votes.argmax(-1).numpy(), oracle.predict(b))
    np.testing.assert_allclose(votes.numpy(), oracle.predict_proba(b), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 597, 10_000])
def test_knn_does_not_depend_on_its_chunks_by_a_single_bit(digits, chunk):
    train, labels, test, _ = digits
    assert torch.equal(knn_votes(train, labels, test, chunk=chunk), knn_votes(train, labels, test, chunk=64))


def test_similarities_are_exact_sums(digits):
    # Whatever the order of summation: here backwards, one product at a time, against the matrix product.
    train, _, test, _ = digits
    (actual,) = neighbors(train, test[:3], k=5)
    grid = [F.normalize(x.double(), dim=-1).mul(2**25).round().to(torch.int64) for x in (train, test[:3])]
    integers = (grid[1][:, None] * grid[0][None]).sum(-1)
    torch.testing.assert_close(actual.similarity * 2.0**50, integers.gather(1, actual.rows).double(), rtol=0, atol=0)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-7, 0.0])
def test_neighbours_are_the_nearest_however_close_together_features_lie(spread):
    """float32 cannot tell them apart then. Of equals the lower row is nearer."""
    draw = torch.Generator().manual_seed(0)
    train, test = (1 + spread * torch.randn(n, 24, generator=draw) for n in (3000, 50))
    train[1500:] = train[:1500]  # each has a twin
    a, b = (F.normalize(x.double(), dim=-1).mul(2**25).round().to(torch.int64) for x in (train, test))
    products = (b[:, None] * a[None]).sum(-1)
    expected = products.argsort(dim=-1, descending=True, stable=True)[:, :20]
    actual = torch.cat([part.rows for part in neighbors(train, test, k=20, chunk=7)])
    assert torch.equal(actual, expected)


def test_knn_takes_features_that_still_have_their_gradient():
    features, labels = torch.randn(30, 8, requires_grad=True) * 2, torch.arange(30) % 3
    assert knn(features, labels, features, labels, k=1) == 1.0


def test_knn_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 1, 1])
    votes = knn_votes(train, labels, torch.tensor([[2.0, 0.0]]), k=20, temperature=1.0)
    # three neighbours, fewer than k: exp(1) for class 0; exp(0) + exp(0.1 / sqrt(1.01)) for class 1
    raw = torch.tensor([np.exp(1), 1 + np.exp(0.1 / 1.01**0.5)], dtype=torch.float64)
    torch.testing.assert_close(votes[0], raw / raw.sum(), rtol=0, atol=1e-7)
    assert knn(train, labels, train, labels, k=1) == 1.0


def test_a_small_temperature_lets_the_nearest_win_and_a_large_one_the_majority():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.3], [1.0, 0.3]])
    labels, test = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    assert knn_votes(train, labels, test, temperature=1e-5).argmax() == 0
    assert knn_votes(train, labels, test, temperature=10.0).argmax() == 1


def test_features_and_settings_without_meaning_are_refused(digits):
    train, labels, test, _ = digits
    broken = test.clone()
    broken[3, 1] = float("nan")
    with pytest.raises(ValueError, match="1 of the features are not finite"):
        knn_votes(train, labels, broken)
    with pytest.raises(ValueError, match="not finite"):
        ridge_scores(train, labels, broken)
    with pytest.raises(ValueError, match="1199"):
        knn_votes(train, labels[:-1], test)
    for changes in ({"k": 0}, {"temperature": 0.0}, {"chunk": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} 0"):
            knn_votes(train, labels, test, **changes)


@pytest.mark.parametrize(("n", "d"), [(300, 33), (20, 33)], ids=["primal", "dual"])
def test_ridge_weights_are_scikit_learns(digits, n, d):
    x = F.pad(digits[0][:n].double(), (0, 1), value=100.0)
    assert x.shape[1] == d
    y = 2.0 * F.one_hot(digits[1][:n], 10).double() - 1
    oracle = Ridge(alpha=2.0**10, fit_intercept=False, solver="cholesky").fit(x.numpy(), y.numpy()).coef_.T
    torch.testing.assert_close(ridge(x, y), torch.tensor(oracle), rtol=1e-4, atol=1e-9)


def test_ridge_by_hand():
    # One feature, two images: standardised to -1 and 1, beside the constant 100. The columns are orthogonal, so each
    # weight is its own quotient: 2 / (2 + 1024) for the class that is -1, 1; the bias is 0 for balanced targets.
    train, labels = torch.tensor([[3.0], [7.0]]), torch.tensor([0, 1])
    scores = ridge_scores(train, labels, torch.tensor([[5.0], [9.0]]))
    slope = 2 / 1026
    expected = torch.tensor([[0.0, 0.0], [-2 * slope, 2 * slope]], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-8)


def test_primal_and_dual_are_the_same_weights(digits):
    x, y = digits[0][:32].double(), digits[1][:32]
    targets = 2.0 * F.one_hot(y, 10).double() - 1
    square = ridge(x, targets)  # 32 x 32: the primal system
    dual = x.T @ torch.linalg.solve(x @ x.T + 2.0**10 * torch.eye(32), targets)
    torch.testing.assert_close(square, dual, rtol=1e-9, atol=1e-12)


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


def numbered(size: int) -> ArraySource:
    """Noise images whose labels are 10 times their ids."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, 3, 8, 8), np.uint8)
    return ArraySource(pixels, name="noise", fingerprint=str(size), labels=Labels(10 * np.arange(size), None, ""))


def small(**changes) -> ViT:
    return ViT(
        ViTConfig(**({"image_size": 8, "patch_size": 4, "width": 16, "depth": 5, "heads": 1, "registers": 2} | changes))
    )


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_extraction_sees_each_image_once_in_order_whatever_the_batch(size):
    accelerator, vit, source = start(threads=1), small(), numbered(size)
    whole = extract(vit, source, EvalView(8), accelerator)
    single = extract(vit, source, EvalView(8), accelerator, batch_size=1)
    assert torch.equal(whole.ids, torch.arange(size))
    assert torch.equal(whole.labels, 10 * torch.arange(size))
    assert not len(whole.unreadable)
    with torch.no_grad():
        encoded = vit.eval()(torch.from_numpy(source.pixels) / 255)
    torch.testing.assert_close(whole.by_readout["mean"], encoded.patches.mean(1))
    torch.testing.assert_close(whole.by_readout["cls"], encoded.cls)
    for readout in ("cls", "mean", "both"):
        torch.testing.assert_close(whole.by_readout[readout], single.by_readout[readout], rtol=1e-5, atol=1e-6)


def test_images_come_in_the_order_that_was_asked_for():
    accelerator, vit, ids = start(threads=1), small(), np.array([5, 2, 9, 2])
    some = extract(vit, numbered(10), EvalView(8), accelerator, ids=ids, batch_size=3)
    whole = extract(vit, numbered(10), EvalView(8), accelerator)
    assert some.labels.tolist() == [50, 20, 90, 20]
    torch.testing.assert_close(some.by_readout["cls"], whole.by_readout["cls"][ids])


def test_readouts_of_several_blocks_are_their_normed_outputs_joined():
    accelerator, vit, source = start(threads=1), small().eval(), numbered(6)
    readouts = ("cls", "cls:4", "mean:2", "both:4", "patches")
    actual = extract(vit, source, EvalView(8), accelerator, readouts=readouts).by_readout
    # The blocks' own outputs, seen from outside: one class token, two registers, four patches.
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda module, inputs, output: outputs.append(output)) for block in vit.blocks]
    with torch.no_grad():
        vit(torch.from_numpy(source.pixels) / 255)
        last = [vit.norm(output) for output in outputs[-4:]]
    for hook in hooks:
        hook.remove()
    expected = {
        "cls": last[3][:, 0],
        "cls:4": torch.cat([block[:, 0] for block in last], 1),
        "mean:2": torch.cat([block[:, 3:].mean(1) for block in last[2:]], 1),
        "both:4": torch.cat([*(block[:, 0] for block in last), last[3][:, 3:].mean(1)], 1),
        "patches": last[3][:, 3:],
    }
    for readout, features in expected.items():
        torch.testing.assert_close(actual[readout], features, msg=readout)


@pytest.mark.parametrize("readout", ["class", "cls:0", "cls:x", "mean:-1", "patches:2", "cls:6"])
def test_a_readout_that_is_not_there_is_refused(readout):
    with pytest.raises(ValueError, match=r"readout|layers 6 must be among the 5 blocks"):
        extract(small(), numbered(2), EvalView(8), start(threads=1), readouts=(readout,))


def test_every_module_returns_to_the_mode_of_its_own_also_after_an_error():
    vit = small().train()
    vit.blocks[0].eval()
    modes = [module.training for module in vit.modules()]
    extract(vit, numbered(3), EvalView(8), start(threads=1))
    assert [module.training for module in vit.modules()] == modes
    with pytest.raises(ValueError, match="multiple of patch_size"):
        extract(vit, numbered(3), EvalView(9), start(threads=1))
    assert [module.training for module in vit.modules()] == modes


def test_features_are_those_of_eval_mode_and_float32_under_any_precision():
    accelerator, source = start(threads=1), numbered(4)
    vit = small(drop_path=0.5, dropout=0.5).train()  # which would want keys in train mode
    plain = extract(vit, source, EvalView(8), accelerator)
    with torch.autocast("cpu", torch.bfloat16):
        inside = extract(vit, source, EvalView(8), accelerator)
    assert torch.equal(plain.by_readout["cls"], inside.by_readout["cls"])
    assert plain.by_readout["cls"].dtype == torch.float32
    assert not plain.by_readout["cls"].requires_grad


def test_weights_that_are_not_finite_are_an_error_and_no_number():
    vit = small()
    nn.init.constant_(vit.norm.weight, float("inf"))
    with pytest.raises(ValueError, match="features cls of noise are not finite"):
        extract(vit, numbered(2), EvalView(8), start(threads=1))


def test_an_unreadable_image_is_left_out_and_reported():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), np.uint8)
    source = ArraySource(
        pixels, name="one bad", fingerprint="", labels=Labels(np.arange(5), None, ""), bad={3: ("3.png", "truncated")}
    )
    vit, accelerator = small(), start(threads=1)
    actual = extract(vit, source, EvalView(8), accelerator, batch_size=2)
    for values in (actual.ids, actual.labels):
        assert values.tolist() == [0, 1, 2, 4]
    assert actual.unreadable.tolist() == [3]
    good = extract(vit, source, EvalView(8), accelerator, ids=np.array([0, 1, 2, 4]), batch_size=2)
    torch.testing.assert_close(actual.by_readout["cls"], good.by_readout["cls"])
    assert left_out(actual, source) == "1 of 5 images of one bad cannot be read and are left out, e.g. 3.png: truncated"
    assert left_out(good, source) == ""
    with pytest.raises(DataError, match="none of the 1 images of one bad"):
        extract(vit, source, EvalView(8), accelerator, ids=np.array([3]))


def test_an_augmented_version_is_one_thing_for_any_batching_and_another_one_each(tmp_path):
    accelerator, vit, source = start(threads=1), small(), numbered(9)
    options = {"readouts": ("mean",)}
    first, again, second = (
        extract(vit, source, CropFlip(8), accelerator, version=v, batch_size=b, **options).by_readout["mean"]
        for v, b in ((0, 9), (0, 2), (1, 9))
    )
    torch.testing.assert_close(first, again, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first, second, atol=1e-3)
    on_disk = [stored(tmp_path, vit, source, CropFlip(8), accelerator, version=v, **options) for v in (0, 1)]
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(on_disk[0].by_readout["mean"], first)
    assert torch.equal(on_disk[1].by_readout["mean"], second)


def test_workers_change_nothing():
    accelerator, vit, source = start(threads=1), small(), numbered(9)
    none, two = (extract(vit, source, EvalView(8), accelerator, batch_size=2, workers=n) for n in (0, 2))
    assert torch.equal(none.by_readout["both"], two.by_readout["both"])


def numbers_of_digits(batch_size: int) -> dict[str, float]:
    """All that a probe says of a random ViT's digits, 397 of them to be asked about."""
    images, labels = load_digits(return_X_y=True)
    pixels = images.reshape(-1, 1, 8, 8).astype(np.uint8) * 15
    sources = [
        ArraySource(pixels[part], name="digits", fingerprint=str(part), labels=Labels(labels[part], None, ""))
        for part in (slice(800), slice(1400, None))
    ]
    vit = ViT(ViTConfig(image_size=8, patch_size=2, width=32, depth=2, heads=2, channels=1))
    x, y = (extract(vit, source, EvalView(8), start(threads=1), batch_size=batch_size) for source in sources)
    actual = [probed(x, y, readout, ProbeOptions(), {}) for readout in ("cls", "mean")]
    return {f"{i} {name}": value for i, one in enumerate(actual) for name, value in one.numbers.items()}


def on_each(rank: int, folder: Path) -> None:
    """One of two processes: what extract gives it of 1 to 40 images."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    accelerator, vit = start(threads=1), small()
    results = []
    for size in range(1, 41):
        actual = extract(vit, numbered(size), EvalView(8), accelerator, readouts=("cls", "patches"), batch_size=7)
        results.append((actual.ids, actual.labels, actual.by_readout["cls"], actual.by_readout["patches"]))
    torch.save(numbers_of_digits(7), folder / f"numbers {rank}.pt")
    on_disk = stored(folder / "kept", vit, numbered(5), EvalView(8), accelerator)
    again = stored(folder / "kept", vit, numbered(5), EvalView(8), accelerator)
    assert torch.equal(on_disk.by_readout["cls"], again.by_readout["cls"])
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.processes
def test_two_processes_give_the_features_of_one_for_1_to_40_images(tmp_path):
    preloaded.spawn(on_each, (tmp_path,), nprocs=2)
    numbers = numbers_of_digits(256)
    assert len(numbers) == 2 * 6  # 1 % of 800 labels is one a class, of which none can be held out
    for other in (torch.load(tmp_path / "numbers 0.pt"), torch.load(tmp_path / "numbers 1.pt"), numbers_of_digits(1)):
        assert other == numbers
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    accelerator, vit = start(threads=1), small()
    for size, first, second in zip(range(1, 41), *both, strict=True):
        one = extract(vit, numbered(size), EvalView(8), accelerator, readouts=("cls", "patches"))
        for mine, other in zip(first, second, strict=True):
            assert torch.equal(mine, other), size
        assert torch.equal(first[0], torch.arange(size))
        assert torch.equal(first[1], 10 * torch.arange(size))
        torch.testing.assert_close(first[2], one.by_readout["cls"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(first[3], one.by_readout["patches"], rtol=1e-5, atol=1e-6)
