"""Signals stop a run after its step, saved, with exit code 75; it goes on bit for bit, or with other processes."""

import signal
import time
from pathlib import Path

import psutil
import pytest
from started import draw_images, one, ranks, said, two, until_step
from tiny_run import fingerprint, losses

from sslvit import checkpoint

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
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step_and_one_process_goes_on(images, whole, tmp_path):
    """World size 2, 1, 2: the same losses as with one process throughout."""
    out = tmp_path / "run"
    for start, port in ((two, 29551), (one, None), (two, 29552)):
        reached = losses(out)[-1]["step"] if out.exists() else 0
        process = start(images, out, *([] if port is None else [port]), *RARELY)
        until_step(out, reached + 30, process)
        parts = ranks(process) if port else [psutil.Process(process.pid)]
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


def test_a_second_signal_ends_it_at_once(images, tmp_path):
    out = tmp_path / "run"
    process = one(images, out, *RARELY, SLOW_READS="0.1")  # a step of 0.8 seconds
    until_step(out, 1, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.wait(10)
    assert time.monotonic() - began < 5
    assert process.returncode == 128 + signal.SIGTERM
    assert checkpoint.latest(out / "checkpoints") is None
