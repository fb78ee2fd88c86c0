"""Runs of every recipe that version 0.1 left half-way, under options that have other names now, are resumed."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from recipes_run import run
from safetensors.torch import load_file

from sslvit.cli.parse import parse
from sslvit.experiments.compare import ComparisonConfig
from sslvit.recipes.mpp import SMALL
from sslvit.runs.settings import check_unchanged, configuration

GOLDEN = Path(__file__).parent / "golden" / "recipes"
SAME = "--data shapes:n=64 --batch_size 16 --save_every 4 --threads 1 --resume"
PRETRAIN = f"--preset small {SAME} --image_size 16 --epochs 2 --warmup_epochs 0.2 --log_every 1 --model mu/8"
# What was run was the same, with --drop, --normalise_targets, --held_epochs, --centre_momentum, --colour, --parts,
# --smoothing, --only, --min_scale, --spares and --start.
RUNS = {
    "mae": ("mae", f"{PRETRAIN} --decoder 16 1 2 --mask_ratio 0.5 --no-norm_pix_loss"),
    "dino": (
        "dino",
        f"{PRETRAIN} --crops 2 8 --head 16 16 64 --freeze_last_layer_epochs 0.5 --center_momentum 0.8 --no-color",
    ),
    "moco_v3": ("moco_v3", f"{PRETRAIN} --hidden 16 --chunks 2 --no-color"),
    "supervised": ("supervised", f"{PRETRAIN} --label_smoothing 0.1"),
    "mpp": ("mpp", f"{PRETRAIN} --only_classes 0 1 2 3 4 5 --smallest_crop 0.4 --no_weight_decay vectors"),
    "mpp-init_from": ("mpp", f"{PRETRAIN} --init_from mpp/model"),
    "finetune": ("finetune", f"{SAME} --model mpp/model --steps 8 --rates 0.1 --label_smoothing 0.1"),
}


# Weights on which the loss does not depend have gradients of rounding errors, which Adam makes steps of: another CPU
# takes others. They are not compared.


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_version_0_1_resumes_under_todays_names_as_it_would_have_gone_on(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "mpp" / "model", "mpp/model")
    shutil.copytree(GOLDEN / name, "run", ignore=shutil.ignore_patterns("model"))
    recipe, words = RUNS[name]
    run(recipe, f"{words} --out run")
    assert "was" not in capsys.readouterr().err  # no warning of another value
    assert losses(Path("run")) == pytest.approx(losses(GOLDEN / name), rel=1e-5)
    expected, weights = load_file(GOLDEN / name / "model/model.safetensors"), load_file("run/model/model.safetensors")
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        if (name, key) == ("moco_v3", "norm.bias"):  # batch norm takes it away again
            continue
        both = weights[key], tensor
        if key.endswith("qkv.bias"):  # a key's bias adds the same to all scores of a query
            both = tuple(bias.view(3, -1)[[0, 2]] for bias in both)
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("recipe", "old", "new"),
    [
        ("mae", "--drop 0.5 --no-normalise_targets", {"mask_ratio": 0.5, "norm_pix_loss": False}),
        ("mae", "--drop=0.5 --spares nothing", {"mask_ratio": 0.5, "no_weight_decay": "nothing"}),
        (
            "mpp",
            "--start x --only 1 2 --min-scale 0.3",
            {"init_from": "x", "only_classes": [1, 2], "smallest_crop": 0.3},
        ),
        ("dino", "--held_epochs 0.1 --centre_momentum 0.5", {"freeze_last_layer_epochs": 0.1, "center_momentum": 0.5}),
        ("moco_v3", "--no-colour --parts 2", {"color": False, "chunks": 2}),
        ("supervised", "--smoothing 0.1", {"label_smoothing": 0.1}),
    ],
)
def test_an_option_works_by_its_old_name_and_the_new_one_is_said(recipe, old, new, capsys):
    kind = importlib.import_module(f"sslvit.recipes.{recipe}").Config
    config = configuration(parse(kind, args=old.split()))
    assert {name: config[name] for name in new} == new
    notes = capsys.readouterr().err
    assert all(f"is now --{name};" in notes.replace("--no-", "--") for name in new)


def test_the_budget_of_operations_is_one_of_flops_now():
    for words in (["--budget", "operations"], ["--budget=operations"]):
        assert parse(ComparisonConfig, args=words).budget == "flops"


def test_a_run_begun_with_another_preset_is_resumed_by_naming_it():
    with pytest.raises(ValueError, match=r"model was 'S/16'.* add --preset paper"):
        check_unchanged({"preset": "paper", "model": "S/16"}, SMALL)
