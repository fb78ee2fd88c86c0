"""What a run reports of itself: the monitor's numbers are the protocols' own, and its table says what they are."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import source
from torchvision.transforms import v2

from sslvit.config import DataConfig
from sslvit.data.labels import Labels
from sslvit.data.source import ArraySource
from sslvit.data.subset import Subset
from sslvit.errors import DataError
from sslvit.evaluate.features import extract
from sslvit.evaluate.fewshot import fewshot
from sslvit.evaluate.knn import knn
from sslvit.evaluate.monitor import Monitor, monitor_of, table
from sslvit.finetuning import predict
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.supervised import Supervised
from sslvit.processes.collectives import start
from sslvit.views.pretraining import EvalView, eval_view


def small() -> ViT:
    return ViT(ViTConfig(image_size=32, patch_size=8, width=16, depth=1, heads=1))


def test_monitored_numbers_are_the_protocols_to_the_last_digit():
    accelerator, backbone = start(threads=1), small()
    train, test = source(40), source(25)
    monitored = Monitor(train, test, 32, accelerator, k=5, shots=3)(backbone)
    a, b = (extract(backbone, s, EvalView(32), accelerator) for s in (train, test))
    for readout in ("cls", "mean", "both"):
        x, y = a.by_readout[readout], b.by_readout[readout]
        assert monitored[f"eval/{readout}/5-nn"] == knn(x, a.labels, y, b.labels, k=5)
        assert monitored[f"eval/{readout}/3-shot"] == fewshot(x, a.labels, y, b.labels, shots=3).mean
    assert len(monitored) == 6


def test_unreadable_images_are_not_scored_and_are_reported(capsys):
    accelerator, backbone = start(threads=1), small()
    train, test = source(40), source(25)
    good = np.setdiff1d(np.arange(25), [3, 7])
    whole = Monitor(train, Subset(test, good), 32, accelerator, k=5, shots=3)(backbone)
    capsys.readouterr()
    test.bad = {3: ("three.png", "empty file"), 7: ("seven.png", "torn")}
    monitor = Monitor(train, test, 32, accelerator, k=5, shots=3)
    assert monitor(backbone) == whole | {"evaluated without": 2}
    monitor(backbone)
    warning = "2 of 25 images of noise cannot be read and are left out, e.g. three.png: empty file"
    assert capsys.readouterr().out.count(warning) == 1
    lines = table([{"step": 0} | whole, {"step": 9} | monitor(backbone)], "mean").splitlines()
    assert "2 of the evaluation images cannot be read and are left out" in lines


def test_the_limits_leave_out_the_same_images_every_time():
    accelerator, backbone = start(threads=1), small()
    limited = Monitor(source(40), source(25), 32, accelerator, limit_train=30, limit_test=20)
    assert limited(backbone) == limited(backbone)


def test_a_source_without_labels_is_refused_by_name():
    blind = ArraySource(np.zeros((3, 3, 32, 32), np.uint8), name="blind", fingerprint="x")
    with pytest.raises(ValueError, match="blind has no labels"):
        Monitor(blind, source(), 32, start(threads=1))


def test_the_table_shows_random_start_and_pretrained_and_marks_the_readout():
    first = {"step": 0, "eval/cls/10-shot": 0.1, "eval/mean/10-shot": 0.12}
    last = {"step": 1200, "eval/cls/10-shot": 0.3, "eval/mean/10-shot": 0.456}
    text = table([first, {"step": 5}, last], "mean").splitlines()
    assert "after 1,200 steps" in text[0]
    assert text[1].split() == ["10-shot", "of", "cls", "10.0", "30.0"]
    assert text[2].split() == ["10-shot", "of", "mean", "*", "12.0", "45.6"]


def test_extraction_leaves_the_mode_and_the_weights_alone():
    accelerator, backbone = start(threads=1), small().train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    labels = Labels(np.arange(7), None, "")
    seven = ArraySource(np.zeros((7, 3, 32, 32), np.uint8), name="seven", fingerprint="7", labels=labels)
    features = extract(backbone, seven, EvalView(32), accelerator, batch_size=3)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert torch.equal(features.ids, torch.arange(7))
    assert torch.equal(features.labels, torch.arange(7))


def pictures(folder, count: int) -> str:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.full((8, 8, 3), 9 * number, np.uint8)).save(folder / f"{number}.png")
    return str(folder)


@pytest.mark.usefixtures("all_shapes")
def test_without_labels_nothing_is_evaluated_unless_eval_data_has_some(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    flat, accelerator = pictures(tmp_path / "flat", 6), start(threads=1)
    config = DataConfig(data=flat, image_size=8)
    assert monitor_of(config, config.open(), accelerator) is None
    assert f"folder:{flat} has no labels" in capsys.readouterr().out
    config = DataConfig(data=flat, image_size=8, eval_data="shapes:n=40")
    asked = monitor_of(config, config.open(), accelerator)
    assert [len(source) for source in asked.sources] == [40, 4000]
    config = DataConfig(data="shapes", image_size=8, eval_data=flat)
    with pytest.raises(DataError, match="has no labels to evaluate with"):
        monitor_of(config, config.open(), accelerator)


def test_without_a_test_split_a_tenth_is_held_out_unless_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    for kind in ("a", "b"):
        pictures(tmp_path / "set" / kind, 20)
    accelerator, config = start(threads=1), DataConfig(data=str(tmp_path / "set"), image_size=8)
    source = config.open()
    train, test = monitor_of(config, source, accelerator).sources
    assert (len(train), len(test)) == (36, 4)
    assert not set(train.rows) & set(test.rows)
    assert sorted(test.labels) == [0, 0, 1, 1]
    assert "Evaluated on 4 images held out of 40" in capsys.readouterr().out
    assert monitor_of(config, source, accelerator, hold_out=False) is None
    assert "has no test split" in capsys.readouterr().out


def test_eval_data_without_a_test_split_holds_out_a_tenth(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    for kind in ("a", "b"):
        pictures(tmp_path / "set" / kind, 20)
    config = DataConfig(data="shapes:n=40", image_size=8, eval_data=str(tmp_path / "set"))
    for hold_out in (True, False):  # its labels are trained on by nobody
        train, test = monitor_of(config, config.open(), start(threads=1), hold_out=hold_out).sources
        assert (len(train), len(test)) == (36, 4)


@pytest.mark.parametrize(
    ("test", "said"),
    [
        (("1",), "has no labels"),  # as the test split of ImageNet
        (("x", "y"), "classes x, y are not among the 2 of the training set"),  # patients, dates
    ],
)
def test_a_test_split_that_cannot_be_used_does_not_end_pretraining(tmp_path, monkeypatch, capsys, test, said):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    for name in ("train/a", "train/b", *(f"test/{name}" for name in test if len(test) > 1)):
        pictures(tmp_path / "set" / name, 20)
    if len(test) == 1:
        pictures(tmp_path / "set" / "test", 5)
    accelerator, config = start(threads=1), DataConfig(data=str(tmp_path / "set"), image_size=8)
    train, held = monitor_of(config, config.open(), accelerator).sources
    assert (len(train), len(held)) == (36, 4)
    assert said in capsys.readouterr().out
    assert monitor_of(config, config.open(), accelerator, hold_out=False) is None
    assert "Accuracy is not measured: " in capsys.readouterr().out


@pytest.mark.parametrize(("eval_crop", "resize"), [(None, (128, 128)), (0.5, (224, 224)), (0.0, None)])
def test_a_run_is_evaluated_by_the_crop_that_was_chosen(eval_crop, resize):
    config = DataConfig(data="shapes:n=40", image_size=112, eval_crop=eval_crop)
    assert monitor_of(config, config.open(), start(threads=1)).view == EvalView(112, resize)


def test_evaluations_of_oblong_photographs_see_torchvisions_center_crop():
    """112 px: the shorter side is resized to 128, as 256 is for 224."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (8, 3, 15, 20), np.uint8).repeat(10, 2).repeat(10, 3)
    photographs = ArraySource(pixels, name="p", fingerprint="p", labels=Labels(np.arange(8) % 2, None, ""))
    theirs = v2.Resize(128, v2.InterpolationMode.BICUBIC, antialias=True)(torch.from_numpy(pixels).double() / 255)
    theirs, seen = v2.CenterCrop(112)(theirs).clamp(0, 1), []

    class Looking(ViT):
        def forward(self, images, **arguments):
            seen.append(images)
            return super().forward(images, **arguments)

    backbone, accelerator = ViT(ViTConfig(image_size=112, patch_size=56, width=16, depth=1, heads=1)), start(threads=1)
    backbone.__class__ = Looking
    Monitor(photographs, photographs, 112, accelerator, k=3, shots=1)(backbone)
    predict(Supervised(backbone, classes=2), photographs, eval_view(112), accelerator)
    assert len(seen) == 3
    for images in seen:
        assert (images - theirs).abs().max() < 2e-3
