"""A run made longer or shorter goes on by the schedules of its new length, and one that was stopped is a model."""

import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import preloaded
import pytest
import torch
from recipes_run import RECIPES, TINY, TRAINING, run
from safetensors.torch import load_file
from started import said
from tiny_run import DEFAULTS, losses, objective, source, tiny_run

from sslvit.config import TrainConfig
from sslvit.errors import DataError, NoInput, Preempted
from sslvit.processes.collectives import start
from sslvit.reports.run import write_report
from sslvit.storage import checkpoint, sealed
from sslvit.train import pretrain
from sslvit.views.pretraining import CropFlip
from sslvit.weights.folder import load_backbone
from sslvit.weights.foreign.open import open_backbone
from sslvit.weights.info import about

PER_PASS = 4  # steps: 32 images in batches of 8


def cosine(step: int, steps: int, *, warmup: int, peak: float = 1e-3) -> float:
    """The rate of the step, counted from 0, by the formula of the papers."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def logged_rates(out: Path) -> dict[int, float]:
    """By steps, counted from 0."""
    return {line["step"] - 1: line["lr"] for line in losses(out)}


def stop_at(out: Path, step: int, **changes) -> None:
    """A run that is asked to stop at a step."""

    class Asking(type(objective())):
        def forward(self, batch, progress):
            if round(progress * steps) == step - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().forward(batch, progress)

    config = TrainConfig(out=out, **(DEFAULTS | changes))
    steps = round(config.epochs * PER_PASS)
    made = objective()
    made.__class__ = Asking
    with pytest.raises(Preempted):
        pretrain(made, source(), CropFlip(32), config, start(threads=1))


# Longer and shorter


def test_an_ended_run_that_is_made_longer_trains_on_by_the_new_schedule(tmp_path, capsys):
    out = tmp_path / "run"
    tiny_run(out, epochs=2.0)
    first = losses(out)
    capsys.readouterr()
    tiny_run(out, epochs=4.0, resume=True)
    old, new = cosine(7, 8, warmup=4), cosine(8, 16, warmup=4)
    told = (
        "warning: --epochs was 2, is now 4: the run continues at step 8 of 16 instead of 8, with the schedules of the "
    )
    told += f"new length: the learning rate jumps from {old:.4g} to {new:.4g}. It will not be the run that "
    assert told in capsys.readouterr().out
    assert losses(out)[:8] == first
    rates = logged_rates(out)
    assert sorted(rates) == list(range(16))
    for step in range(16):
        assert rates[step] == pytest.approx(cosine(step, 8 if step < 8 else 16, warmup=4), abs=1e-12), step
    assert json.loads((out / "config.json").read_text())["epochs"] == 4
    assert json.loads((out / "cost.json").read_text())["images"] == 128
    assert json.loads((out / "model" / "config.json").read_text())["sslvit"]["steps"] == 16
    sealed.write(out / "config.json", sealed.read(out / "config.json") | {"image_size": 32})  # which recipes choose
    write_report(out)
    for name in ("report.html", "report.md", "model/README.md"):
        assert "-epochs was 2, is now 4" in (out / name).read_text().replace("\\", ""), name


def test_a_stopped_run_is_made_shorter_and_ends_at_the_end_of_the_new_schedule(tmp_path, capsys):
    out = tmp_path / "run"
    stop_at(out, 6, epochs=4.0)
    tiny_run(out, epochs=2.0, resume=True)
    rates = logged_rates(out)
    assert sorted(rates) == list(range(8))
    for step in range(8):
        assert rates[step] == pytest.approx(cosine(step, 16 if step < 6 else 8, warmup=4), abs=1e-12), step
    assert "--epochs was 4, is now 2: the run continues at step 6 of 8 instead of 16" in capsys.readouterr().out
    assert checkpoint.latest(out / "checkpoints").step == 8


@pytest.mark.parametrize("epochs", [1.0, 1.5])  # fewer than were done, and as many
def test_no_more_epochs_than_are_done_is_one_error_and_changes_nothing(tmp_path, epochs):
    out = tmp_path / "run"
    stop_at(out, 6, epochs=4.0)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "run.lock"}
    steps = round(epochs * PER_PASS)
    said = (
        rf"--epochs {epochs:g} is {steps} steps, and the run in {out} has done 6 of its 16 \(--epochs 4\): give more "
    )
    with pytest.raises(ValueError, match=rf"{said}than 1\.5"):
        tiny_run(out, epochs=epochs, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "run.lock"} == before


def test_a_run_made_longer_goes_on_after_a_stop_as_if_it_had_not_been_stopped(tmp_path, capsys):
    for name in ("whole", "stopped"):
        tiny_run(tmp_path / name, epochs=2.0)
    tiny_run(tmp_path / "whole", epochs=4.0, resume=True)
    stop_at(tmp_path / "stopped", 11, epochs=4.0, resume=True)
    capsys.readouterr()
    tiny_run(tmp_path / "stopped", epochs=4.0, resume=True)
    assert "--epochs was" not in capsys.readouterr().out
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    lengths = [json.loads((tmp_path / n / "environment.json").read_text())["lengths"] for n in ("whole", "stopped")]
    assert lengths[0] == lengths[1]
    assert len(lengths[0]) == 1


def test_a_run_made_longer_twice_keeps_both_sentences(tmp_path):
    for epochs in (1.0, 2.0, 3.0):
        tiny_run(tmp_path / "run", epochs=epochs, resume=epochs > 1)
    told = json.loads((tmp_path / "run/environment.json").read_text())["lengths"]
    assert [sentence.partition(":")[0] for sentence in told] == ["--epochs was 1, is now 2", "--epochs was 2, is now 3"]


def test_a_model_that_a_kill_prevented_is_written_by_the_next_restart(tmp_path):
    out = tmp_path / "run"
    tiny_run(out, epochs=2.0)
    for name in ("model", "cost.json"):
        (out / name).rename(tmp_path / name)
    tiny_run(out, epochs=4.0, resume=True)
    after = (out / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "model")
    for name in ("model", "cost.json"):  # as the shorter run had left them
        (tmp_path / name).rename(out / name)
    tiny_run(out, epochs=4.0, resume=True)
    assert (out / "model" / "model.safetensors").read_bytes() == after
    assert json.loads((out / "cost.json").read_text())["images"] == 128


# A run that has not ended, as a model


@pytest.mark.parametrize("recipe", TRAINING)
def test_a_run_without_a_model_gives_the_one_that_it_would_have_written(recipe, tmp_path, caplog):
    out = tmp_path / "run"
    run(recipe, f"{TRAINING[recipe]} --out {out}")
    (out / "model").rename(tmp_path / "model")
    backbone, written = open_backbone(out)
    assert f"{out} has not ended: its model is taken from the checkpoint of step 4 of 4" in caplog.text
    theirs, said = open_backbone(tmp_path / "model")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], tensor), name
    assert backbone.config == theirs.config
    names = ("objective", "readout", "data", "classes", "head", "version")
    assert {name: written[name] for name in names} == {name: said[name] for name in names}
    assert not backbone.training


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A supervised run that was killed between two checkpoints."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    run("supervised", f"{TINY} --out {out} --save_every 3")
    for name in ("model", "pictures"):
        shutil.rmtree(out / name)
    for name in ("cost.json", "report.html", "report.md"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    return out


DATA = "--data shapes:n=48 --threads 1"
USES = {
    "probe": f"{DATA} --no-random --declared --draws 1 --fractions 1 --cache CACHE --out OUT",
    "linear_probe": f"{DATA} --cache CACHE",
    "finetune": f"{DATA} --steps 1 --batch_size 8 --lr .1 --rates --out OUT",
    "analyse": f"{DATA} --images 8 --shown 2 --out OUT",
}


@pytest.mark.parametrize("recipe", USES)
@pytest.mark.parametrize("named", ["", "/model"])  # the run, and the model that it will have
def test_every_recipe_that_takes_a_model_takes_a_run_that_has_not_ended(recipe, named, stopped, tmp_path, caplog):
    words = USES[recipe].replace("CACHE", str(tmp_path / "cache")).replace("OUT", str(tmp_path / "out"))
    run(recipe, f"--model {stopped}{named} {words}")
    assert f"{stopped} has not ended: its model is taken from the checkpoint of step 3 of 4" in caplog.text


def test_a_run_starts_from_one_that_has_not_ended(stopped, tmp_path, caplog):
    run("mpp", f"{TINY} --init_from {stopped} --out {tmp_path / 'run'}")
    assert "taken from the checkpoint of step 3 of 4" in caplog.text


@pytest.mark.processes
def test_info_says_the_step_and_convert_takes_the_head_along(stopped, tmp_path):
    text = about(stopped)
    assert "steps       3 of 4: the run has not ended" in text
    assert "objective   Supervised" in text
    command = [sys.executable, "-m", "sslvit", "convert", str(stopped), str(tmp_path / "timm")]
    done = preloaded.run(command, text=True)
    assert done.returncode == 0, done.stderr
    found = checkpoint.latest(stopped / "checkpoints").tensors
    weights = load_file(tmp_path / "timm" / "model.safetensors")
    assert torch.equal(weights["head.weight"], found["objective.head.weight"])
    assert torch.equal(
        weights["cls_token" if "cls_token" in weights else "norm.weight"], found["objective.backbone.norm.weight"]
    )


def test_a_damaged_checkpoint_is_passed_over_and_nothing_is_moved_or_written(tmp_path, caplog):
    out = tmp_path / "run"
    stop_at(out, 7)
    newest = out / "checkpoints" / "step-00000007"
    (newest / "tensors.safetensors").write_bytes(b"rotten")
    before = sorted(str(path) for path in out.rglob("*"))
    load_backbone(out)
    assert "taken from the checkpoint of step 6 of 16" in caplog.text
    assert sorted(str(path) for path in out.rglob("*")) == before


def test_a_run_that_goes_on_after_its_end_says_that_its_model_is_older(tmp_path, caplog):
    out = tmp_path / "run"
    tiny_run(out, epochs=1.0)
    stop_at(out, 6, epochs=2.0, resume=True)
    load_backbone(out)
    assert (
        f"{out / 'model'}: the run has gone on to step 6; this is its model of step 4, where it had ended"
        in caplog.text
    )


def test_a_checkpoint_without_a_description_of_the_model_is_refused_in_a_sentence(tmp_path):
    found = checkpoint.latest(_stopped := tmp_path / "run" / "checkpoints")
    assert found is None
    checkpoint.save(_stopped, 3, {"objective.backbone.x": torch.ones(1)}, {"progress": {}})
    with pytest.raises(DataError, match=r"of a version of sslvit that did not write down.*--resume goes on"):
        load_backbone(tmp_path / "run")
    with pytest.raises(NoInput):
        load_backbone(tmp_path / "nothing")


@pytest.mark.processes
def test_the_model_of_a_run_is_opened_again_and_again_while_it_trains(tmp_path):
    """Each of its steps is a checkpoint, and all but two are deleted under the reader's feet."""
    out = tmp_path / "run"
    script = str(Path(__file__).parents[1] / "support" / "tiny_run.py")
    with (tmp_path / "run.stderr").open("w") as log:
        command = [sys.executable, script, str(out), "epochs=500.0", "save_every=1"]
        process = preloaded.Process(command, stderr=log, stdout=log)
    try:
        deadline, steps = time.monotonic() + 200, set()
        while checkpoint.newest_step(out / "checkpoints") is None:
            assert process.poll() is None, said(out)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        while len(steps) < 8 and time.monotonic() < deadline:
            steps.add(open_backbone(out)[1]["step"])
        assert process.poll() is None, said(out)
    finally:
        process.kill()
        process.wait()
    assert len(steps) >= 8


@pytest.mark.processes
def test_a_dry_run_that_is_stopped_does_not_advise_to_resume(tmp_path):
    program = (
        "import os, runpy, signal, sys, sslvit.reports.dry_run as dry_run\n"
        "dry_run.look = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.argv = ['mpp.py', *{(TINY + ' --dry_run --out ' + str(tmp_path / 'run')).split()!r}]\n"
        f"runpy.run_path({str(RECIPES / 'mpp.py')!r}, run_name='__main__')\n"
    )
    done = preloaded.run([sys.executable, "-c", program], text=True)
    assert done.returncode == 75, done.stderr
    assert "stopped: asked to stop; nothing was trained, and the same command starts again" in done.stderr
    assert "resume" not in done.stderr
