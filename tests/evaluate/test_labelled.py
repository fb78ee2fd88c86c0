"""Labelled images without a test split: a tenth is held out, the same for every use, and a sentence says so."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_models import ABOUT, vit
from recipes_run import run

from sslvit.config import DataConfig, LabelledConfig
from sslvit.data.source import ArraySource
from sslvit.data.subset import HeldOut, Subset, saved_ids
from sslvit.errors import DataError, NoInput
from sslvit.evaluate.labelled import open_labelled
from sslvit.evaluate.monitor import monitor_of
from sslvit.evaluate.predictions import load_predictions
from sslvit.experiments.compare import ComparisonConfig, check
from sslvit.finetuning import predict
from sslvit.processes.collectives import start
from sslvit.weights.folder import save_backbone


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """40 images in two classes, and a model that has not seen them."""
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "set", 40)
    save_backbone(vit(image_size=16), tmp_path / "model", ABOUT)
    return tmp_path / "set"


def write(folder: Path, count: int, seed: int = 0) -> None:
    draw = np.random.default_rng(seed)
    for number in range(count):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        file = folder / "ab"[number % 2] / f"{number:02}.png"
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(file)


def opened(data: Path, **options):
    about = options.pop("about", None)
    return open_labelled(LabelledConfig(data=f"folder:{data}", image_size=16, **options), 16, 3, about=about)


def held_out(data: Path) -> list[int]:
    """By the monitor of a run on these images."""
    config = DataConfig(data=f"folder:{data}", image_size=16)
    return monitor_of(config, config.open(), start(threads=1)).sources[1].rows.tolist()


def test_the_held_out_tenth_is_the_one_that_a_run_is_evaluated_on(data):
    train, test, note = opened(data)
    assert test.rows.tolist() == held_out(data)
    assert len(test) == 4
    assert sorted(test.labels) == [0, 0, 1, 1]
    assert sorted([*train.rows, *test.rows]) == list(range(40))
    assert note.startswith(
        f"The test images are 4 held out of 40 labelled ones: {data} has no test split: none of test,"
    )


def test_with_a_test_split_nothing_is_held_out(data):
    shutil.copytree(data, data / "train")
    write(data / "val", 6, seed=1)
    train, test, note = opened(data)
    assert (len(train), len(test), note) == (40, 6, "")
    assert isinstance(train, ArraySource)
    assert isinstance(test, ArraySource)


def test_test_data_name_another_set_by_its_test_split_or_all_of_it(data, tmp_path):
    write(tmp_path / "flat", 8, seed=1)
    write(tmp_path / "split" / "test", 6, seed=2)
    write(tmp_path / "split" / "train", 4, seed=3)
    for name, size in (("flat", 8), ("split", 6)):
        train, test, note = opened(data, test_data=f"folder:{tmp_path / name}")
        assert (len(train), len(test), note) == (40, size, "")
    with pytest.raises(NoInput, match="nowhere"):
        opened(data, test_data=f"folder:{tmp_path / 'nowhere'}")
    (tmp_path / "flat" / "b").rename(tmp_path / "flat" / "c")
    with pytest.raises(DataError, match="c"):
        opened(data, test_data=f"folder:{tmp_path / 'flat'}")


def test_what_cannot_be_held_out_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "two", 2)
    with pytest.raises(DataError, match=r"no test split.*--test_data.*no class has two"):
        opened(tmp_path / "two")


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        (None, None),
        ({"data": "folder:other", "head": ["head.bias"]}, None),
        ({"data": "folder:settle", "head": ["head.bias"]}, None),
        ({"data": "folder:set", "head": []}, "The model was pretrained, without labels, on folder:set: "),
        ({"data": "folder:set (30 of its 40)"}, "pretrained, without labels, on folder:set (30 of its 40): "),
        ({"data": "folder:set", "head": ["head.bias"]}, "The model was trained with labels on folder:set: "),
        ({"data": "folder:set (without its held-out tenth) (36 of its 36)", "head": ["head.bias"]}, None),
    ],
)
def test_a_model_that_may_have_seen_the_held_out_images_is_named(data, about, sentence):
    note = opened(data, about=about).note
    assert (sentence or "valid is in it") in note
    assert ("The model" in note) == (sentence is not None)


@pytest.mark.parametrize("recipe", ["probe", "linear_probe"])
def test_probes_save_the_ids_of_the_whole_set(recipe, data, capsys):
    run(recipe, f"--model model --data folder:{data} --threads 1 --out out")
    assert capsys.readouterr().out.count("4 held out of 40 labelled ones") == 1
    files = sorted(Path("out").glob("*.parquet"))
    assert files
    for file in files:
        assert load_predictions(file).ids.tolist() == held_out(data)


def test_near_duplicates_are_counted_and_named_by_the_ids_of_the_whole_set(data, capsys):
    run("probe", f"--model model --data folder:{data} --seen folder:{data} --threads 1 --out out")
    assert "4 of 4 test images (100.00%) have a near-duplicate in pretraining" in capsys.readouterr().out
    leaks = json.loads(Path("out/leaks.json").read_text())
    assert leaks["test ids"] == leaks["seen ids"] == held_out(data)


def test_fine_tuning_neither_trains_on_the_held_out_images_nor_chooses_by_them(data, capsys, monkeypatch):
    read: set[int] = set()
    real_read, training = ArraySource.read, [True]

    def reading(self, ids):
        read.update(ids.tolist() if training[0] else ())
        return real_read(self, ids)

    def predicting(*given, **options):
        training[0] = False
        return predict(*given, **options)

    monkeypatch.setattr(ArraySource, "read", reading)
    words = f"--model model --data folder:{data} --rates 0.01 0.02 --steps 8 --batch_size 8 --threads 1 --out out"
    monkeypatch.setattr("sslvit.reports.tested.predict", predicting)
    run("finetune", words)
    assert not read & set(held_out(data))
    assert len(read) == 36
    assert load_predictions(Path("out/predictions.parquet")).ids.tolist() == held_out(data)
    assert "4 held out of 40 labelled ones" in capsys.readouterr().out


def test_a_fine_tuned_model_has_not_seen_the_images_that_its_probe_holds_out(data, capsys):
    run("finetune", f"--model model --data folder:{data} --rates 0.01 --steps 2 --batch_size 8 --threads 1 --out out")
    capsys.readouterr()
    run("linear_probe", f"--model out --data folder:{data} --threads 1 --out probe")
    printed = capsys.readouterr().out
    assert "4 held out of 40" in printed
    assert "The model was trained with labels" not in printed


def test_a_comparison_holds_out_of_other_datasets_but_not_of_what_it_pretrains_on(data, capsys):
    same = {"image_size": 16, "fractions": (1.0,)}
    with pytest.raises(NoInput, match=f"--data folder:{data} needs a test split, .* supervised on their labels"):
        check(ComparisonConfig(data=f"folder:{data}", **same))
    check(ComparisonConfig(data="shapes:n=40", transfer=(f"folder:{data}",), **same))
    assert "note: The test images are 4 held out of 40 labelled ones" in capsys.readouterr().out


def test_analysis_of_the_test_split_takes_the_held_out_images(data, capsys):
    run("analyse", f"--model model --data folder:{data} --split test --threads 1 --out out")
    printed = capsys.readouterr().out
    assert "4 images of folder:" in printed
    assert "4 held out of 40 labelled ones" in printed
    run("analyse", f"--model model --data folder:{data} --threads 1 --out out")
    assert "held out" not in capsys.readouterr().out


def test_baselines_save_the_ids_of_the_whole_set(data):
    run("baselines", f"--data folder:{data} --image_size 16 --threads 1 --out out")
    assert load_predictions(Path("out/pixels-1.parquet")).ids.tolist() == held_out(data)


def test_saved_ids_are_those_of_the_set_that_images_were_held_out_of():
    whole = ArraySource(np.zeros((9, 1, 4, 4), np.uint8), name="nine", fingerprint="9")
    some = Subset(whole, np.array([2, 4, 6, 8]))
    ids = torch.tensor([1, 0])
    assert saved_ids(whole, ids).tolist() == [1, 0]
    assert saved_ids(some, ids).tolist() == [1, 0]
    assert saved_ids(HeldOut(whole, np.array([3, 7])), ids).tolist() == [7, 3]
    assert saved_ids(HeldOut(some, np.array([1, 3])), ids).tolist() == [3, 1]
