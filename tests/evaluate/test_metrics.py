"""Metrics, splits of labels, saved predictions, near-duplicates: toy sets with answers known by hand."""

import io
import json
import re
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from sslvit.__main__ import main
from sslvit.data.readers import shapes
from sslvit.data.source import ArraySource
from sslvit.data.spec import open_source
from sslvit.errors import NoInput
from sslvit.evaluate.metrics import calibration_error, confusion, metrics, top
from sslvit.evaluate.near_duplicates import find_near_duplicates, near_duplicates_of_run, thumbnails
from sslvit.evaluate.predictions import Predictions, load_predictions, paired, save_predictions
from sslvit.evaluate.split import choose_fraction, choose_shots, hold_out, places


def scored(images: int = 500, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (images,), generator=generator)
    scores = torch.randn(images, classes, generator=generator)
    scores[torch.arange(images), labels] += 1.5
    return scores.softmax(-1), labels


def test_metrics_are_scikit_learns():
    probabilities, labels = scored()
    actual = metrics(probabilities, labels)
    y, p = labels.numpy(), probabilities.numpy()
    assert actual.top1 == pytest.approx((p.argmax(1) == y).mean())
    assert actual.top5 == pytest.approx(top_k_accuracy_score(y, p, k=5))
    assert actual.mean_per_class == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
    assert np.array_equal(confusion(probabilities, labels).numpy(), confusion_matrix(y, p.argmax(1)))


def test_mean_per_class_counts_a_rare_class_as_much_as_a_common_one():
    scores = torch.tensor([[1.0, 0.0]] * 10)
    labels = torch.tensor([0] * 9 + [1])
    assert top(scores, labels) == 0.9
    assert metrics(scores, labels).mean_per_class == 0.5


def test_a_constant_score_is_right_about_as_many_classes_as_it_may_name():
    labels = torch.arange(10)
    assert top(torch.zeros(10, 10), labels) == 0.1
    assert top(torch.zeros(10, 10), labels, 5) == 0.5


def test_a_class_that_was_never_learned_is_wrong_and_no_crash():
    scores, labels = torch.eye(2), torch.tensor([0, 4])
    assert top(scores, labels) == 0.5
    assert confusion(scores, labels).shape == (5, 5)
    assert confusion(scores, labels)[4, 1] == 1


def test_calibration_error_by_hand():
    # Ten at confidence 0.8 of which six are right, ten at 0.6 of which all are: (|0.6 - 0.8| + |1 - 0.6|) / 2.
    probabilities = torch.tensor([[0.8, 0.2]] * 10 + [[0.6, 0.4]] * 10, dtype=torch.float64)
    labels = torch.tensor([0] * 6 + [1] * 4 + [0] * 10)
    assert calibration_error(probabilities, labels) == pytest.approx(0.3)
    sure = torch.eye(3, dtype=torch.float64)
    assert calibration_error(sure, torch.arange(3)) == 0.0
    assert calibration_error(sure, (torch.arange(3) + 1) % 3) == 1.0
    with pytest.raises(ValueError, match="probabilities"):
        calibration_error(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))


def test_places_are_a_permutation_within_each_class():
    labels = torch.tensor([2, 0, 0, 2, 1, 0, 2, 2])
    actual = places(labels, 0, "shots")
    for label in range(3):
        assert sorted(actual[labels == label].tolist()) == list(range(int((labels == label).sum())))
    assert not torch.equal(places(torch.zeros(50).long(), 0, "a"), places(torch.zeros(50).long(), 1, "a"))


def test_shots_are_balanced_seeded_and_nested():
    labels = torch.arange(200) % 10
    five = choose_shots(labels, 5, seed=0)
    assert torch.equal(labels[five].bincount(), torch.full((10,), 5))
    assert torch.equal(five, choose_shots(labels, 5, seed=0))
    assert not torch.equal(five, choose_shots(labels, 5, seed=1))
    assert set(choose_shots(labels, 1, seed=0).tolist()) < set(five.tolist())
    scarce = torch.tensor([0, 0, 0, 1])
    assert torch.equal(scarce[choose_shots(scarce, 2, seed=0)].bincount(), torch.tensor([2, 1]))


def test_fractions_are_stratified_nested_and_never_empty():
    labels = torch.cat([torch.zeros(1000), torch.ones(500), torch.full((3,), 2)]).long()
    one, ten, all_ = (choose_fraction(labels, fraction, seed=0) for fraction in (0.01, 0.1, 1.0))
    assert labels[one].bincount().tolist() == [10, 5, 1]
    assert labels[ten].bincount().tolist() == [100, 50, 1]
    assert set(one.tolist()) < set(ten.tolist())
    assert torch.equal(all_, torch.arange(1503))
    for fraction in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match="fraction"):
            choose_fraction(labels, fraction, seed=0)


def test_held_out_images_are_apart_stratified_and_leave_no_class_behind():
    labels = torch.cat([torch.zeros(100), torch.ones(40), torch.full((2,), 2), torch.full((1,), 3)]).long()
    rows, held = hold_out(labels, 0.1)
    assert sorted([*rows.tolist(), *held.tolist()]) == list(range(143))
    assert labels[held].bincount(minlength=4).tolist() == [10, 4, 1, 0]
    with pytest.raises(ValueError, match="no class has two"):
        hold_out(torch.arange(5))


def test_predictions_come_back_and_pair_by_id(tmp_path):
    probabilities, labels = scored(20)
    ids = torch.arange(100, 120)
    file = tmp_path / "runs" / "predictions.parquet"
    for _ in range(2):  # an older file is replaced
        save_predictions(file, Predictions(ids, labels, probabilities, {"model": "a", "k": 20}))
    back = load_predictions(file)
    assert torch.equal(back.ids, ids)
    assert torch.equal(back.labels, labels)
    assert torch.equal(back.probabilities, probabilities)
    assert back.about == {"model": "a", "k": 20}
    table = pq.read_table(file).to_pylist()  # as any other tool reads it
    assert table[3]["id"] == 103
    assert table[3]["prediction"] == int(probabilities[3].argmax())
    assert [path.name for path in file.parent.iterdir()] == ["predictions.parquet"]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = Predictions(ids[order], labels[order], probabilities[order], {})
    first, second = paired(back, shuffled)
    assert torch.equal(first.probabilities, second.probabilities)
    with pytest.raises(ValueError, match="20 and 19 ids, 19 in common"):
        paired(back, Predictions(ids[1:], labels[1:], probabilities[1:], {}))
    with pytest.raises(ValueError, match="not all different"):
        save_predictions(file, Predictions(torch.zeros(20).long(), labels, probabilities, {}))


def test_two_files_of_predictions_are_compared_image_by_image(tmp_path, capsys, monkeypatch):
    labels, ids = torch.arange(400) % 4, torch.arange(400)
    right = F.one_hot(labels, 4).float()
    wrong = right.roll(1, -1)
    first = torch.where((ids < 300)[:, None], right, wrong)  # right on 300, of which 100 the second is not
    second = torch.where(((ids >= 100) & (ids < 340))[:, None], right, wrong)
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    save_predictions(files[0], Predictions(ids, labels, first, {"model": "one"}))
    save_predictions(files[1], Predictions(ids.flip(0), labels.flip(0), second.flip(0), {"model": "two"}))
    monkeypatch.setattr(sys, "argv", ["sslvit", "pair", *map(str, files)])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"first: {files[0]}, 75.00%, model one")
    assert lines[1].startswith(f"second: {files[1]}, 60.00%, model two")
    assert lines[2] == (
        "of 400 images both are right on 200, the first alone on 100, the second alone on 40, neither on 60"
    )
    # The gaps are +1, -1 and 0: mean 0.15, deviation sqrt(0.35 - 0.15^2) = 0.572, so 1.96 errors are 5.6 points.
    low, high = map(float, re.search(r"\+15\.0 points, 95% CI \[(.*), (.*)\]", lines[3]).groups())
    assert low == pytest.approx(15 - 5.6, abs=0.3)
    assert high == pytest.approx(15 + 5.6, abs=0.3)
    assert "seeds were not measured" in lines[3]


def test_a_file_that_holds_no_predictions_is_refused(tmp_path):
    with pytest.raises(NoInput, match="there is no such file"):
        load_predictions(tmp_path / "no.parquet")
    file = tmp_path / "other.parquet"
    file.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="holds no predictions"):
        load_predictions(file)
    pq.write_table(pa.table({"id": [1], "label": [2]}), file)
    with pytest.raises(ValueError, match=r"no columns \['probabilities'\]"):
        load_predictions(file)


def photos(first: int, count: int, size: int = 48) -> np.ndarray:
    return shapes.make(torch.arange(first, first + count), size).numpy()


def named(pixels: np.ndarray) -> ArraySource:
    return ArraySource(np.ascontiguousarray(pixels), name="photos", fingerprint="")


def compressed(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file)).transpose(2, 0, 1)


def test_planted_copies_are_found_in_any_guise_and_nothing_else_is():
    seen = photos(0, 600)
    copies = [
        seen[17],
        seen[99][:, :, ::-1],  # mirrored
        compressed(seen[250]),
        (seen[431].astype(np.float64) * 0.6 + 40).astype(np.uint8),  # of other contrast and brightness
    ]
    test = np.concatenate([photos(10_000, 200), np.stack(copies), np.full((1, 3, 48, 48), 9, np.uint8)])
    actual = find_near_duplicates(thumbnails(named(seen)), thumbnails(named(test)))
    assert actual.ids.tolist() == [200, 201, 202, 203]
    assert actual.twins.tolist() == [17, 99, 250, 431]
    assert actual.similarity.min() > 0.99
    assert str(actual) == "4 of 205 test images (1.95%) have a near-duplicate in pretraining"


def test_in_a_set_in_which_all_are_alike_only_copies_count():
    draw = torch.Generator().manual_seed(0)
    one, noise = torch.randn(256, generator=draw), 0.08 * torch.randn(500, 256, generator=draw)
    alike = one + noise
    alike = F.normalize(alike - alike.mean(1, keepdim=True)).view(-1, 1, 16, 16)
    seen, test = alike[:450], alike[450:]
    assert (test.flatten(1) @ seen.flatten(1).T).max(1).values.min() > 0.99
    assert len(find_near_duplicates(seen, test).ids) == 0
    nearly = F.normalize(seen[7].flatten() + 0.002 * torch.randn(256, generator=draw), dim=0).view(1, 1, 16, 16)
    actual = find_near_duplicates(seen, torch.cat([test, nearly, seen[9:10].flip(-1)]))
    assert (actual.ids.tolist(), actual.twins.tolist()) == ([50, 51], [7, 9])
    assert len(find_near_duplicates(seen[7:8].repeat(40, 1, 1, 1), nearly).ids) == 1  # of 40 copies none stands out


def test_a_resized_copy_is_a_near_duplicate():
    actual = find_near_duplicates(thumbnails(named(photos(0, 50, 96))), thumbnails(named(photos(0, 50, 64))))
    assert torch.equal(actual.ids, actual.twins)
    assert len(actual.ids) > 45  # rendered anew at another size, fine textures differ


def test_images_without_contrast_match_nothing():
    grey = named(np.full((5, 3, 32, 32), 128, np.uint8))
    assert len(find_near_duplicates(thumbnails(grey), thumbnails(grey)).ids) == 0


def test_near_duplicates_are_sought_among_the_images_that_a_run_was_trained_on(tmp_path):
    (tmp_path / "model").mkdir()
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "set.npz", x_train=draw.integers(0, 256, (40, 32, 32, 3), np.uint8))
    source = open_source(f"npz:{tmp_path}/set.npz", image_size=32)
    for images, expected in ((0, 40), (15, 15)):
        config = {"data": f"npz:{tmp_path}/set.npz", "image_size": 32, "images": images}
        (tmp_path / "config.json").write_text(json.dumps(config))
        sentence, actual = near_duplicates_of_run(tmp_path, "", source, np.arange(40))
        assert sentence.startswith(f"{expected} of 40 test images")
        assert len(actual.ids) == expected
