"""Hostile and mistyped command lines: each ends within a second of its parsing, in one sentence that names the flag and
what is allowed, with an exit code that says so, and nothing is written or executed."""

import importlib
import os
import runpy
import sys
import time
from pathlib import Path

import pytest

from sslvit.cli.parse import choose
from sslvit.errors import BAD_CONFIGURATION, NO_INPUT
from sslvit.processes.collectives import start

RECIPES = Path(__file__).parents[2] / "recipes"
PROGRAM = "__import__('os').mkdir('canary')"

# The recipe, its words, and what the sentence must hold.
BAD = [
    ("mpp", "--epchs 3", ("--epchs", "--epochs")),
    ("mpp", "--epochs three", ("--epochs", "three")),
    ("baselines", "--limit_train -5", ("--limit_train", "-5", "at least 0")),
    ("probe", "--limit_train -5", ("--limit_train", "-5", "at least 0")),
    ("linear_probe", "--limit -5", ("--limit", "-5", "at least 0")),
    ("baselines", "--k 0", ("--k", "0", "above 0")),
    ("mpp", "--epochs 1e308", ("--epochs", "1e+308", "at most 1e+07")),
    ("mpp", "--timeout 1e18", ("--timeout", "1e+18", "at most 1e+07")),
    ("mpp", "--batch_size 99999999999", ("--batch_size", "must be at most")),
    ("mpp", "--canvas 10000000", ("--canvas", "10000000")),
    ("mpp", "--data shapes:n=1000000000000", ("1,000,000,000,000 images", "memory")),
    ("mpp", "--epochs nan", ("--epochs", "nan")),
    ("mpp", "--epochs 1e400", ("--epochs", "inf", "finite")),
    ("mpp", "--epochs -1", ("--epochs", "-1", "above 0")),
    ("mpp", "--batch_size 0", ("--batch_size", "0", "above 0")),
    ("mpp", "--batch_size 2.5", ("--batch_size", "2.5")),
    ("mpp", "--batch_size 64 --accumulation 3", ("batch_size 64", "3")),
    ("mpp", "--lr nan", ("--lr", "nan")),
    ("mpp", "--lr inf", ("--lr", "inf")),
    ("mpp", "--lr -0.1", ("--lr", "-0.1")),
    ("mpp", "--lr 1e-3 --base_lr 2e-3", ("--lr 0.001", "--base_lr 0.002", "both")),
    ("mae", "--preset small --base_lr 1e-3 --lr 2e-3", ("--lr 0.002", "--base_lr 0.001", "both")),
    ("mpp", "--base_lr 0", ("--base_lr is 0", "above 0")),
    ("mpp", "--warmup_epochs -1", ("--warmup_epochs", "-1")),
    ("mpp", "--weight_decay nan", ("--weight_decay", "nan")),
    ("mpp", "--weight_decay inf", ("--weight_decay", "inf")),
    ("mpp", "--betas 0.9", ("--betas",)),
    ("mpp", "--betas 0.9 1.5", ("--betas", "1.5")),
    ("mpp", "--clip -1", ("--clip", "-1")),
    ("mpp", "--precision fp8", ("--precision", "fp8", "bf16")),
    ("mpp", "--optimizer lion", ("--optimizer", "lion", "adamw")),
    ("mpp", "--no_weight_decay all", ("--no_weight_decay", "all", "tokens_and_vectors")),
    ("mpp", "--seed 1.5", ("--seed", "1.5")),
    ("mpp", "--workers -1", ("--workers", "-1")),
    ("mpp", "--workers 2000000", ("--workers", "2000000")),
    ("mpp", "--keep 0", ("--keep", "0")),
    ("mpp", "--save_every 0", ("--save_every", "0")),
    ("mpp", "--log_every -5", ("--log_every", "-5")),
    ("mpp", "--timeout 0", ("--timeout", "0")),
    ("mpp", "--max_bad 2", ("max_bad", "2")),
    ("mpp", "--layer_decay 0", ("--layer_decay", "0")),
    ("mpp", "--log_with nothing", ("--log_with", "nothing", "tensorboard, trackio, wandb")),
    ("mpp", "--log_with comet_ml", ("--log_with comet_ml", "pip install comet_ml", "sslvit[trackers]")),
    ("mpp", "--target colour", ("--target", "colour", "downsized")),
    ("mpp", "--corrupt 0", ("corrupt", "0")),
    ("mpp", "--corrupt 1.5", ("corrupt", "1.5")),
    ("mpp", "--smallest_crop 0", ("--smallest_crop", "0", "above 0")),
    ("mpp", "--model S16", ("S16",)),
    ("mpp", "--model Q/16", ("Q", "XS")),
    ("mpp", "--model S/0", ("S/0",)),
    ("mpp", f"--model {PROGRAM}", ("__import__",)),
    ("mpp", "--image_size -32", ("--image_size", "-32", "above 0")),
    ("mpp", "--image_size 0 32", ("--image_size is 0 32", "above 0")),
    ("mpp", "--image_size 32 30 --model XS/8", ("30", "8")),
    ("mpp", "--image_size 32 32 32", ("--image_size takes 1 or 2 whole numbers", "got 32 32 32")),
    ("mpp", "--image_size 30 --model XS/8", ("30", "8")),
    ("mpp", "--image_size 1000000000", ("image_size", "1000000000")),
    ("mpp", "--preset huge", ("--preset", "huge")),
    ("mae", "--preset paper", ("--data",)),
    ("supervised", "--preset vit", ("--data",)),
    ("mpp", "--channels 2", ("--channels", "2")),
    ("mpp", "--data nope:/x", ("nope", "folder")),
    ("mpp", "--data folder:/not/there", ("/not/there",)),
    ("mpp", "--data csv:/not/there.csv", ("/not/there.csv", "CSV")),
    ("mpp", "--data csv:", ("csv:", "lacks a path or name")),
    ("mpp", "--root /tmp", ("--root /tmp", "csv", "not for shapes")),
    ("mpp", "--data parquet:/x --root /not/there", ("--root /not/there", "not a folder")),
    ("mpp", "--data stream:webdataset:/x --epoch_images 9 --root /tmp", ("--root /tmp", "not for webdataset")),
    ("mpp", f"--data {PROGRAM}", ("__import__",)),
    ("mpp", "--only_classes 99", ("--only_classes", "99")),
    ("mpp", "--images 999999999", ("--images", "999,999,999")),
    ("mpp", "--resume --overwrite", ("resume", "overwrite")),
    ("mpp", "--init_from /not/there", ("/not/there",)),
    ("mpp", "_target_=os.system", ("_target_",)),
    ("mpp", "--config evil.yaml", ("--config",)),
    ("mpp", "--trust_remote_code", ("--trust_remote_code",)),
    ("mae", "--preset small --mask_ratio 1", ("mask_ratio", "1")),
    ("simmim", "--image_size 32 --model XS/4 --unit 3", ("unit 3", "8 x 8", "[1, 2, 4, 8]")),
    ("simmim", "--lr_drops 2", ("--lr_drops 2", "between 0 and 1")),
    ("dino", "--preset small --crops 4 17 16", ("--crops 4 17 16", "patch of 4 x 4")),
    ("dino", "--preset small --momentum 2", ("momentum", "2")),
    ("ibot", "--mask_ratios 0.5 0.1", ("mask_ratios 0.5 0.1", "smaller first")),
    ("ibot", "--image_size 32 --model XS/32", ("1 x 1 patches",)),
    ("dinov2", "--accumulation 2", ("--accumulation 2", "the loss of DINOv2 depends on which images are in a batch")),
    ("dinov2", "--gram_weight 2 --epochs 5", ("--gram_epochs 10 2 of --epochs 5", "give 2.5 0.5")),
    ("dinov2", "--koleo_group 1", ("--koleo_group is 1", "at least 2")),
    ("moco_v3", "--preset small --accumulation 2 --batch_size 64", ("--accumulation 2",)),
    ("supervised", "--preset small --label_smoothing 2", ("label_smoothing", "2")),
    ("finetune", "--model /not/there", ("/not/there",)),
    ("finetune", "--protocol linear", ("--protocol", "linear", "modern")),
    ("probe", "--model /not/there", ("/not/there",)),
    ("linear_probe", "--protocol linear", ("--protocol", "linear", "mae")),
    ("embed", "/not/there shapes x.parquet", ("/not/there",)),
    ("embed", "--model runs/mpp --data shapes --out features.csv", ("--out features.csv", ".parquet or .npy")),
    ("embed", "--model runs/mpp --data shapes --out /proc", ("--out /proc", ".parquet or .npy")),
    ("embed", "runs/mpp shapes x.parquet --readout all", ("--readout all", "declared", "patches")),
    ("embed", "runs/mpp shapes x.parquet --readout cls:0", ("--readout cls:0", "cls:4")),
    ("embed", "runs/mpp shapes x.parquet --limit -1", ("--limit", "-1", "at least 0")),
    ("embed", "runs/mpp shapes x.parquet --batch_size 0", ("--batch_size", "above 0")),
    ("embed", "--split val", ("--split", "val", "test")),
    ("compare", "--methods nothing", ("nothing",)),
    ("compare", "--budget dollars", ("--budget", "dollars", "flops")),
    ("study", "--study everything", ("--study", "everything", "targets")),
]


@pytest.mark.parametrize(("recipe", "words", "held"), BAD, ids=[f"{recipe} {words}"[:60] for recipe, words, _ in BAD])
def test_a_bad_command_line_is_one_sentence_in_a_second_and_changes_nothing(
    recipe, words, held, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    threads = [] if recipe in ("compare", "study") else ["--threads", "1"]
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *words.split(" "), *threads])
    began = time.process_time()  # which other work beside the tests does not lengthen
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")
    took, said = time.process_time() - began, capsys.readouterr().err
    assert stopped.value.code in (BAD_CONFIGURATION, NO_INPUT), said
    said_too = said.replace("-", "_")
    assert not [text for text in held if text not in said and text.replace("-", "_") not in said_too], said
    assert "Traceback" not in said
    assert took < 1, took
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module", autouse=True)
def everything_is_imported():
    """What a second is counted without: Python and torch start in two to four, on the machine this was written on."""
    runpy.run_path(str(RECIPES / "mpp.py"))
    start(threads=1)


@pytest.mark.parametrize(
    ("recipe", "words", "lr"),
    [
        ("mpp", "", 1e-3),  # the preset's
        ("mpp", "--base_lr 4e-3 --batch_size 128", 2e-3),  # beside the preset's lr
        ("mpp", "--base_lr=4e-3", 1e-3),
        ("mpp", "--base-lr 4e-3", 1e-3),
        ("mpp", "--preset paper --data shapes --base_lr 4e-3", 64e-3),
        ("mpp", "--lr 0 --base_lr 4e-3", 1e-3),
        ("mae", "--preset small", 1e-3),
        ("mae", "--preset small --lr 3e-3", 3e-3),  # beside the preset's base_lr
        ("mae", "--preset small --base_lr 8e-3", 2e-3),
        ("mae", "--preset small --base_lr 4e-3 --batch_size 128", 2e-3),  # as in the preset, but said
        ("finetune", "--base_lr 1e-3 --batch_size 512", 2e-3),
        ("finetune", "--protocol modern --lr 5e-4", 5e-4),
    ],
)
def test_the_rate_on_the_command_line_wins_over_the_other_in_the_preset(recipe, words, lr):
    presets = importlib.import_module(f"sslvit.recipes.{recipe}").PRESETS
    assert choose(presets, words.split()).lr == pytest.approx(lr, rel=1e-12)
