"""The recipes on masks as a command line starts them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from recipes_run import run
from safetensors.torch import load_file

import sslvit
from sslvit.errors import DataError
from sslvit.storage.jsonl import read_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "vit"
    sslvit.save_model(sslvit.ViT.variant("mu/8", image_size=32), folder)
    return folder


FEW = "--limit_train 20 --limit_test 10 --patches 300 --threads 1"


def test_the_dense_probe_writes_numbers_counts_and_a_picture(model, tmp_path, capsys):
    out = tmp_path / "out"
    run("probe_dense", f"--model {model} --data shapes:scenes,n=30 {FEW} --out {out} --beside {model}")
    said, numbers = capsys.readouterr().out, json.loads((out / "numbers.json").read_text())
    rows = ("pretrained", str(model), "random start", "raw pixels")
    assert set(numbers) - {"seal"} == {f"{row}, {head}" for row in rows for head in ("knn", "logistic")} | {
        "most frequent class"
    }
    low, high = numbers["pretrained, knn"]["interval"]
    assert low < numbers["pretrained, knn"]["mean iou"] < high
    assert numbers[f"{model}, knn"]["pretrained minus this"] == {"mean iou": 0, "interval": [0, 0]}
    assert f"pretrained minus {model}, knn: +0.0 points" in said
    counts = load_file(out / "pretrained-knn.safetensors")
    assert counts["true"].shape == (10, 22)
    assert counts["true"].sum() == 10 * 32 * 32
    with Image.open(out / "predictions.png") as picture:
        assert picture.size == (8 * 128, 3 * 128)


def test_training_to_segment_ends_with_a_head_a_model_and_numbers_and_goes_on(model, tmp_path, capsys):
    out = tmp_path / "out"
    words = f"--model {model} --data shapes:scenes,n=24 --image_size 32 --batch_size 8 --threads 1 --out {out}"
    run("segment", f"{words} --steps 3 --save_every 1")
    numbers = json.loads((out / "test.json").read_text())
    assert numbers["images"] == 1000
    assert 0 <= numbers["mean iou"] <= 1
    page = (out / "report.html").read_text()
    assert f"<td>mean IoU</td><td>{100 * numbers['mean iou']:.1f}</td>" in page
    vit = sslvit.load_model(out)
    objective = sslvit.Segmentation(vit, classes=22, head="pyramid")
    objective.head.load_state_dict(load_file(out / "head.safetensors"))
    capsys.readouterr()
    run("segment", f"{words} --steps 3 --save_every 1 --resume")
    assert json.loads((out / "test.json").read_text()) == numbers


@pytest.mark.parametrize(("words", "steps"), [("--steps 7", 7), ("--epochs 2 --warmup_epochs 0", 6)])
def test_an_epoch_is_its_whole_batches(model, tmp_path, words, steps):
    """Of 31 images in batches of 8 there are three."""
    out = tmp_path / "out"
    given = f"--model {model} --data shapes:scenes,n=31 --image_size 32 --batch_size 8 --threads 1 --log_every 1"
    run("segment", f"{given} {words} --out {out}")
    assert [line["step"] for line in read_lines(out / "metrics.jsonl") if "lr" in line][-1] == steps
    with pytest.raises(SystemExit):
        run("segment", f"{given} --steps 7 --epochs 2 --out {tmp_path / 'both'}")
    assert not (tmp_path / "both").exists()


def test_the_linear_preset_leaves_the_backbone_as_it_was(model, tmp_path):
    out, start = tmp_path / "out", sslvit.load_model(model)
    words = "--data shapes:scenes,n=24 --image_size 32 --batch_size 8 --threads 1 --steps 2"
    run("segment", f"--preset linear --model {model} {words} --out {out}")
    trained = sslvit.load_model(out)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), trained.parameters(), strict=True))
    assert set(load_file(out / "head.safetensors")) >= {"norm.running_mean", "classify.weight"}


def test_what_cannot_be_segmented_is_refused_before_anything_is_written(model, tmp_path):
    folder = tmp_path / "set"
    for name, array in (("images", np.zeros((40, 40, 3), np.uint8)), ("masks", np.zeros((40, 40, 3), np.uint8))):
        (folder / name).mkdir(parents=True)
        Image.fromarray(array).save(folder / name / "a.png")
    out = tmp_path / "out"
    for recipe in ("segment", "probe_dense"):
        with pytest.raises(SystemExit) as stopped:
            run(recipe, f"--model {model} --data folder:{folder} --out {out} --threads 1")
        assert stopped.value.code != 0
    sslvit.save_model(sslvit.BiT.variant("R20x0.5", image_size=32), tmp_path / "bit")
    with pytest.raises(SystemExit):
        run("probe_dense", f"--model {tmp_path / 'bit'} --out {out} --threads 1")
    assert not out.exists()
    for options, said in (
        ({"heads": "knn"}, "give .*or both"), ({"temperature": 0.0}, "above 0"),
        ({"stride": 40}, "gaps between windows of 32"), ({"binary": True, "classes": 3}, "makes two classes itself"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            sslvit.probe_dense(str(model), "shapes:scenes", limit_train=5, **options)
    with pytest.raises(DataError, match="RGB"):
        sslvit.probe_dense(str(model), f"folder:{folder}")
