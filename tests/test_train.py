"""The loop: no restart, process count, part or worker changes what it computes; what is not finite changes nothing."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import preloaded
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from PIL import Image
from safetensors.torch import load_file
from started import free_port
from tiny_run import DEFAULTS, STEPS, fingerprint, losses, objective, source, tiny_run

from sslvit.config import TrainConfig, completes
from sslvit.data.loader import EpochSampler, load
from sslvit.data.spec import open_source
from sslvit.errors import DataError, Diverged
from sslvit.objectives.mpp import MPP
from sslvit.objectives.objective import Objective
from sslvit.processes.collectives import check_trackers, start
from sslvit.storage import checkpoint
from sslvit.train import pretrain
from sslvit.views.pretraining import CropFlip

HERE = Path(__file__).parent / "support"
RUN = [sys.executable, str(HERE / "tiny_run.py")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "run"
    tiny_run(out)
    return out


def test_a_run_leaves_its_log_configuration_environment_checkpoints_and_model(reference):
    assert [line["step"] for line in losses(reference)] == list(range(1, STEPS + 1))
    assert json.loads((reference / "config.json").read_text())["batch_size"] == 8
    assert json.loads((reference / "environment.json").read_text())["packages"]["torch"] in torch.__version__
    assert [p.name for p in sorted((reference / "checkpoints").iterdir())] == ["step-00000015", "step-00000016"]
    assert (reference / "model" / "model.safetensors").exists()


def test_a_run_says_what_it_trains_on_and_shows_its_first_batch(reference):
    assert "32 x 32" in (reference / "data.txt").read_text()
    with Image.open(reference / "first_batch.png") as sheet:
        pixels = np.asarray(sheet)
    first = EpochSampler(source(), batch_size=8, accumulation=1, rank=0, processes=1, seed=0)[0].samples
    assert pixels.shape == (34, 8 * 34, 3)
    assert (pixels[1:33, 35:67] == first.pixels[1].permute(1, 2, 0).numpy()).all()


def test_the_loss_falls(reference):
    loss = [line["loss"] for line in losses(reference)]
    assert sum(loss[-4:]) < sum(loss[:4]) - 0.5


def test_the_same_seed_is_the_same_run_and_another_is_another(reference, tmp_path):
    tiny_run(tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(reference)
    tiny_run(tmp_path / "other", seed=1)
    assert losses(tmp_path / "other")[0] != losses(reference)[0]


def test_resuming_a_finished_run_does_nothing(reference):
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.name != "run.lock"}
    tiny_run(reference, resume=True)
    assert {p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.name != "run.lock"} == before


@pytest.mark.parametrize(
    "changes", [{"accumulation": 2}, {"accumulation": 8}, {"workers": 1}, {"workers": 2}, {"grad_checkpointing": True}]
)
def test_parts_workers_and_checkpointing_change_no_loss(reference, tmp_path, changes):
    tiny_run(tmp_path / "run", **changes)
    for ours, theirs in zip(losses(tmp_path / "run"), losses(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5 if "accumulation" in changes else 0)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED would take over the checkpoints.*use FSDP2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1 would take over"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "fsdp_offload_params of .* is not supported: use more processes",
        ),
    ],
)
def test_launchers_that_would_take_over_are_refused_in_a_sentence(asked, said, monkeypatch):
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        start(threads=1)


def test_shard_has_no_effect_with_one_process(tmp_path, capsys, reference):
    tiny_run(tmp_path / "run", shard=True)
    assert "warning: --shard has no effect with a single process" in capsys.readouterr().out
    assert fingerprint(tmp_path / "run") == fingerprint(reference)


@pytest.mark.processes
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_are_one(tmp_path, accumulation):
    """Losses within 1e-5 over 20 steps, and the same masks: every loss is of the same corrupted patches."""
    for done in preloaded.run_ranks([*RUN, str(tmp_path / "two"), "epochs=5", f"accumulation={accumulation}"]):
        assert done.returncode == 0, done.stderr
    tiny_run(tmp_path / "one", epochs=5)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20
    for ours, theirs in zip(one, two, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["lr"] == theirs["lr"]
        assert ours["accuracy_of_commonest_colour"] > 0


def check_stopped_with_the_way_out(done: subprocess.CompletedProcess, out: Path) -> None:
    assert done.returncode != 0
    assert "2 processes were requested, but this one sees 1" in done.stderr
    assert "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2" in done.stderr
    assert not out.exists()


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU these processes see each other")
def test_processes_of_torchrun_that_would_train_alone_are_stopped_with_the_way_out(tmp_path):
    for done in preloaded.run_ranks([*RUN, str(tmp_path / "run")], ACCELERATE_USE_CPU="false"):
        check_stopped_with_the_way_out(done, tmp_path / "run")


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU these processes see each other")
def test_processes_of_accelerate_that_would_train_alone_are_stopped_with_the_way_out(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--main_process_port", free_port(), *RUN[1:], str(tmp_path / "run")]
    env = os.environ | {"HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    check_stopped_with_the_way_out(done, tmp_path / "run")


@pytest.mark.processes
@pytest.mark.slow
def test_sigterm_saves_the_step_exits_75_and_the_same_command_goes_on(tmp_path):
    long = {"epochs": 100.0, "save_every": 10_000}
    words = [f"{name}={json.dumps(value)}" for name, value in long.items()]
    process = preloaded.Process([*RUN, str(tmp_path / "run"), *words, "resume=true"], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75, stderr
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert saved.step == losses(tmp_path / "run")[-1]["step"] < 400
    assert f"asked to stop at step {saved.step} of 400" in stderr
    tiny_run(tmp_path / "run", **long, resume=True)
    tiny_run(tmp_path / "whole", **long)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_run_whose_launcher_is_stopped_saves_and_stops_too(tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", *RUN[1:]]
    words = [str(tmp_path / "run"), "epochs=1000.0", "save_every=100000"]
    process = subprocess.Popen([*launcher, *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    (child,) = psutil.Process(process.pid).children()
    process.terminate()
    process.wait(30)
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert saved.step == losses(tmp_path / "run")[-1]["step"] < 4000


def campaign(kills: int, seed: int, folder: Path) -> dict:
    command = [sys.executable, str(HERE / "kill_campaign.py"), str(kills), str(seed), str(folder)]
    done = preloaded.run(command, timeout=1800, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def scaled(monkeypatch) -> Accelerator:
    """With fp16's scaler, on a CPU, which Accelerate would use with fp16 only."""
    accelerator = start(threads=1)
    scaler = torch.amp.GradScaler("cpu")
    monkeypatch.setattr(accelerator, "scaler", scaler)

    def unscale(optimizer=None) -> None:
        for one in accelerator._optimizers:
            scaler.unscale_(one.optimizer)

    monkeypatch.setattr(accelerator, "unscale_gradients", unscale)
    return accelerator


def overflowing(at: set[int]) -> MPP:
    """Of whose gradients one overflows at these steps."""
    run, calls = objective(), []
    run.backbone.norm.weight.register_hook(lambda g: calls.append(1) or (g / 0 if len(calls) - 1 in at else g))
    return run


def test_a_step_that_fp16s_scaler_skips_moves_no_teacher(tmp_path, scaled, monkeypatch):
    moved, run = [], overflowing(at={0, 1, 5})
    monkeypatch.setattr(type(run), "after_step", lambda self, progress: moved.append(round(progress * STEPS)))
    pretrain(run, source(), CropFlip(32), TrainConfig(out=tmp_path / "run", **DEFAULTS), scaled)
    assert moved == [step for step in range(1, STEPS + 1) if step not in (1, 2, 6)]
    assert all(p.isfinite().all() for p in run.parameters())


def test_gradients_that_overflow_at_any_scale_end_the_run(tmp_path, scaled, monkeypatch):
    monkeypatch.setattr("sslvit.training.guard.OVERFLOWS", 5)
    run, before = overflowing(at=set(range(STEPS))), objective()
    with pytest.raises(Diverged, match="gradients overflowed at 5 steps in a row, up to step 4"):
        pretrain(run, source(), CropFlip(32), TrainConfig(out=tmp_path / "run", **DEFAULTS), scaled)
    assert all(torch.equal(a, b) for a, b in zip(run.parameters(), before.parameters(), strict=True))


def test_a_loss_that_is_not_finite_under_fp16_is_left_out_and_the_run_goes_on(tmp_path, scaled):
    poisoned = Poisoned({3})
    pretrain(poisoned, source(), CropFlip(32), TrainConfig(out=tmp_path / "run", **DEFAULTS), scaled)
    assert poisoned.moved == STEPS - 1


POISONED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny_run
from sslvit.processes import collectives
from sslvit.cli import run_cli
from sslvit.objectives.mpp import MPP
forward = MPP.forward
def poisoned(self, batch, progress):
    loss, metrics = forward(self, batch, progress)
    if progress >= 0.5 and collectives.rank() == 1:
        if sys.argv[3] == "loss":
            loss = loss * float("nan")
        else:
            loss.register_hook(lambda gradient: gradient * float("nan"))
    return loss, metrics
MPP.forward = poisoned
run_cli(lambda: tiny_run.tiny_run(Path(sys.argv[2]), shard=sys.argv[4] == "split"))
"""


@pytest.mark.processes
@pytest.mark.parametrize(("what", "weights"), [("loss", "whole"), ("gradient", "split")])
def test_non_finite_numbers_on_one_of_two_processes_stop_both_and_are_not_saved(tmp_path, what, weights):
    (tmp_path / "poisoned.py").write_text(POISONED)
    words = [str(tmp_path / "poisoned.py"), str(HERE), str(tmp_path / "run"), what, weights]
    ended = preloaded.run_ranks([sys.executable, *words])
    assert [process.returncode for process in ended] == [3, 3]
    assert f"not finite at 3 steps in a row, up to step {STEPS // 2 + 2}" in ended[0].stderr
    for step in range(STEPS // 2, STEPS // 2 + 3):
        kept = sorted(file.name for file in (tmp_path / "run" / "bad_steps" / f"step-{step:08d}").glob("*.json"))
        assert kept == ["process-0.json", "process-1.json"]
    last = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert all(tensor.isfinite().all() for tensor in last.tensors.values())
    # Until the first of them the run was that of one process.
    tiny_run(tmp_path / "one")
    logged = [line["loss"] for line in losses(tmp_path / "run")][: STEPS // 2]
    assert logged == pytest.approx([line["loss"] for line in losses(tmp_path / "one")][: STEPS // 2], rel=1e-5)


@pytest.mark.processes
def test_eight_kills_at_random_moments_end_bit_identical(tmp_path):
    result = campaign(8, 0, tmp_path)
    assert result["failed"] == []
    assert (result["identical"], result["kills"], result["left over"]) == (8, 8, 0)
    assert result["inside a save"] >= 2


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_kills_at_random_moments_end_bit_identical(tmp_path):
    result = campaign(100, 1, tmp_path)
    assert result["failed"] == []
    assert (result["identical"], result["kills"], result["left over"]) == (100, 100, 0)
    assert result["inside a save"] >= 25


class Poisoned(Objective):
    """A loss that is not a number in steps of our choice."""

    def __init__(self, bad: set[int]):
        super().__init__()
        self.inner, self.bad, self.step, self.moved = objective(), bad, 0, 0
        self.backbone, self.readout = self.inner.backbone, "mean"

    def forward(self, batch, progress):
        loss, metrics = self.inner(batch, progress)
        self.step += 1
        return (loss * float("nan") if self.step in self.bad else loss), metrics

    def after_step(self, progress):
        self.moved += 1


def test_a_step_that_is_not_finite_moves_nothing(tmp_path):
    config = TrainConfig(out=tmp_path / "run", **(DEFAULTS | {"epochs": 1.0, "save_every": 1, "keep": 9}))
    poisoned = Poisoned({2, 4})
    pretrain(poisoned, source(), CropFlip(32), config, start(threads=1))
    saved = [checkpoint.latest(tmp_path / "run" / "checkpoints")]
    folders = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    saved = [load_file(folder / "tensors.safetensors") for folder in folders]
    assert len(saved) == 4
    for before, after, moved in ((0, 1, False), (1, 2, True), (2, 3, False)):
        assert moved != all(torch.equal(saved[before][name], saved[after][name]) for name in saved[before])
    assert poisoned.moved == 2


class Spoiled(Objective):
    """In its third step a number of the loss, of a gradient, or of what it sees is another."""

    def __init__(self, what: str, value: float):
        super().__init__()
        self.inner, self.what, self.value, self.step = objective(), what, value, 0
        self.backbone, self.readout = self.inner.backbone, "mean"

    def forward(self, batch, progress):
        self.step += 1
        if self.step != 3:
            return self.inner(batch, progress)
        if self.what == "pixel":
            batch.views[0][0, 0, 0, 0] = self.value
        loss, metrics = self.inner(batch, progress)
        if self.what == "loss":
            loss = loss * self.value
        if self.what == "gradient":
            self.backbone.norm.weight.register_hook(lambda gradient: gradient * self.value)
        return loss, metrics


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("what", ["loss", "gradient", "pixel"])
def test_nothing_that_is_not_finite_reaches_weights_moments_or_disk(tmp_path, what, value):
    config = TrainConfig(out=tmp_path / "run", **(DEFAULTS | {"epochs": 1.0, "save_every": 1, "keep": 9}))
    # A hook stays, so that the fourth step is as bad; three in a row would stop the run.
    pretrain(Spoiled(what, value), source(), CropFlip(32), config, start(threads=1))
    before, after = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "tensors.safetensors") for step in (2, 3)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("exp_avg" in name for name in before)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert (tmp_path / "run" / "bad_steps" / "step-00000002").exists()


def exploding(at: int, factor: float) -> MPP:
    """Whose gradients are so many times themselves in one step."""
    run = objective()
    for parameter in run.parameters():
        steps = count()
        parameter.register_hook(lambda g, steps=steps: g * factor if next(steps) == at else g)
    return run


@pytest.mark.parametrize("skip", [0.0, 20.0])
def test_a_step_of_exploding_gradients_is_told_and_left_out_if_that_is_asked_for(tmp_path, capsys, skip):
    changes = {"optimizer": "sgd", "clip": 0.0, "lr": 0.1, "skip_spikes": skip}
    for name, factor in (("clean", 1.0), ("spiked", 1e6)):
        config = TrainConfig(out=tmp_path / name, **(DEFAULTS | changes))
        pretrain(exploding(12, factor), source(), CropFlip(32), config, start(threads=1))
        told = capsys.readouterr().out
        assert told.count("warning: step 13: the gradient norm is") == (name == "spiked")
        assert ("it is skipped" in told) == (name == "spiked" and skip > 0)
    clean, spiked = (losses(tmp_path / name)[-1]["loss"] for name in ("clean", "spiked"))
    assert (spiked == pytest.approx(clean, rel=0.02)) == (skip > 0)


@pytest.mark.parametrize("images", [1, 2, 3, 7, 8, 9, 17])
def test_a_run_of_a_few_images_takes_its_steps(tmp_path, images):
    config = TrainConfig(out=tmp_path / "run", **(DEFAULTS | {"epochs": 3.0}))
    pretrain(objective(), source(images), CropFlip(32), config, start(threads=1))
    assert [line["step"] for line in losses(tmp_path / "run")] == list(range(1, -(-3 * images // 8) + 1))


def test_what_entered_a_step_that_is_not_finite_is_kept_with_its_numbers(tmp_path):
    config = TrainConfig(out=tmp_path / "run", **(DEFAULTS | {"epochs": 1.0, "accumulation": 2}))
    pretrain(Poisoned({3}), source(), CropFlip(32), config, start(threads=1))  # the first part of the second step
    (folder,) = (tmp_path / "run" / "bad_steps").iterdir()
    facts = json.loads((folder / "process-0.json").read_text())
    assert (folder.name, facts["step"], facts["loss"], facts["not_finite"]["pixels"]) == ("step-00000001", 1, "NaN", [])
    assert facts["not_finite"]["gradients"]
    entered = load_file(folder / "process-0.safetensors")
    row = EpochSampler(source(), batch_size=8, accumulation=2, rank=0, processes=1, seed=0)
    second = [part.samples.ids.tolist() for part in load(row, first_step=1, steps=2, workers=0, timeout=0, pin=False)]
    assert [entered["0.ids"].tolist(), entered["1.ids"].tolist()] == second
    assert entered["1.views.000"].shape == (4, 3, 32, 32)


class Collapsing(Poisoned):
    """Its features have no spread from the third step on."""

    def forward(self, batch, progress):
        loss, metrics = super().forward(batch, progress)
        return loss, metrics | {"feature_std": torch.tensor(0.8 if self.step < 3 else 0.001)}


def test_fourteen_low_steps_are_no_collapse_yet_and_a_checkpoint_holds_the_count(tmp_path, capsys):
    config = TrainConfig(out=tmp_path / "run", **(DEFAULTS | {"epochs": 4.0}))
    pretrain(Collapsing(set()), source(), CropFlip(32), config, start(threads=1))
    assert "collapsed" not in capsys.readouterr().out  # 14 of the 16 steps
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints").state["progress"]["watch"]
    assert saved["below"]["feature_std"] == 14
    assert saved["first"]["feature_std"] == pytest.approx(0.8)


@pytest.mark.parametrize("stop", [False, True])
def test_a_collapsed_run_warns_once_or_stops_if_asked(tmp_path, capsys, stop):
    config = TrainConfig(out=tmp_path / "run", **(DEFAULTS | {"epochs": 8.0, "stop_on_collapse": stop}))
    if stop:
        with pytest.raises(Diverged, match=r"step 21: The run has collapsed.*feature_std 0\.001"):
            pretrain(Collapsing(set()), source(), CropFlip(32), config, start(threads=1))
    else:
        pretrain(Collapsing(set()), source(), CropFlip(32), config, start(threads=1))
        assert capsys.readouterr().out.count("warning: step 21: The run has collapsed") == 1


def test_three_in_a_row_stop_the_run_with_the_step(tmp_path):
    config = TrainConfig(out=tmp_path / "run", **DEFAULTS)
    with pytest.raises(Diverged, match="3 steps in a row, up to step 7"):
        pretrain(Poisoned({6, 7, 8}), source(), CropFlip(32), config, start(threads=1))


def test_going_on_with_other_threads_is_told_and_rounds_differently_only(reference, tmp_path, capsys):
    tiny_run(tmp_path / "run", save_every=8)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}")
    capsys.readouterr()
    tiny_run(tmp_path / "run", save_every=8, threads=2, resume=True)
    assert capsys.readouterr().out.count("warning: threads was 1, is now 2") == 1
    for ours, theirs in zip(losses(tmp_path / "run"), losses(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_going_on_with_another_configuration_is_refused_key_by_key(tmp_path):
    tiny_run(tmp_path / "run", epochs=1.0)
    with pytest.raises(ValueError, match=r"lr was 0\.001, is now 0\.002; seed was 0, is now 5"):
        tiny_run(tmp_path / "run", epochs=1.0, resume=True, lr=2e-3, seed=5)
    tiny_run(tmp_path / "run", epochs=1.0, resume=True, workers=1, log_every=7)


def test_a_saved_option_that_is_gone_is_told_and_refused(tmp_path):
    """What it decided nobody knows any more."""
    out = tmp_path / "run"
    tiny_run(out, epochs=2.0)
    found = checkpoint.latest(out / "checkpoints")
    state = found.state | {"config": found.state["config"] | {"gone": 0.3}}
    checkpoint.save(out / "checkpoints", found.step, found.tensors, state)
    with pytest.raises(ValueError, match=r"--resume would continue a different run: gone was 0\.3, .*no such option"):
        tiny_run(out, epochs=2.0, resume=True)


def go(out: Path, data: str, **changes) -> None:
    config = TrainConfig(out=out, **(DEFAULTS | {"epochs": 1.0} | changes))
    pretrain(objective(), open_source(data, image_size=32), CropFlip(32), config, start(threads=1))


def test_resuming_with_other_images_is_refused_unless_allowed_or_only_moved(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    folder, moved, out = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    folder.mkdir()
    for number, pixels in enumerate(source(20).pixels):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number}.png")
    go(out, f"folder:{folder}")
    folder.rename(moved)
    go(out, f"folder:{moved}", resume=True)
    (moved / "0.png").rename(moved / "first.png")
    with pytest.raises(DataError, match=r"began with 20 images, .*there has 20, with other content.*--allow_data_"):
        go(out, f"folder:{moved}", resume=True)
    (moved / "first.png").unlink()
    with pytest.raises(DataError, match=r"the run began with 20 images, folder:.*there has 19") as stopped:
        go(out, f"folder:{moved}", resume=True)
    assert stopped.value.code == 65
    capsys.readouterr()
    go(out, f"folder:{moved}", resume=True, allow_data_change=True)
    assert "warning: the run began with 20 images" in capsys.readouterr().out


def test_other_labels_of_the_same_images_are_other_data(tmp_path):
    go(tmp_path, "shapes:n=16", resume=True)
    with pytest.raises(DataError, match="with other labels"):
        go(tmp_path, "shapes:n=16,texture", resume=True)


def test_a_bad_setting_is_refused_before_anything_is_written_also_without_flags(tmp_path):
    with pytest.raises(ValueError, match="--lr is nan"):
        tiny_run(tmp_path / "run", lr=float("nan"))
    assert not (tmp_path / "run").exists()


def test_only_trackers_that_accelerate_knows_are_accepted(monkeypatch):
    monkeypatch.setattr("sslvit.processes.collectives.get_available_trackers", lambda: [LoggerType.TENSORBOARD, "mine"])
    check_trackers(("tensorboard",))
    with pytest.raises(ValueError, match="mine must be one of aim, clearml"):
        check_trackers(("tensorboard", "mine"))


def test_a_run_with_a_tracker_that_nobody_knows_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="--log_with nonsense"):
        tiny_run(tmp_path / "run", log_with=("nonsense",))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_between_two_lines_of_the_log_holds_the_time_of_all_its_steps(tmp_path):
    """Else a run that is stopped and goes on would cost less than it took."""
    taken = []

    class Slow(type(objective())):
        def after_step(self, progress):
            time.sleep(0.2)

    made = objective()
    made.__class__ = Slow
    config = TrainConfig(out=tmp_path, **(DEFAULTS | {"epochs": 1.0, "log_every": 100, "save_every": 3}))
    pretrain(made, source(), CropFlip(32), config, start(threads=1))
    for step in (3, 4):
        state, _ = checkpoint.read_state(tmp_path / "checkpoints" / f"step-{step:08d}", step)
        taken.append(state["progress"]["seconds"])
    assert taken[0] >= 3 * 0.2
    assert taken[1] >= taken[0] + 0.2


def test_evaluations_are_due_when_their_pass_is_complete():
    """Half a pass, and three quarters of one, over 100 images in batches of 10; and never."""
    assert [step for step in range(1, 31) if completes(step, 0.5 * 100 / 10)] == [5, 10, 15, 20, 25, 30]
    assert [step for step in range(1, 31) if completes(step, 0.75 * 100 / 10)] == [8, 15, 23, 30]
    assert not completes(5, 0.0)


KEEPS = """
import resource, torch
from sslvit.processes.collectives import keep_memory
torch.set_num_threads(1)
def faults():
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def pages():
    faults()
    before = faults()
    for _ in range(8):
        after = faults()
    return (after - before) // 8
print(pages())
keep_memory()
print(pages())
"""


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_tensors_are_not_paid_for_again_at_the_next_step():
    done = preloaded.run([sys.executable, "-c", KEEPS], text=True, check=True)
    without, kept = map(int, done.stdout.split())
    if without < 16_000:
        pytest.skip("64 MiB are not 16,384 pages here: huge ones")
    assert kept < 4096  # the heap may still grow once
