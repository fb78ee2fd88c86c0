"""Signals stop a run after its step, saved, with exit code 75; it goes on bit for bit, or with other processes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import preloaded
import psutil
import pytest
from started import draw_images, one, ranks, said, two, until_step, within
from tiny_run import DEFAULTS, STEPS, fingerprint, losses, source

from sslvit.config import TrainConfig
from sslvit.data.loader import sample_ids
from sslvit.errors import Preempted
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.mpp import MPP
from sslvit.processes import signals
from sslvit.processes.collectives import start
from sslvit.storage import checkpoint
from sslvit.train import pretrain
from sslvit.views.pretraining import CropFlip

pytestmark = pytest.mark.processes

RARELY = ("epochs=100", "save_every=10000", "resume=true")  # 400 steps


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert one(images, out, *RARELY).wait(120) == 0
    return out


def stop(images: Path, out: Path, number: signal.Signals, step: int) -> float:
    """Stops a run and lets it go on to its end; returns how long it took to stop."""
    process = one(images, out, *RARELY)
    until_step(out, step, process)
    began = time.monotonic()
    process.send_signal(number)
    process.wait(20)
    took = time.monotonic() - began
    assert process.returncode == 75, said(out)
    saved = checkpoint.latest(out / "checkpoints").step
    assert saved == losses(out)[-1]["step"] < 400  # no step is lost
    assert f"asked to stop at step {saved} of 400; saved in {out}" in said(out)
    assert one(images, out, *RARELY).wait(120) == 0
    return took


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("step", [2, 40, 111, 250])
def test_each_signal_at_any_time_loses_no_step_and_changes_nothing(images, whole, tmp_path, number, step):
    assert stop(images, tmp_path / "run", number, step) < 5
    assert fingerprint(tmp_path / "run") == fingerprint(whole)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(images, whole, tmp_path):
    """World size 2, 1, 2: the same losses as with one process throughout."""
    out = tmp_path / "run"
    for begin in (two, one, two):
        reached = losses(out)[-1]["step"] if out.exists() else 0
        process = begin(images, out, *RARELY)
        until_step(out, reached + 30, process)
        parts = ranks(process) if begin is two else [psutil.Process(process.pid)]
        parts[-1].send_signal(signal.SIGUSR1)
        assert not psutil.wait_procs(parts, timeout=20)[1]
        process.wait(40)
        saved = checkpoint.latest(out / "checkpoints").step
        assert saved == losses(out)[-1]["step"] > reached
        assert f"asked to stop at step {saved} of 400" in said(out)
    lines, reference = losses(out), losses(whole)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    for mine, theirs in zip(lines[:20], reference, strict=False):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for mine, theirs in zip(lines, reference, strict=False):
        assert mine["lr"] == theirs["lr"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)  # rounding grows with the steps


@within(4)  # python's own end takes two of them on a busy machine
def test_the_same_signal_a_second_later_ends_it_at_once(images, tmp_path, limit):
    out = tmp_path / "run"
    process = one(images, out, *RARELY, SLOW_STEPS="6")
    until_step(out, 1, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.wait(40)
    assert time.monotonic() - began < limit
    assert process.returncode == 128 + signal.SIGTERM
    assert checkpoint.latest(out / "checkpoints") is None


def test_signals_that_launchers_repeat_count_once_and_none_ends_a_save(images, tmp_path):
    """Ctrl-C reaches the run and its launcher, whose death sends SIGTERM; torchrun repeats what the scheduler sent."""
    out = tmp_path / "run"
    process = one(images, out, *RARELY, SLOW_SAVES="2.5")
    until_step(out, 5, process)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.2)
    time.sleep(1.2)  # it is saving by now
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 75, said(out)
    assert checkpoint.latest(out / "checkpoints").step == losses(out)[-1]["step"]


def test_a_signal_to_all_processes_of_a_run_with_workers_saves_and_goes_on(images, tmp_path):
    """As `scancel` and `kill 0` send it."""
    out = tmp_path / "run"
    process = one(images, out, *RARELY, "workers=2")
    until_step(out, 5, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2
    for each in (*family, psutil.Process(process.pid)):
        each.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75, said(out)
    assert checkpoint.latest(out / "checkpoints").step == losses(out)[-1]["step"]
    assert not psutil.wait_procs(family, timeout=5)[1]


def hold_up(held: Path, out: Path, process: subprocess.Popen) -> None:
    """Returns when the run waits for images."""
    until_step(out, 5, process)
    os.mkfifo(held)
    while time.time() - (out / "metrics.jsonl").stat().st_mtime < 2:
        assert process.poll() is None, said(out)
        time.sleep(0.1)


def until_saved(out: Path) -> float:
    began = time.monotonic()
    while "asked to stop at step" not in said(out):
        assert time.monotonic() - began < 60, said(out)
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.parametrize(
    "changes",
    [("workers=0",), ("workers=2",), pytest.param(("workers=0", "accumulation=2"), marks=pytest.mark.slow)],
    ids="".join,
)
@within(5)
def test_a_signal_while_images_are_awaited_saves_the_last_step_within_five_seconds(images, tmp_path, changes, limit):
    out, held = tmp_path / "run", tmp_path / "held"
    words = [*changes, "epochs=30", "save_every=10000", "resume=true"]
    process = one(images, out, *words, HELD=str(held))
    hold_up(held, out, process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert until_saved(out) < limit
    assert process.wait(60) == 75, said(out)
    assert not psutil.wait_procs(family, timeout=20)[1]
    saved = checkpoint.latest(out / "checkpoints").step
    assert 5 <= saved == losses(out)[-1]["step"] < 120
    assert f"asked to stop at step {saved} of 120; saved in {out}" in said(out)
    assert one(images, out, *words).wait(60) == 0
    assert one(images, tmp_path / "whole", *words).wait(60) == 0
    assert fingerprint(out) == fingerprint(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [("accumulation=2",), ("shard=true", "workers=1")])
@pytest.mark.parametrize("asked", [[0, 1], [1]], ids=["both", "the one that waits"])
def test_a_signal_to_two_processes_of_which_one_awaits_images_saves_the_last_step(images, tmp_path, changes, asked):
    out, held = tmp_path / "run", tmp_path / "held"
    process = two(images, out, *RARELY, *changes, HELD=str(held), HELD_RANK="1")
    hold_up(held, out, process)
    parts = ranks(process)
    for rank in asked:
        parts[rank].send_signal(signal.SIGTERM)
    assert until_saved(out) < 5
    assert not psutil.wait_procs(parts, timeout=60)[1]
    process.wait(60)
    assert "exitcode  : 75" in said(out)
    saved = checkpoint.latest(out / "checkpoints").step
    assert 5 <= saved == losses(out)[-1]["step"] < 400
    assert f"asked to stop at step {saved} of 400; saved in {out}" in said(out)


def test_a_signal_while_the_first_images_are_awaited_says_that_nothing_was_done(images, tmp_path):
    out = tmp_path / "run"
    process = one(images, out, *RARELY, "workers=1", SLOW_IMAGE=str(int(sample_ids(0, 32, 0, 1)[0])), SLOW_SECONDS="60")
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert f"asked to stop before the first of 400 steps: there was nothing to save in {out}" in said(out)
    assert checkpoint.latest(out / "checkpoints") is None


@pytest.mark.slow
def test_a_signal_to_both_processes_waits_for_a_slow_save(images, tmp_path):
    out = tmp_path / "run"
    process = two(images, out, *RARELY, "shard=true", SLOW_SAVES="3")
    until_step(out, 5, process)
    parts = ranks(process)
    for part in parts:
        part.send_signal(signal.SIGUSR1)
    assert not psutil.wait_procs(parts, timeout=25)[1]
    process.wait(40)
    assert checkpoint.latest(out / "checkpoints").step == losses(out)[-1]["step"]


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process_that_trains_on(images, tmp_path):
    out = tmp_path / "run"
    process = two(images, out, *RARELY)
    until_step(out, 5, process)
    parts = ranks(process)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(parts, timeout=20)[1]
    assert checkpoint.latest(out / "checkpoints").step == losses(out)[-1]["step"] < 400


def test_a_stop_that_cannot_save_says_so(images, tmp_path):
    out = tmp_path / "run"
    process = one(images, out, *RARELY, FAIL_SAVES="1")
    until_step(out, 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 73, said(out)
    step = losses(out)[-1]["step"]
    assert f"error: the checkpoint of step {step} could not be written to {out}" in said(out)
    assert "No checkpoint had been saved yet" in said(out)


class Evaluates:
    """Counts how often, and may ask to stop in the middle."""

    def __init__(self, *, interrupt: bool = False) -> None:
        self.calls, self.interrupt = 0, interrupt

    def __call__(self, backbone) -> dict[str, float]:
        self.calls += 1
        if self.interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return {"eval/mean/sum": sum(p.double().sum().item() for p in backbone.parameters())}


def test_a_due_evaluation_does_not_delay_a_stop_and_comes_when_the_run_resumes(tmp_path):
    class Asking(MPP):
        def forward(self, batch, progress):
            if interrupt and round(progress * STEPS) == 3:  # the fourth step ends the first pass
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().forward(batch, progress)

    def run(out: Path, evaluate: Evaluates) -> int:
        config = TrainConfig(out=out, **(DEFAULTS | {"evaluate_every": 1.0, "resume": True}))
        made = Asking(ViT(ViTConfig(image_size=32, patch_size=8, width=64, depth=2, heads=2)))
        asked = (
            "asked to stop at step 4 of 16" if interrupt else "asked to stop; the same command with --resume continues"
        )
        stops = pytest.raises(Preempted, match=asked) if interrupt or evaluate.interrupt else nullcontext()
        with stops:
            pretrain(made, source(), CropFlip(32), config, start(threads=1), evaluate)
        return evaluate.calls

    interrupt = False
    run(tmp_path / "whole", Evaluates())
    run(tmp_path / "run", Evaluates(interrupt=True))  # a stop before the first step waits for none either
    interrupt = True
    assert run(tmp_path / "run", Evaluates()) == 1  # the one before the first step
    interrupt = False
    run(tmp_path / "run", Evaluates(interrupt=True))  # nor where it is made up for
    run(tmp_path / "run", Evaluates())
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_kill_between_a_delayed_evaluation_and_the_next_checkpoint_loses_nothing(
    tmp_path,
):
    class Killed(BaseException):
        pass

    class Ending(MPP):
        def forward(self, batch, progress):
            if ends is signal.SIGUSR1 and round(progress * STEPS) == 3:  # the fourth step ends the first pass
                os.kill(os.getpid(), ends)
            if ends is Killed and round(progress * STEPS) == 4:
                raise Killed
            return super().forward(batch, progress)

    def run(out: Path) -> None:
        config = TrainConfig(out=out, **(DEFAULTS | {"evaluate_every": 1.0, "resume": True}))
        made = Ending(ViT(ViTConfig(image_size=32, patch_size=8, width=64, depth=2, heads=2)))
        with pytest.raises((Preempted, Killed)) if ends else nullcontext():
            pretrain(made, source(), CropFlip(32), config, start(threads=1), Evaluates())

    for ends in (None, signal.SIGUSR1, Killed, None):
        run(tmp_path / ("run" if ends or (tmp_path / "whole").exists() else "whole"))
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_signal_between_runs_ends_the_process_at_once_with_75(tmp_path):
    """A choice of rates, an evaluation, a report: what is worth keeping is on the disk."""
    program = (
        "import os, signal, time\n"
        "from sslvit.processes import signals\n"
        "from sslvit.cli import run_cli\n"
        "def main():\n"
        "    signals.listen()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "run_cli(main)"
    )
    done = preloaded.run([sys.executable, "-c", program], text=True, timeout=50)
    assert done.returncode == 75
    assert done.stderr.startswith("stopped: asked to stop; the same command with --resume continues")


def test_a_stop_that_came_before_the_next_run_begins_to_listen_is_not_forgotten():
    with signals.command(), signals.listening():
        with signals.stepping():
            signal.raise_signal(signal.SIGTERM)
        with signals.listening(), signals.stepping():  # another run of the same command
            assert signals.stop_requested()
    assert not signals.stop_requested()
