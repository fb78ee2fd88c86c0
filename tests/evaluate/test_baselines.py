"""What no model gives: raw pixels by other people's implementations, and the classes counted by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipes_run import run
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from sslvit.data.spec import open_source
from sslvit.evaluate import baselines as module
from sslvit.evaluate.baselines import Pixels, baselines
from sslvit.processes.collectives import start
from sslvit.views.pretraining import EvalView


def unbalanced(file: Path, size: int = 8) -> str:
    """Of three classes, 90, 5 and 5 % of the images, that differ in brightness a little."""
    draw, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 200), ("test", 100)):
        labels = np.repeat([0, 1, 2], [count * 90 // 100, count * 5 // 100, count * 5 // 100])
        images = draw.integers(0, 150, (count, size, size, 3)) + 40 * labels[:, None, None, None]
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(file, **arrays)
    return f"npz:{file}"


def found_of(data: str, size: int) -> tuple[module.Baselines, list]:
    sources = [open_source(data, split=split, image_size=size) for split in ("train", "test")]
    ids = tuple(np.arange(len(source)) for source in sources)
    return baselines(*sources, ids, EvalView(size), start(threads=1)), sources


def test_raw_pixels_are_the_images_themselves_flattened(tmp_path):
    actual, sources = found_of(unbalanced(tmp_path / "data.npz"), 8)
    assert actual.side == 8
    for features, source in zip((actual.train, actual.test), sources, strict=True):
        pixels = source.read(np.arange(len(source))).pixels
        assert torch.equal(features.by_readout["mean"], pixels.flatten(1) / 255)


def test_large_images_are_reduced_to_32_pixels_as_pillow_does():
    """Pillow's bilinear filter is antialiased too, and rounds to whole numbers of 0 to 255."""
    draw = np.random.default_rng(1)
    pixels = draw.integers(0, 256, (96, 96, 3)).astype(np.uint8)
    actual = Pixels(32)(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255).patches[0, 0].view(3, 32, 32)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    assert (255 * actual.permute(1, 2, 0) - torch.from_numpy(expected.copy())).abs().max() < 1.01


def test_raw_pixels_have_at_most_32_a_side_and_fewer_if_memory_asks_for_it(tmp_path, monkeypatch):
    data = unbalanced(tmp_path / "data.npz", size=40)
    assert found_of(data, 40)[0].side == 32
    monkeypatch.setattr(module, "MOST", 200 * 3 * 5 * 5)
    actual, _ = found_of(data, 40)
    assert actual.side == 5
    assert actual.train.by_readout["mean"].shape == (200, 75)


def test_the_recipes_numbers_are_scikit_learns_on_the_pixels(tmp_path):
    data = unbalanced(tmp_path / "data.npz")
    run("baselines", f"--data {data} --image_size 8 --fractions 1 --out {tmp_path / 'out'} --threads 1")
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert numbers["commonest class"] == numbers["commonest class of all"] == 0.9
    with np.load(tmp_path / "data.npz") as arrays:
        x, y = (
            arrays[f"{split}_images"].reshape(len(arrays[f"{split}_labels"]), -1) / 255 for split in ("train", "test")
        )
        labels, test = arrays["train_labels"], arrays["test_labels"]
    votes = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    assert numbers["raw pixels"]["20-nn"] == pytest.approx(votes.fit(x, labels).score(y, test))
    scaled = StandardScaler().fit(x)
    theirs = [LogisticRegression(C=c, max_iter=5000).fit(scaled.transform(x), labels) for c in (0.001, 0.01, 0.1, 1.0)]
    scores = [one.score(scaled.transform(y), test) for one in theirs]
    assert any(abs(numbers["raw pixels"]["linear 100 %"] - score) <= 0.01 for score in scores)
    assert (tmp_path / "out" / "pixels-1.parquet").exists()


def test_with_limits_the_commonest_class_of_the_probes_is_that_of_their_images(tmp_path):
    """Of the first 40 training images 30 are of class 1, of all 100 most are of class 0."""
    labels = np.repeat([1, 0], [30, 70])
    arrays = {"train_images": np.zeros((100, 8, 8, 3), np.uint8), "train_labels": labels}
    np.savez(tmp_path / "data.npz", **arrays, test_images=arrays["train_images"][:40], test_labels=labels[:40])
    sources = [open_source(f"npz:{tmp_path / 'data.npz'}", split=split, image_size=8) for split in ("train", "test")]
    actual = baselines(*sources, (np.arange(40), np.arange(40)), EvalView(8), start(threads=1))
    assert actual.commonest == 30 / 40  # 30 of the 40 training images that are read are of class 1
    assert actual.commonest_of_all == 10 / 40
