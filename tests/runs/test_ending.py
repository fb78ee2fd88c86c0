"""How a run ended is told by its folder, whatever ended it, and asking does not disturb the run."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import preloaded
import pytest
from made_up_runs import made_up_run
from tiny_run import DEFAULTS, objective, source, tiny_run

from sslvit.config import TrainConfig
from sslvit.errors import DataError, Diverged, Preempted
from sslvit.processes.collectives import start
from sslvit.runs import ending
from sslvit.runs.ending import Status, recorded, status_of
from sslvit.runs.folder import lock, prepare_folder
from sslvit.train import pretrain
from sslvit.views.pretraining import CropFlip


class Seen:
    """A watcher that notes what it is told."""

    def __init__(self, stop_at: int = -1, error: BaseException | None = None):
        self.steps, self.ends, self.stop_at, self.error = [], [], stop_at, error

    def log(self, values, *, step):
        self.steps.append(step)
        if step == self.stop_at and self.error:
            raise self.error

    def finish(self):
        self.ends.append("finished")

    def ended(self, status):
        self.ends.append(status.state)


def run(out: Path, *watchers: Seen, **changes) -> None:
    config = TrainConfig(out=out, **(DEFAULTS | {"epochs": 1.0} | changes))
    pretrain(objective(), source(), CropFlip(32), config, start(threads=1), None, *watchers)


def by_a_process_that_is_gone(out: Path, **changes) -> None:
    owner = json.loads((out / "run.lock").read_text()) | {"pid": 2**22 + 1} | changes
    (out / "run.lock").write_text(json.dumps(owner))


def test_a_watcher_sees_each_line_of_the_log_and_the_end(tmp_path):
    seen = Seen()
    run(tmp_path / "run", seen)
    assert (seen.steps, seen.ends) == ([1, 2, 3, 4], ["finished"])
    assert status_of(tmp_path / "run") == Status("finished")


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (Preempted("asked to stop: --resume continues"), "stopped", "asked to stop: --resume continues"),
        (KeyboardInterrupt(), "stopped", "interrupted; --resume continues from the newest checkpoint"),
        (Diverged("try a smaller --lr"), "diverged", "try a smaller --lr"),
        (DataError("hf:x?token=abc cannot be read"), "failed", "hf:x?*** cannot be read"),
        (RuntimeError("two\nlines"), "failed", "RuntimeError: two lines"),
    ],
)
def test_an_early_end_is_recorded_and_gone_when_training_goes_on(tmp_path, error, state, message):
    out, seen = tmp_path / "run", Seen(stop_at=3, error=error)
    with pytest.raises(type(error)):
        run(out, seen, save_every=1)
    assert seen.ends == [state]  # and not that it finished
    assert status_of(out) == Status(state, message)
    run(out, resume=True, save_every=1)
    assert not (out / "ended.json").exists()
    assert status_of(out).state == "finished"


def test_a_refused_continuation_hides_neither_the_end_before_nor_a_finished_run(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Diverged):
        run(out, Seen(stop_at=3, error=Diverged("first")), save_every=1)
    with pytest.raises(ValueError, match="seed"):
        run(out, resume=True, save_every=1, seed=1)
    assert status_of(out) == Status("diverged", "first")
    run(out, resume=True, save_every=1)
    with pytest.raises(ValueError, match="seed"):
        run(out, resume=True, save_every=1, seed=1)
    assert status_of(out).state == "finished"


def test_a_finished_run_that_is_made_longer_and_killed_is_dead(tmp_path):
    out = tmp_path / "run"
    run(out)
    with pytest.raises(MemoryError):
        run(out, Seen(stop_at=6, error=MemoryError()), resume=True, epochs=2.0)
    (out / "ended.json").unlink()  # which a kill does not leave
    by_a_process_that_is_gone(out)
    assert status_of(out).state == "dead"
    assert "--resume continues from step 4" in status_of(out).message


@pytest.mark.processes
def test_a_run_is_running_as_long_as_a_process_holds_its_lock(tmp_path, monkeypatch):
    out = made_up_run(tmp_path / "run", state="dead")
    code = "import sys, time; from pathlib import Path; from sslvit.runs.folder import lock\n"
    code += "with lock(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    child = preloaded.Process([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"locked\n"
        monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("the lock was touched"))
        assert status_of(out) == Status("running")
        monkeypatch.setattr(ending, "LOCKS", tmp_path / "none")  # where the system shows no locks: by the process
        assert status_of(out) == Status("running")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert status_of(out).state == "dead"
    monkeypatch.undo()
    assert status_of(out).state == "dead"


def test_a_lock_of_another_file_or_of_an_earlier_process_with_this_number_does_not_count(tmp_path):
    mine, other = made_up_run(tmp_path / "mine", state="dead"), made_up_run(tmp_path / "other", state="dead")
    owner = json.loads((mine / "run.lock").read_text()) | {"pid": os.getpid(), "host": socket.gethostname()}
    with lock(other):
        (mine / "run.lock").write_text(json.dumps(owner))
        assert (status_of(mine).state, status_of(other).state) == ("dead", "running")


def test_a_run_on_another_machine_is_judged_by_the_age_of_its_log(tmp_path):
    out = made_up_run(tmp_path / "run", state="dead")  # its lock names another host
    assert status_of(out).state == "running"
    for name in ("metrics.jsonl", "run.lock"):
        os.utime(out / name, (time.time() - ending.SILENT - 60,) * 2)
    assert status_of(out).state == "dead"


def test_a_live_process_whose_lock_the_system_does_not_list_is_running_while_it_logs(tmp_path, monkeypatch):
    """As on file systems without locks: here all are taken and none is listed."""
    out = made_up_run(tmp_path / "run", state="dead")
    monkeypatch.setattr(ending, "held_locks", set)
    with lock(out):
        assert status_of(out) == Status("running")
        for name in ("metrics.jsonl", "run.lock"):
            os.utime(out / name, (time.time() - ending.SILENT - 60,) * 2)
        assert status_of(out).state == "dead"


def test_a_number_of_a_process_of_another_container_says_nothing_here(tmp_path):
    out = made_up_run(tmp_path / "run", state="dead")
    with lock(out):
        pass
    by_a_process_that_is_gone(out)
    assert status_of(out).state == "dead"
    by_a_process_that_is_gone(out, pids="pid:[1]")
    assert status_of(out) == Status("running")  # its log grew just now


def test_a_run_of_an_earlier_version_that_has_its_model_has_finished():
    golden = Path(__file__).parent / "golden" / "recipes"
    assert {status_of(folder).state for folder in golden.iterdir()} == {"finished"}


def test_a_damaged_record_of_the_end_is_ignored(tmp_path):
    out = tmp_path / "run"
    tiny_run(out, epochs=1.0)
    shutil.rmtree(out / "model")
    (out / "ended.json").write_text('{"seal": "xxh3_128:0", "state": "stopped"}')
    by_a_process_that_is_gone(out)
    assert status_of(out).state == "dead"


def test_a_full_disk_hides_no_error(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ending.sealed, "write", full)
    with pytest.raises(Diverged, match="the reason"), recorded(prepare_folder(tmp_path / "run")):
        raise Diverged("the reason")
