"""Weights that are split among two processes: the same training, the same checkpoints, by flag and by launcher."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import preloaded
import pytest
from objectives_zoo import OBJECTIVES
from sharded_run import STEPS, run as train
from started import free_port
from tiny_run import fingerprint, losses

from sslvit.storage import checkpoint

pytestmark = pytest.mark.processes

HERE = Path(__file__).parents[1] / "support"
SCRIPT = str(HERE / "sharded_run.py")
CONFIGS = HERE.parents[1] / "recipes" / "configs"


def trained(out: Path, methods: list[str]) -> Path:
    for done in preloaded.run_ranks([sys.executable, SCRIPT, str(out), *methods]):
        assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("sharded"), ["mae"])


def check_same_training(whole: Path, split: Path) -> None:
    ours, theirs = losses(split), losses(whole)
    assert len(ours) == len(theirs) == STEPS + 1
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in mine.items():
            assert value == pytest.approx(other[name], rel=5e-4), name
    mine, other = (checkpoint.latest(run / "checkpoints") for run in (split, whole))
    assert set(mine.tensors) == set(other.tensors)
    for name, tensor in mine.tensors.items():
        assert tensor.shape == other.tensors[name].shape
        # AdamW makes a step of 0.001 of a gradient that is nothing but rounding, such as that of the keys' bias.
        assert (tensor.double() - other.tensors[name].double()).abs().max() < 1e-3, name


def test_split_weights_train_like_whole_ones(runs):
    check_same_training(runs / "mae-False", runs / "mae-True")


@pytest.mark.slow
def test_every_objective_trains_with_split_weights_like_with_whole_ones(tmp_path):
    trained(tmp_path, list(OBJECTIVES))
    for method in OBJECTIVES:
        check_same_training(tmp_path / f"{method}-False", tmp_path / f"{method}-True")


def test_each_process_has_half_of_them(runs):
    shares = [json.loads((runs / f"share-{rank}.json").read_text()) for rank in (0, 1)]
    assert shares[0][0] + shares[1][0] == shares[0][1]
    assert 0.4 < shares[0][0] / shares[0][1] < 0.6


def test_one_process_goes_on_from_a_split_run(runs, tmp_path, monkeypatch):
    """World size 2 and split, then 1 and whole: the losses of two whole processes."""
    whole, split = runs / "mae-False", tmp_path / "mae"
    shutil.copytree(runs / "mae-True", split, ignore=shutil.ignore_patterns("model"))
    shutil.rmtree(split / "checkpoints" / f"step-{STEPS:08d}")
    assert checkpoint.latest(split / "checkpoints").step == STEPS - 4
    train("mae", split, accumulation=2, resume=True)
    for mine, other in zip(losses(split)[-4:], losses(whole)[-4:], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_a_split_run_goes_on_split_bit_for_bit(runs, tmp_path):
    """Moments come from a file in any order, another in each process: they must be gathered in one."""
    out = tmp_path
    shutil.copytree(runs / "mae-True", out / "mae-True", ignore=shutil.ignore_patterns("model"))
    shutil.rmtree(out / "mae-True" / "checkpoints" / f"step-{STEPS:08d}")
    trained(out, ["again"])
    assert fingerprint(out / "mae-True") == fingerprint(runs / "mae-True")


@pytest.mark.parametrize("config", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_the_config_files_start_processes_that_train_so(runs, tmp_path, config):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--num_processes", "2", "--main_process_port", free_port(), "--mixed_precision", "no"]
    command += [SCRIPT, str(tmp_path), "launcher"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "share-1.json").exists() == (config == "fsdp2")
    for mine, other in zip(losses(tmp_path / "mae-launcher")[1:], losses(runs / "mae-False")[1:], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
