"""The dense probe: scores against torchmetrics and scikit-learn, windows, the bank of patches, the heads."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from sslvit import rng
from sslvit.data.masks import open_masked
from sslvit.errors import DataError, NoInput
from sslvit.evaluate.dense import bank as banks
from sslvit.evaluate.dense.bank import Bank, fill
from sslvit.evaluate.dense.options import DenseOptions, held_out
from sslvit.evaluate.dense.probe import numbers_of, probed
from sslvit.evaluate.dense.probes import majority, moments, nearest_patches, of_patches, predictions, regression, scored
from sslvit.evaluate.dense.scores import count, difference, gathered
from sslvit.evaluate.dense.windows import RawPixels, Seen, Window, patch_classes, patch_features, stitched
from sslvit.models.readout import Encoded
from sslvit.models.vit import ViT
from sslvit.reports.segmented import middle

CPU = torch.device("cpu")


def maps(seed, images=6, classes=5, size=9):
    """Predictions that are often right, and masks of which the last class is never seen and some pixels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, classes - 1, (images, size, size), generator=generator).to(torch.uint8)
    wrong = torch.rand(masks.shape, generator=generator) < 0.4
    predicted = torch.where(
        wrong, torch.randint(0, classes - 1, masks.shape, generator=generator).to(torch.uint8), masks
    )
    masks[torch.rand(masks.shape, generator=generator) < 0.1] = 255
    return predicted, masks


def counts_of(predicted, masks, classes=5):
    return gathered([count(one, mask, classes) for one, mask in zip(predicted, masks, strict=True)])


def test_mean_iou_by_hand():
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [255, 255, 255, 255]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 1], [2, 2, 2, 1], [3, 3, 3, 3]], dtype=torch.uint8)
    counts = counts_of(predicted[None], mask[None], classes=4)
    # Class 0: 4 of 6 pixels; 1: 2 of 5; 2: 3 of 4; 3 is predicted in ignored pixels alone.
    assert counts.iou.tolist() == pytest.approx([4 / 6, 2 / 5, 3 / 4, float("nan")], nan_ok=True)
    assert counts.mean_iou == pytest.approx((4 / 6 + 2 / 5 + 3 / 4) / 3)
    assert counts.pixel_accuracy == 9 / 12


def test_mean_iou_is_scikit_learns_and_torchmetrics():
    predicted, masks = maps(0)
    counts, seen = counts_of(predicted, masks), masks != 255
    of_sklearn = jaccard_score(masks[seen], predicted[seen], average=None, labels=range(4))
    assert counts.iou[:4].tolist() == pytest.approx(of_sklearn.tolist(), abs=1e-12)
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.JaccardIndex("multiclass", num_classes=5, ignore_index=255, average="none")
    assert metric(predicted.long(), masks.long())[:4].tolist() == pytest.approx(of_sklearn.tolist(), abs=1e-6)
    macro = torchmetrics.JaccardIndex("multiclass", num_classes=5, ignore_index=255)
    assert counts.mean_iou == pytest.approx(float(macro(predicted.long(), masks.long())), abs=1e-6)


def test_the_interval_is_the_bootstraps_and_a_difference_is_paired():
    predicted, masks = maps(1, images=30)
    counts, generator = counts_of(predicted, masks), np.random.default_rng(5)
    means = []
    for _ in range(2000):
        rows = generator.integers(0, 30, 30)
        seen = masks[rows] != 255
        means.append(jaccard_score(masks[rows][seen], predicted[rows][seen], average="macro"))
    assert counts.interval()[1:] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=4e-3)
    assert difference([counts], [counts])[:3] == (0, 0, 0)
    other = counts_of(maps(2, images=30)[0], masks)
    gap, by_itself = difference([counts], [other]), counts.interval()
    assert gap.mean == pytest.approx(counts.mean_iou - other.mean_iou)
    assert gap.low < gap.mean < gap.high
    seeds = difference([counts, counts], [other, counts])
    assert seeds.mean == pytest.approx(gap.mean / 2)
    assert seeds.high - seeds.low > by_itself.high - by_itself.low  # two seeds that disagree


@pytest.mark.parametrize(
    ("length", "side", "stride", "starts"),
    [(512, 512, 341, [0]), (513, 512, 341, [0, 1]), (853, 512, 341, [0, 341]), (900, 512, 341, [0, 341, 388])],
)
def test_windows_are_mmsegmentations(length, side, stride, starts):
    # mmseg/models/segmentors/encoder_decoder.py: max(length - crop + stride - 1, 0) // stride + 1 windows.
    assert Window(side, stride).starts(length) == starts
    assert len(starts) == max(length - side + stride - 1, 0) // stride + 1


def test_the_default_stride_is_two_thirds():
    assert Window(512).starts(1024) == Window(512, 341).starts(1024)


def test_an_image_is_covered_by_windows_and_its_shorter_side_fits():
    image = torch.randint(0, 256, (3, 40, 100), dtype=torch.uint8)
    windows = Window(20).of(0, image, torch.zeros(40, 100, dtype=torch.uint8))
    assert windows.size == (20, 50)
    assert windows.corners.tolist() == [[0, 0], [0, 13], [0, 26], [0, 30]]
    exact = Window(40).of(0, image, torch.zeros(40, 100, dtype=torch.uint8))
    assert torch.equal(exact.image[0], image[:, :, :40])


def test_shares_of_a_patch_and_ignored_pixels_by_hand():
    labels = torch.tensor([[[0, 0, 1, 255], [0, 2, 255, 255], [1, 1, 255, 255], [1, 1, 255, 255]]], dtype=torch.uint8)
    shares = patch_classes(labels, (2, 2), 3)
    assert shares[0, 0].tolist() == [[0.75, 0, 0.25], [0, 1, 0]]
    assert shares[0, 1].tolist() == [[0, 1, 0], [0, 0, 0]]


def test_scores_of_overlapping_windows_are_averaged():
    mask = torch.zeros(4, 6, dtype=torch.uint8)
    windows = Window(4, 2).of(0, torch.zeros(3, 4, 6, dtype=torch.uint8), mask)
    assert windows.corners.tolist() == [[0, 0], [0, 2]]
    # Class 0 scores 1 in the first window and 0 in the second; class 1 scores .4 everywhere.
    scores = torch.stack([torch.tensor([1.0, 0.4]), torch.tensor([0.0, 0.4])])[:, :, None, None].expand(2, 2, 4, 4)
    assert stitched(scores, windows)[0].tolist() == [0, 0, 0, 0, 1, 1]


def bank_of(rows=300, width=6, classes=3, images=10):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    features = torch.randn(rows, width, generator=generator) * torch.arange(1, width + 1) + labels[:, None]
    shares = torch.nn.functional.one_hot(labels, classes).half()
    return Bank(features, shares, torch.arange(rows) * images // rows), labels


def test_nearest_patches_are_scikit_learns_neighbours():
    bank, labels = bank_of()
    queries = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    model = KNeighborsClassifier(7, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    model.fit(bank.features.double(), labels)
    votes = nearest_patches(bank, k=7, temperature=0.07)(queries)
    assert votes.numpy() == pytest.approx(model.predict_proba(queries.double()), abs=1e-5)


def test_a_bank_in_parts_has_the_same_neighbours(monkeypatch):
    bank, _ = bank_of()
    queries = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    whole = nearest_patches(bank, k=7)(queries)
    monkeypatch.setattr("sslvit.evaluate.dense.probes.PART", 64)
    assert torch.equal(nearest_patches(bank, k=7)(queries), whole)


@pytest.mark.parametrize("rows", [100, 1 << 17])
def test_regression_is_scikit_learns_at_the_chosen_penalty(monkeypatch, rows):
    monkeypatch.setattr("sslvit.evaluate.logistic.ROWS", rows)  # 100: in pieces, as a mapped bank is
    bank, labels = bank_of()
    fitted = regression(bank, 3)
    mean, deviation = moments(bank.features)
    standard = ((bank.features - mean) / deviation).double()
    oracle = LogisticRegression(C=fitted.c, tol=1e-10, max_iter=10_000).fit(standard, labels)
    ours = fitted.scores(bank.features).softmax(-1).double().numpy()
    assert ours == pytest.approx(oracle.predict_proba(standard), abs=2e-4)


def test_moments_in_pieces(monkeypatch):
    monkeypatch.setattr("sslvit.evaluate.dense.probes.ROWS", 7)
    bank, _ = bank_of()
    mean, deviation = moments(bank.features)
    assert torch.allclose(mean, bank.features.double().mean(0).float())
    assert torch.allclose(deviation, bank.features.double().std(0).float() + 1e-5)


class Patches(nn.Module):
    """The mean colour of each 8 x 8 patch."""

    def grid_of(self, images):
        return images.shape[2] // 8, images.shape[3] // 8

    def forward(self, images):
        return Encoded(None, torch.nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2))


def test_a_mapped_bank_equals_one_in_memory_and_a_full_disk_is_refused(tmp_path, monkeypatch):
    source = open_masked("shapes:scenes,n=12", image_size=32)

    def filled(**options):
        seen = patch_features(Patches(), source, np.arange(12), Window(32), CPU, batch_size=5)
        return fill(seen, 12, 22, folder=tmp_path, **options)

    whole = filled()
    assert whole.features.shape == (12 * 16, 3)
    assert not list(tmp_path.iterdir())
    mapped = filled(memory=100.0)
    assert (tmp_path / "features").stat().st_size == 12 * 16 * 3 * 4
    assert (tmp_path / "classes").stat().st_size == 12 * 16 * 22 * 2
    for one, other in zip(whole, mapped, strict=True):
        assert torch.equal(one, other)
    half = filled(memory=100.0, half=True)
    assert (tmp_path / "features").stat().st_size == 12 * 16 * 3 * 2
    assert torch.equal(half.features, whole.features.half())
    assert filled(patches=10**9, memory=1e6).features.shape == whole.features.shape  # there are no more than these
    some = filled(patches=60)
    assert some.images.bincount().tolist() == [5] * 12
    monkeypatch.setattr(banks.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 2000})())
    with pytest.raises(NoInput, match=r"take 0.0 GB .* where 0.0 GB are free: take fewer by --patches"):
        filled(memory=100.0)


def test_a_bank_moves_to_the_disk_when_later_images_turn_out_larger(tmp_path):
    def seen():
        for id, side in enumerate((8, 16, 16, 16)):
            mask = torch.zeros(side, side, dtype=torch.uint8)
            grid = side // 8
            yield Seen(
                Window(side).of(id, torch.zeros(3, side, side, dtype=torch.uint8), mask), torch.rand(1, grid, grid, 4)
            )

    torch.manual_seed(0)
    whole = fill(seen(), 4, 2, folder=None)
    torch.manual_seed(0)
    mapped = fill(seen(), 4, 2, folder=tmp_path, memory=100.0)  # 20 bytes for each of 1 + 4 + 4 + 4 patches
    assert (tmp_path / "features").stat().st_size == 13 * 4 * 4
    for one, other in zip(whole, mapped, strict=True):
        assert torch.equal(one, other)


def test_features_that_are_no_numbers_or_too_large_for_half_precision_are_refused():
    source = open_masked("shapes:scenes,n=2", image_size=32)

    class Scaled(Patches):
        def forward(self, images):
            return Encoded(None, super().forward(images).patches * self.factor)

    for factor, said in ((float("inf"), "not finite"), (1e6, "leave out --half")):
        model = Scaled()
        model.factor = factor
        with pytest.raises(ValueError, match=said):
            fill(patch_features(model, source, np.arange(2), Window(32), CPU), 2, 22, folder=None, half=True)


def test_the_picture_of_an_oblong_image_shows_its_middle_window_and_that_part_of_its_mask():
    columns = torch.arange(90).expand(30, 90)
    windows = Window(30, 20).of(0, columns[None].expand(3, -1, -1).to(torch.uint8), columns.to(torch.uint8))
    image, place = middle(windows)
    assert windows.corners[:, 1].tolist() == [0, 20, 40, 60]
    assert torch.equal(image[0], windows.mask[place])
    small = Window(15, 10).of(0, columns[None].expand(3, -1, -1).to(torch.uint8), columns.to(torch.uint8))
    image, place = middle(small)
    assert windows.mask[place].shape == (30, 30)
    assert abs(float(image[0].float().mean()) - float(windows.mask[place].float().mean())) < 1


def test_features_do_not_depend_on_batches():
    source = open_masked("shapes:scenes,n=7", image_size=64)
    vit = ViT.variant("mu/8", image_size=64)
    one, other = (
        [seen.features for seen in patch_features(vit, source, np.arange(7), Window(64), CPU, batch_size=size)]
        for size in (1, 4)
    )
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(
        one[0][0], vit.feature_map(source.read(np.array([0])).pixels[:, :3] / 255)[0].permute(1, 2, 0)
    )


def test_many_classes_are_enlarged_in_parts_with_the_same_answer(monkeypatch):
    scores = torch.randn(2, 40, 2, 2, generator=torch.Generator().manual_seed(0))
    windows = Window(8, 5).of(0, torch.zeros(3, 16, 26, dtype=torch.uint8), torch.zeros(16, 26, dtype=torch.uint8))
    assert len(windows.corners) == 2
    parts = stitched(scores, windows)
    monkeypatch.setattr("sslvit.evaluate.dense.windows.CLASSES", 40)
    assert torch.equal(parts, stitched(scores, windows))


def test_test_masks_without_any_class_are_refused():
    windows = Window(8).of(0, torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((8, 8), 255, dtype=torch.uint8))
    seen = iter([Seen(windows, torch.zeros(1, 2, 2, 3))])
    with pytest.raises(DataError, match="nothing to score"):
        scored(predictions(seen, {"a": lambda maps: maps.permute(0, 3, 1, 2)}), 3, ("a",))


def test_features_that_hold_the_answer_are_probed_to_all_of_it():
    """Masks of whole patches, whose class is their brightness."""
    values = torch.tensor(np.random.default_rng(0).integers(0, 4, (20, 4, 4)))

    def seen():
        for id, classes in enumerate(values):
            mask = classes.repeat_interleave(8, 0).repeat_interleave(8, 1).to(torch.uint8)
            windows = Window(32).of(id, (mask * 60)[None].expand(3, -1, -1).contiguous(), mask)
            yield Seen(windows, torch.nn.functional.one_hot(classes, 4).float()[None])

    bank = fill(seen(), 20, 4, folder=None)
    heads = {
        "knn": nearest_patches(bank),
        "logistic": regression(bank, 4, penalties=(1.0,)).scores,
        "majority": majority(bank),
    }
    found = scored(predictions(seen(), {name: of_patches(head) for name, head in heads.items()}), 4, tuple(heads))
    # Bilinear enlarging moves the borders between patches by nothing: halfway between centres the larger share wins.
    assert found["knn"].mean_iou > 0.9
    assert found["logistic"].mean_iou > 0.9
    frequent = int(values.flatten().bincount().argmax())
    assert found["majority"].iou[frequent] == pytest.approx((values == frequent).double().mean().item())


def test_the_probe_of_two_models_pairs_them_and_says_which_class_is_hard(tmp_path):
    train, test = (open_masked("shapes:scenes,n=30", split=split, image_size=32) for split in ("train", "test"))
    options = DenseOptions(image_size=32, patches=400, limit_train=20, limit_test=15)
    models = {"colours": Patches(), "raw pixels": RawPixels((8, 8))}
    counts = dict(probed(models, train, test, options, CPU, tmp_path))
    assert set(counts) == {
        "colours, knn", "colours, logistic", "raw pixels, knn", "raw pixels, logistic", "most frequent class",
    }  # fmt: skip
    numbers = numbers_of(counts, test.classes, "colours")
    assert numbers["colours, knn"]["images"] == 15
    assert set(numbers["raw pixels, knn"]["iou"]) == set(test.classes)
    gap = numbers["raw pixels, knn"]["colours minus this"]["mean iou"]
    assert gap == pytest.approx(counts["colours, knn"].mean_iou - counts["raw pixels, knn"].mean_iou)
    assert not list(tmp_path.iterdir())


def test_a_tenth_is_held_out_where_there_is_no_test_split():
    train = open_masked("shapes:scenes,n=40", image_size=32)
    rest, held = held_out(train)
    assert sorted([*rest.rows.tolist(), *held.rows.tolist()]) == list(range(40))
    assert len(held) == 4
    assert torch.equal(held.pair(1)[0], train.pair(int(held.rows[1]))[0])


def test_the_patches_of_an_image_are_drawn_by_its_id_alone():
    order = [rng.permutation(rng.key("patches", torch.tensor([id])), 16)[0].tolist() for id in (3, 3, 4)]
    assert order[0] == order[1] != order[2]
