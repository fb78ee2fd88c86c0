"""Dead and hanging workers and processes are noticed in time, named, and leave nobody behind; a run goes on after."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from started import draw_images, one, pair, said, until_step, within
from stopped_worker import TIMEOUT, one_moment
from tiny_run import fingerprint, losses

from sslvit.data.loader import sample_ids
from sslvit.storage import checkpoint

pytestmark = pytest.mark.processes

EPOCHS = 32  # of four steps: none that is killed here has come to its end before that, on a loaded machine either


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


def noticed(out: Path, process: subprocess.Popen, family: list[psutil.Process]) -> float:
    """How long it takes until the run says what is wrong; after that it ends, and nobody of its family is left."""
    began = time.monotonic()
    while "error:" not in said(out):
        assert process.poll() is None, f"it ended with {process.returncode}: {said(out)}"
        assert time.monotonic() - began < 60, said(out)
        time.sleep(0.02)
    took = time.monotonic() - began
    process.wait(timeout=30)
    assert not psutil.wait_procs(family, timeout=20)[1]
    return took


def kill_a_worker(images: Path, out: Path, step: int, which: int, limit: float = 2) -> None:
    words = ["workers=2", f"epochs={EPOCHS}", "resume=true"]
    process = one(images, out, *words, SLOW_READS="0.004")
    until_step(out, step, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2
    family[which].kill()
    assert noticed(out, process, family) < limit
    assert process.returncode == 70
    (sentence,) = [line for line in said(out).splitlines() if line.startswith("error:")]
    assert sentence.startswith(f"error: a worker that reads images (pid {family[which].pid}) is gone: it crashed or")
    assert re.search(rf"Workers were at {images}/\d\d\.png, at {images}/\d\d\.png\. Fewer --workers", sentence)
    assert "--resume continues from the newest checkpoint" in sentence
    assert checkpoint.latest(out / "checkpoints").step >= step - 3
    again = one(images, out, *words)
    assert again.wait(60) == 0


@within(2)
def test_a_killed_worker_is_noticed_in_two_seconds_and_the_run_resumes_bit_for_bit(images, tmp_path, limit):
    kill_a_worker(images, tmp_path / "run", 8, 1, limit)
    whole = one(images, tmp_path / "whole", f"epochs={EPOCHS}")
    assert whole.wait(60) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_signal_during_the_save_after_a_workers_death_does_not_undo_it(images, tmp_path):
    process = one(
        images, tmp_path, "workers=2", f"epochs={EPOCHS}", "save_every=1000", SLOW_READS="0.004", SLOW_SAVES="6"
    )
    until_step(tmp_path, 3, process)
    psutil.Process(process.pid).children(recursive=True)[0].kill()
    time.sleep(3)
    assert "error:" not in said(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 70, said(tmp_path)
    assert ". The last step is saved" in said(tmp_path)
    assert checkpoint.latest(tmp_path / "checkpoints").step >= 3


@pytest.mark.slow
def test_five_workers_that_are_killed_at_any_time(images, tmp_path):
    for number, step in enumerate(np.random.default_rng(0).integers(3, 60, 5).tolist()):
        kill_a_worker(images, tmp_path / f"{number}", step, number % 2)


@within(2)  # of which a second is for what a loaded machine takes
def test_a_hanging_worker_is_noticed_within_the_timeout_and_a_second_with_its_file(images, tmp_path, limit):
    out = tmp_path / "run"
    late = int(sample_ids(0, 32, 24, 32)[0][0])  # of the fourth step: three are in the log when training begins to wait
    slow = {"SLOW_IMAGE": str(late), "SLOW_SECONDS": "60"}
    process = one(images, out, "workers=2", "timeout=4", **slow)
    log, last = out / "metrics.jsonl", time.time()
    while "error:" not in said(out):
        last = log.stat().st_mtime if log.exists() else time.time()
        time.sleep(0.02)
    assert log.read_text().count("\n") == 3
    assert time.time() - last < 4 + limit
    process.wait(30)
    assert process.returncode == 70
    assert re.search(
        rf"worker [01] \(pid \d+\) gave no images within 4 seconds and seems to hang at {images}/{late:02d}\.png",
        said(out),
    )


@pytest.mark.parametrize(
    ("moments", "limit"),
    [
        (1, 27),
        pytest.param(2, 2, marks=pytest.mark.timing),
        pytest.param(20, 2, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_a_stopped_worker_is_named_with_its_pid_within_the_timeout_and_two_seconds(images, tmp_path, moments, limit):
    """Stopped at random moments, in the middle of a message too, where it keeps its reader waiting for the rest."""
    times = [one_moment(images, tmp_path / f"{seed}", seed) for seed in range(moments)]
    assert max(times) < TIMEOUT + limit, times


@within(5)
def test_a_killed_process_is_named_by_the_other_within_five_seconds(images, tmp_path, limit):
    out = tmp_path / "run"
    lead, other = pair(images, out, "epochs=500", "save_every=5")
    until_step(out, 12, lead)
    other.kill()
    began = time.monotonic()
    assert lead.wait(60) != 0
    assert time.monotonic() - began < limit
    other.wait()
    assert f"process 1 (pid {other.pid}) is gone" in said(out)
    assert (out / "stacks" / "process-0.txt").read_text().startswith("Traceback")
    reached = checkpoint.latest(out / "checkpoints").step
    assert reached >= 10
    again = one(images, out, "epochs=500", "save_every=5", "resume=true")
    until_step(out, reached + 5, again)
    again.kill()
    again.wait()
    assert [line["step"] for line in losses(out)][: reached + 5] == list(range(1, reached + 6))


@within(3)
def test_a_process_that_hangs_ends_all_within_the_timeout_and_three_seconds(images, tmp_path, limit):
    out = tmp_path / "run"
    lead, other = pair(images, out, "epochs=500", "timeout=5")
    until_step(out, 12, lead)
    other.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert (lead.wait(60) != 0, other.wait(60)) == (True, -signal.SIGKILL)
    assert time.monotonic() - began < 5 + limit
    assert f"process 1 (pid {other.pid}) had been stopped, and was killed" in said(out)
    assert (out / "stacks" / "process-0.txt").exists()


def test_processes_that_disagree_do_not_train(images, tmp_path):
    out = tmp_path / "run"
    started = pair(images, out, ODD_RANK="1", ODD_SETTINGS=json.dumps({"lr": 0.5, "seed": 3}))
    assert 0 not in [process.wait(90) for process in started]
    assert "process 1 has other settings than process 0: start all with one command" in said(out)
    assert not (out / "metrics.jsonl").exists()


def test_a_run_whose_parent_is_killed_leaves_no_worker(images, tmp_path):
    out = tmp_path / "run"
    process = one(images, out, "workers=2", "epochs=500")
    until_step(out, 3, process)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=10)[1]
