"""The recipes that probe: what they print of a run's model is what the run logged of it, and chosen without a test."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from timm.models.vision_transformer import VisionTransformer
from tiny_run import DEFAULTS

from sslvit.config import DataConfig, TrainConfig
from sslvit.data.spec import open_source
from sslvit.evaluate.attentive import AttentiveHead
from sslvit.evaluate.knn import knn
from sslvit.evaluate.monitor import Monitor, monitor_of
from sslvit.evaluate.predictions import load_predictions
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.mpp import MPP
from sslvit.processes.collectives import start
from sslvit.storage import sealed
from sslvit.train import pretrain
from sslvit.views.pretraining import CropFlip
from sslvit.weights.folder import load_backbone, save_backbone
from sslvit.weights.foreign.options import facts

RECIPES = Path(__file__).parents[2] / "recipes"
TABLE = (("train", 100), ("test", 31))
SMALL = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 4, "heads": 2}


def write(file: Path, test_seed: int = 1) -> str:
    """Fifty images a class, which differ in brightness, and a test set with labels of its own."""
    draw, other = np.random.default_rng(0), np.random.default_rng(test_seed)
    labels, test_labels = np.arange(100) % 2, other.permutation(np.arange(31) % 2)
    arrays = {"train_images": draw.integers(0, 200, (100, 16, 16, 3)) + 40 * labels[:, None, None, None]}
    arrays |= {"test_images": draw.integers(0, 200, (31, 16, 16, 3)) + 20}
    arrays = {name: array.astype(np.uint8) for name, array in arrays.items()}
    np.savez(file, **arrays, train_labels=labels, test_labels=test_labels)
    return f"npz:{file}"


def printed(recipe: str, capsys, monkeypatch, *words: str) -> list[str]:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [recipe, *words, "--threads", "1"])
    runpy.run_path(str(RECIPES / recipe), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_probed_numbers_are_those_that_the_run_logged_to_the_last_digit(tmp_path, capsys, monkeypatch):
    data, run, accelerator = write(tmp_path / "data.npz"), tmp_path / "run", start(threads=1)
    train, test = (open_source(data, split=split, image_size=16) for split in ("train", "test"))
    config = TrainConfig(out=run, **(DEFAULTS | {"epochs": 0.3}))
    pretrain(
        MPP(ViT(ViTConfig(**SMALL))),
        train,
        CropFlip(16),
        config,
        accelerator,
        Monitor(train, test, 16, accelerator),
    )
    words = ["--model", str(run), "--data", data, "--cache", str(tmp_path / "kept"), "--blocks", "4"]
    words += ["--out", str(tmp_path / "probe")]
    lines = printed("probe.py", capsys, monkeypatch, *words)
    actual = sealed.read(tmp_path / "probe" / "numbers.json")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in logged if "eval/mean/20-nn" in line]
    assert len(logged) == 2
    for name, line in zip(("random start", "pretrained"), logged, strict=True):
        for readout in ("cls", "mean", "both"):
            for protocol in ("20-nn", "10-shot"):
                assert actual[f"{name}/{readout}"][protocol] == line[f"eval/{readout}/{protocol}"]
    assert {key.split("/")[1] for key in actual} == {"cls", "mean", "both", "cls:4", "mean:4", "both:4"}
    assert {key for key in actual["pretrained/cls"] if "shot" in key} >= {"1-shot", "5-shot", "10-shot"}
    assert [line.split("  ")[0] for line in lines if "*" in line][:2] == ["random start, mean *", "pretrained, mean *"]
    assert any("exp(similarity / 0.07)" in line for line in lines)
    # The second time nothing is extracted, and nothing is another number.
    assert printed("probe.py", capsys, monkeypatch, *words) == lines
    assert len(list((tmp_path / "kept").iterdir())) == 4


def test_a_foreign_checkpoint_is_probed_with_its_missing_facts_and_refused_without(tmp_path, capsys, monkeypatch):
    theirs = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0).eval()
    file = tmp_path / "theirs.safetensors"
    save_file(theirs.state_dict(), file)
    words = ["--model", str(file), "--data", write(tmp_path / "data.npz"), "--out", str(tmp_path / "probe")]
    words += ["--cache", str(tmp_path / "kept")]
    with pytest.raises(SystemExit):
        printed("probe.py", capsys, monkeypatch, *words)
    assert "nothing in it says heads, gelu, mean, std" in capsys.readouterr().err
    words += ["--foreign", "heads=2", "gelu=exact", "mean=0.5,0.5,0.5", "std=.25,.25,.25"]
    printed("probe.py", capsys, monkeypatch, *words)
    actual = sealed.read(tmp_path / "probe" / "numbers.json")
    assert {key.split("/")[1] for key in actual} == {"cls", "mean", "both"}
    x, y = (open_source(words[3], split=split, image_size=16).read(np.arange(n)) for split, n in TABLE)
    with torch.no_grad():
        a, b = (theirs((samples.pixels / 255 - 0.5) / 0.25) for samples in (x, y))
    assert actual["pretrained/cls"]["20-nn"] == knn(a, x.labels, b, y.labels)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("image_size=16 mean=0,-1,.5", {"image_size": (16, 16), "mean": (0.0, -1.0, 0.5)}),
        ("family=mae leave_head=True", {"family": "mae", "leave_head": True}),
        ("heads=6 epsilon=1e-12 image_size=14,20", {"heads": 6, "epsilon": 1e-12, "image_size": (14, 20)}),
        ("head=6", "must be one of family, part"),
        ("heads=six", "'six' is no value for heads"),
        ("leave_head=yes", "'yes' is no value for leave_head"),
        ("gelu", "'' is no value for gelu"),
        ("heads=0", "'0' is no value for heads"),
        ("heads=2 heads=1", "heads is said twice"),
        ("epsilon=-1", "'-1' is no value"),
        ("std=0,0,0", "'0,0,0' is no value"),
        ("mean=nan,1,1", "'nan,1,1' is no value"),
        ("image_size=-4", "'-4' is no value"),
        ("image_size=16,16,3", "'16,16,3' is no value"),
    ],
)
def test_options_about_a_checkpoint_are_parsed_or_refused(words, expected):
    if isinstance(expected, dict):
        assert facts(tuple(words.split())) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            facts(tuple(words.split()))


@pytest.mark.parametrize(
    ("protocol", "readouts"),
    [
        ("logistic", ["cls", "mean", "both"]),
        ("mae", ["cls", "mean"]),
        ("moco_v3", ["cls", "mean"]),
        ("dinov2", ["cls", "cls:4", "both", "both:4", "mean"]),
        ("attentive", ["patches"]),
    ],
)
def test_a_protocol_reads_its_papers_and_the_declared_readout_and_chooses_without_test(
    tmp_path, capsys, monkeypatch, protocol, readouts
):
    save_backbone(ViT(ViTConfig(**SMALL)), tmp_path / "model", {"readout": "mean"})
    words = ["--model", str(tmp_path / "model"), "--image_size", "16", "--protocol", protocol]
    words += ["--cache", str(tmp_path / "kept")]
    one, two = (
        printed(
            "linear_probe.py",
            capsys,
            monkeypatch,
            *(*words, "--data", write(tmp_path / f"{seed}.npz", seed), "--out", str(tmp_path / f"out-{seed}")),
        )[:-1]  # which says where all of it is
        for seed in (1, 2)
    )
    names = [f"{name}, {readout}" for name in ("random start", "pretrained") for readout in readouts]
    assert [line[:24].strip() for line in one[1:]] == names
    assert one[0].split()[-1] == ("linear" if protocol == "logistic" else protocol)
    assert [line[34:] for line in one] == [line[34:] for line in two]
    chosen = protocol not in ("mae", "moco_v3")  # which have one rate, and learn from all labels
    assert all(("held out" in line) == chosen for line in one[1:])


def test_a_protocol_may_learn_from_augmented_versions(tmp_path, capsys, monkeypatch):
    save_backbone(ViT(ViTConfig(**SMALL)), tmp_path / "model", {"readout": "mean"})
    words = ["--model", str(tmp_path / "model"), "--image_size", "16", "--data", write(tmp_path / "data.npz")]
    words += ["--cache", str(tmp_path / "kept"), "--out", str(tmp_path / "out"), "--augmented", "2"]
    lines = printed("linear_probe.py", capsys, monkeypatch, *words, "--protocol", "grid", "--smallest_crop", "0.5")
    assert len(lines) == 1 + 2 * 2 + 1  # two starts, cls and mean; and where all of it is
    # Training and test images as they are, and two versions; this model is its own random start.
    assert len(list((tmp_path / "kept").iterdir())) == 2 + 2
    with pytest.raises(SystemExit):
        printed("linear_probe.py", capsys, monkeypatch, *words)
    assert "--augmented 2 is for --protocol grid, moco_v3" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["logistic", "moco_v3", "attentive"])
def test_a_linear_probe_leaves_its_numbers_heads_predictions_settings_and_log(tmp_path, capsys, monkeypatch, protocol):
    save_backbone(ViT(ViTConfig(**SMALL)), tmp_path / "model", {"readout": "cls"})
    out, data = tmp_path / "out", write(tmp_path / "data.npz")
    words = ["--model", str(tmp_path / "model"), "--image_size", "16", "--data", data, "--protocol", protocol]
    words += ["--cache", str(tmp_path / "kept"), "--out", str(out)]
    lines = printed("linear_probe.py", capsys, monkeypatch, *words)
    assert (out / "log.txt").read_text().splitlines() == lines
    assert json.loads((out / "config.json").read_text())["protocol"] == protocol
    readout = "patches" if protocol == "attentive" else "cls"
    numbers = json.loads((out / "numbers.json").read_text())[f"pretrained/{readout}"]
    actual = load_predictions(out / f"pretrained-{readout}.parquet")
    predicted = actual.probabilities.argmax(-1)
    assert numbers["accuracy"] == accuracy_score(actual.labels, predicted)
    assert numbers["balanced accuracy"] == pytest.approx(balanced_accuracy_score(actual.labels, predicted))
    assert (len(actual.labels), actual.about["protocol"], actual.about["readout"]) == (31, protocol, readout)
    # Its weights, in torch's Linear, give the same predictions of the features that the model gives.
    samples = open_source(data, split="test", image_size=16).read(np.arange(31))
    with torch.no_grad():
        encoded = load_backbone(tmp_path / "model")(samples.pixels / 255)
    weights = load_file(out / f"pretrained-{readout}.safetensors")
    if protocol == "attentive":
        head = AttentiveHead(16, 2, heads=4).eval()
        head.load_state_dict(weights)
        again = head.probabilities(encoded.patches)
    else:
        head = torch.nn.Linear(16, 2)
        head.load_state_dict(weights)
        again = head(encoded.cls).softmax(-1)
    torch.testing.assert_close(again.detach(), actual.probabilities, rtol=0, atol=1e-4)


def test_a_linear_probe_that_could_not_keep_its_results_stops_before_it_computes(tmp_path, capsys, monkeypatch):
    save_backbone(ViT(ViTConfig(**SMALL)), tmp_path / "model", {"readout": "cls"})
    (tmp_path / "out").write_text("a file")
    words = ["--model", str(tmp_path / "model"), "--image_size", "16", "--data", write(tmp_path / "data.npz")]
    words += ["--cache", str(tmp_path / "kept"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        printed("linear_probe.py", capsys, monkeypatch, *words)
    assert stopped.value.code == 73
    assert f"--out {tmp_path / 'out'} cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


def unequal(file: Path) -> str:
    """Images that say nothing, of two classes, of which one is nine tenths of the training and a half of the test."""
    draw = np.random.default_rng(0)
    arrays = {f"{split}_images": draw.integers(0, 256, (n, 16, 16, 3)).astype(np.uint8) for split, n in TABLE}
    np.savez(file, **arrays, train_labels=np.arange(100) % 10 == 0, test_labels=np.arange(31) % 3 == 0)
    return f"npz:{file}"


@pytest.mark.parametrize("recipe", ["probe", "linear_probe"])
def test_a_probe_that_predicts_one_class_is_warned_of_with_balanced_accuracy(tmp_path, capsys, monkeypatch, recipe):
    save_backbone(ViT(ViTConfig(**SMALL)), tmp_path / "model", {"readout": "cls"})
    words = ["--model", str(tmp_path / "model"), "--image_size", "16", "--data", unequal(tmp_path / "data.npz")]
    words += ["--cache", str(tmp_path / "kept"), "--out", str(tmp_path / "out")]
    text = "\n".join(printed(f"{recipe}.py", capsys, monkeypatch, *words))
    assert "100.0% of 31 images are predicted as class 0; 64.5% belong to it" in text  # 20 of 31
    assert "balanced accuracy" in text
    assert "50.0" in text


def without_ants(folder: Path) -> str:
    """Flat images of three classes to learn from, of which the test set has the last two alone."""
    for split, kinds in {"train": ("ant", "bee", "cow"), "test": ("bee", "cow")}.items():
        for number, kind in ((number, kind) for number in range(6) for kind in kinds):
            file = folder / split / kind / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (40 * number, 10 * len(split), 90)).save(file)
    return str(folder)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("probe", ["--fractions", "1", "--shots", "1", "--no-random"]),
        ("linear_probe", []),
        ("finetune", ["--steps", "1", "--lr", "0.01", "--batch_size", "6"]),
    ],
)
def test_a_test_set_that_lacks_a_class_has_the_class_numbers_of_the_training_set(
    tmp_path, capsys, monkeypatch, recipe, words
):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "decoded"))
    save_backbone(ViT(ViTConfig(**SMALL)), tmp_path / "model", {"readout": "cls"})
    words = ["--model", str(tmp_path / "model"), "--data", without_ants(tmp_path / "set"), *words]
    words += ["--out", str(tmp_path / "out"), *([] if recipe == "finetune" else ["--cache", str(tmp_path / "kept")])]
    printed(f"{recipe}.py", capsys, monkeypatch, *words)
    actual = [load_predictions(file) for file in (tmp_path / "out").rglob("*.parquet")]
    assert actual
    assert all(one.labels.unique().tolist() == [1, 2] for one in actual)


def test_a_run_is_evaluated_by_the_class_numbers_of_the_training_set(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "decoded"))
    config = DataConfig(data=without_ants(tmp_path / "set"), image_size=16)
    train, test = monitor_of(config, config.open(), start(threads=1)).sources
    assert (set(train.labels), set(test.labels)) == ({0, 1, 2}, {1, 2})
