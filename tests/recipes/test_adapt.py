"""Adapting a model: heads first, then the backbone a little; what it says of it, and what it keeps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recipes_run import run
from safetensors.torch import load_file

from sslvit.evaluate.adaptation import BEST, Change, judged
from sslvit.models.vit import ViT
from sslvit.objectives.mpp import MPP
from sslvit.recipes import adapt
from sslvit.training.optim import parameter_groups
from sslvit.weights.folder import load_backbone, save_backbone

TINY = "--data shapes:n=64 --keep_data shapes:texture,n=64 --threads 1 --batch_size 16 --log_every 1"


@pytest.fixture
def model(tmp_path) -> Path:
    save_backbone(ViT.variant("mu/8", image_size=16), tmp_path / "model", {"readout": "cls", "objective": "made up"})
    return tmp_path / "model"


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", ["dino", "mae", "mpp"])
def test_it_says_what_the_model_was_and_what_became_of_it(model, tmp_path, capsys, objective):
    words = f"{TINY} --init_from {model} --objective {objective} --epochs 3 --out {tmp_path / 'run'}"
    run("adapt", words)
    told = capsys.readouterr().out
    lines = lines_of(tmp_path / "run")
    readout = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["sslvit"]["readout"]
    evaluated = [line for line in lines if f"eval/{readout}/20-nn" in line]
    assert [line["step"] for line in evaluated] == [0, 4, 8, 12]
    for line in evaluated:
        assert {f"eval/{readout}/20-nn (kept)", f"eval/{readout}/10-shot (kept)", "drift", "alignment"} <= line.keys()
    assert evaluated[0]["drift"] == pytest.approx(0, abs=1e-6)
    # The heads' epoch leaves the backbone as it was.
    same = {name for name in evaluated[0] if name.startswith("eval/") and evaluated[1][name] == evaluated[0][name]}
    assert same == {name for name in evaluated[0] if name.startswith("eval/")}
    assert evaluated[1]["drift"] == pytest.approx(0, abs=1e-6)
    assert evaluated[3]["drift"] > 0
    assert told.count("new images: ") == 3
    assert "step 12: " in told


def test_the_backbones_rate_is_nothing_then_a_line_then_level():
    config = adapt.Config(epochs=10, head_epochs=2, ramp_epochs=4, backbone_lr=0.1)
    rates = [config.backbone_rate(passes / 10) for passes in (0, 1.9, 2, 3, 4, 6, 9)]
    assert rates == pytest.approx([0, 0, 0, 0.025, 0.05, 0.1, 0.1])
    assert adapt.Config(head_epochs=0, ramp_epochs=0).backbone_rate(0) == 0.1
    with pytest.raises(ValueError, match=r"--head_epochs 10 of --epochs 10: the backbone would never learn; give 1"):
        adapt.Config(head_epochs=10, lr=1.0).check()


def test_backbone_and_heads_are_in_groups_of_their_own():
    objective = MPP(ViT.variant("mu/8", image_size=16))
    backbone = set(objective.backbone.parameters())
    for layer_decay in (1.0, 0.5):
        groups = parameter_groups(objective, 0.1, layer_decay=layer_decay, apart=True)
        assert sum(len(group["params"]) for group in groups) == len(list(objective.parameters()))
        for group in groups:
            assert all((one in backbone) == group["backbone"] for one in group["params"])
        assert {group["scale"] for group in groups if not group["backbone"]} == {1.0}
    assert not any(group["backbone"] for group in parameter_groups(objective, 0.1, layer_decay=0.5))


def test_a_part_is_adapted_and_the_best_model_is_kept(model, tmp_path):
    words = f"{TINY} --init_from {model} --objective mpp --epochs 2 --head_epochs 0 --backbone_lr 1 --base_lr 0.1"
    run("adapt", f"{words} --train norm --most_forgotten 1 --out {tmp_path / 'run'}")
    before, after = load_backbone(model).state_dict(), load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed
    assert all("norm" in name for name in changed)
    accuracies = [line["eval/mean/20-nn"] for line in lines_of(tmp_path / "run") if "eval/mean/20-nn" in line]
    assert (tmp_path / "run" / BEST / "model.safetensors").exists() == (max(accuracies[1:]) > accuracies[0])


def test_images_without_labels_are_adapted_to_without_a_kept_set(model, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "unlabelled.npz", x_train=pixels)
    words = f"--data npz:{tmp_path / 'unlabelled.npz'} --init_from {model} --objective mpp --epochs 2 --batch_size 16"
    run("adapt", f"{words} --threads 1 --out {tmp_path / 'run'} --keep_data=")
    told = capsys.readouterr().out
    assert "step 4: unknown: effective rank" in told
    assert "The new images have no labels, so no model is called the best" in told
    assert not (tmp_path / "run" / BEST).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "--init_from is missing: the model to adapt"),
        ("--init_from /not/there", "/not/there"),
        ("--init_from MODEL --train lora:4", "--train lora:4 works with --objective mae or mpp"),
        ("--init_from MODEL --train everything", "--train everything: choose one of all, head, norm"),
        ("--init_from MODEL --keep_data folder:/nowhere", "/nowhere"),
        ("--init_from MODEL --image_size 20", "20"),
    ],
)
def test_what_cannot_be_adapted_is_said_in_a_sentence(model, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        run("adapt", f"--data shapes:n=64 --threads 1 {words.replace('MODEL', str(model))} --out {tmp_path / 'run'}")
    assert ended.value.code in (65, 66, 78)
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()


GOOD, SAME, BAD = Change(0.5, 0.6, 2000), Change(0.5, 0.51, 2000), Change(0.5, 0.4, 2000)


@pytest.mark.parametrize(
    ("own", "kept", "rank", "word"),
    [
        (GOOD, SAME, (9.0, 9.0), "better"),
        (GOOD, BAD, (9.0, 9.0), "better but forgetting"),
        (SAME, SAME, (9.0, 9.0), "no different"),
        (SAME, BAD, (9.0, 9.0), "forgetting"),
        (BAD, None, (9.0, 9.0), "worse"),
        (Change(0.8, 0.1, 2000), SAME, (9.0, 9.0), "collapsed"),
        (BAD, None, (9.0, 1.5), "collapsed"),
        (SAME, None, (9.0, 1.5), "no different"),  # fewer directions, and as good
        (None, SAME, (9.0, 9.0), "unknown"),
        (None, BAD, (9.0, 9.0), "forgetting"),
        (None, None, (9.0, 2.0), "collapsed"),
    ],
)
def test_a_verdict_is_in_words(own, kept, rank, word):
    assert judged(own, kept, rank).word == word


def test_a_difference_counts_from_two_standard_errors_on():
    # Of 1,000 images the difference of two accuracies near 50% has an error of sqrt(2 * 0.25 / 1000), 2.2 points.
    assert Change(0.5, 0.54, 1000).direction == 0
    assert Change(0.5, 0.55, 1000).direction == 1
    assert Change(0.5, 0.45, 1000).direction == -1
    assert Change(0.5, 0.509, 10**9).direction == 0  # under a point
    assert str(Change(0.5, 0.55, 1000)) == "50.0% at the start, 55.0% now"
