"""One run in one folder; nothing of anybody else's is touched; the log of metrics has every step once."""

import json
import math
import os
import random
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from crashes import forked, killed_at, list_changes, tapped
from started import within

from sslvit.errors import CANNOT_WRITE
from sslvit.runs.folder import FolderRefused, RunLocked, lock, prepare_folder, still_held
from sslvit.runs.log import Log
from sslvit.storage import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@contextmanager
def holder(folder: Path, worker: bool = False) -> Iterator[int]:
    """A process that holds the lock until it is killed, if worker is set with a forked process of its own."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock(folder):
            if worker and os.fork() == 0:
                time.sleep(2)
                os._exit(0)
            os.write(tell, b"1")
            time.sleep(60)
        os._exit(0)
    try:
        os.read(ready, 1)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(tell)


def finished_run(folder: Path, step: int | None = 300) -> Path:
    """A folder as a run leaves it."""
    with prepare_folder(folder):
        (folder / "config.json").write_text("{}")
        if step is not None:
            checkpoint.save(folder / "checkpoints", step, {"weight": torch.ones(1)}, {})
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The lock


@pytest.mark.processes
@within(3)
def test_a_second_run_in_a_folder_is_refused_at_once_and_names_the_first(tmp_path, limit):
    with holder(tmp_path) as pid:
        for _ in range(10):
            start = time.monotonic()
            with pytest.raises(RunLocked) as refused, prepare_folder(tmp_path, resume=True):
                pass
            assert time.monotonic() - start < limit
            assert f"process {pid} on {socket.gethostname()}" in str(refused.value)
            assert refused.value.code == CANNOT_WRITE


@pytest.mark.processes
def test_of_two_runs_that_start_at_the_same_moment_one_goes_on(tmp_path):
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        start, go = os.pipe()
        children = []
        for _ in range(2):
            children.append(os.fork())
            if children[-1] == 0:
                os.read(start, 1)
                try:
                    with prepare_folder(folder, resume=attempt % 2 == 0):
                        time.sleep(0.3)
                except RunLocked:
                    os._exit(7)
                except BaseException:
                    os._exit(99)
                os._exit(0)
        os.write(go, b"12")
        assert sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children) == [0, 7]
        os.close(start)
        os.close(go)


@pytest.mark.processes
def test_the_lock_of_a_killed_process_is_free_at_once_even_while_its_worker_lives(tmp_path):
    for _ in range(3):
        with holder(tmp_path, worker=True), pytest.raises(RunLocked), lock(tmp_path):
            pass
        with lock(tmp_path):
            pass


def test_the_lock_file_names_pid_host_start_and_run(tmp_path):
    with lock(tmp_path) as run:
        content = json.loads((tmp_path / "run.lock").read_text())
    assert content["pid"] == os.getpid()
    assert content["host"] == socket.gethostname()
    assert content["run"] == run
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", content["start"])


def test_a_folder_is_locked_whatever_its_lock_file_contained_until_it_is_gone(tmp_path):
    (tmp_path / "run.lock").write_text('{"sslvit": "older"}' + "\n" * 5000)
    with prepare_folder(tmp_path):
        assert still_held(tmp_path)
        (tmp_path / "run.lock").rename(tmp_path / "moved")
        assert not still_held(tmp_path)
        (tmp_path / "run.lock").write_text('{"sslvit": "another run", "run": "0badcafe"}')
        assert not still_held(tmp_path)


def test_the_lock_is_held_until_the_end_and_no_longer(tmp_path):
    with prepare_folder(tmp_path / "run"), pytest.raises(RunLocked), lock(tmp_path / "run"):
        pass
    with pytest.raises(KeyError), prepare_folder(tmp_path / "run"):
        raise KeyError("an error of the run is passed on as it is")
    with lock(tmp_path / "run"):
        pass


def test_an_os_error_of_the_run_itself_is_not_taken_for_one_of_the_folder(tmp_path):
    with pytest.raises(ConnectionError), prepare_folder(tmp_path / "run"):
        raise ConnectionError("tracker")


# The door


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_missing_or_empty_folder_is_entered_with_any_option(tmp_path, options):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "deep" / "er" / "run"):
        with prepare_folder(folder, **options) as entered:
            assert entered == folder
            assert names(folder) == ["run.lock"]


def test_a_start_that_failed_before_it_wrote_anything_does_not_block_the_next(tmp_path):
    for _ in range(2):
        with prepare_folder(tmp_path / "run"):
            pass


@pytest.mark.parametrize(("step", "newest"), [(300, "step 300"), (None, "none")])
def test_a_folder_with_a_run_is_refused_with_what_is_in_it_and_what_can_be_done(tmp_path, step, newest):
    folder = finished_run(tmp_path / "mpp", step)
    with pytest.raises(FolderRefused) as refused, prepare_folder(folder):
        pass
    assert str(refused.value) == (
        f"{folder} already holds a run (newest checkpoint: {newest}): continue it with --resume, "
        "replace it with --overwrite, or name another folder with --out"
    )
    assert refused.value.code == CANNOT_WRITE


def test_resuming_leaves_all_as_it_is_but_what_a_killed_process_left(tmp_path):
    folder = finished_run(tmp_path / "run")
    (folder / ".tmp-metrics.jsonl-12345678").mkdir()
    with prepare_folder(folder, resume=True):
        assert names(folder) == ["checkpoints", "config.json", "run.lock"]
        assert checkpoint.latest(folder / "checkpoints").step == 300


def test_a_run_that_was_copied_without_its_lock_file_is_known_by_its_checkpoints(tmp_path):
    folder = finished_run(tmp_path / "run")
    (folder / "run.lock").unlink()
    with prepare_folder(folder, resume=True):
        assert checkpoint.latest(folder / "checkpoints").step == 300


def test_overwriting_deletes_the_run_and_nothing_beyond_it(tmp_path):
    folder = finished_run(tmp_path / "run")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").write_text("data")
    (folder / "model").symlink_to(tmp_path / "precious")
    (folder / "checkpoints" / "step-00000301").symlink_to(tmp_path / "precious")
    with prepare_folder(folder, overwrite=True):
        assert names(folder) == ["run.lock"]
    assert (tmp_path / "precious" / "data").read_text() == "data"


@pytest.mark.processes
def test_a_running_run_is_not_overwritten(tmp_path):
    folder = finished_run(tmp_path / "run")
    with holder(folder), pytest.raises(RunLocked), prepare_folder(folder, overwrite=True):
        pass
    assert checkpoint.latest(folder / "checkpoints").step == 300


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize(
    "foreign",
    [
        ["holiday.jpg"],
        [".git"],
        ["config.json", "model.safetensors"],
        ["run.lock", "thesis.tex"],
        ["checkpoints/last.ckpt"],
        ["metrics.jsonl"],
    ],
)
def test_a_folder_of_other_things_is_refused_whatever_is_asked_and_left_untouched(tmp_path, foreign, options):
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FolderRefused, match="holds no run: choose another --out"), prepare_folder(tmp_path, **options):
        pass
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / foreign[0]).read_text() == "{}"


def test_to_resume_and_to_overwrite_contradict_each_other(tmp_path):
    with pytest.raises(ValueError, match="choose one"), prepare_folder(tmp_path, resume=True, overwrite=True):
        pass


def test_a_file_in_the_place_of_the_folder_or_of_its_parent_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        refusal = pytest.raises(FolderRefused, match=f"^{folder} cannot be written.*choose another --out")
        with refusal, prepare_folder(folder):
            pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.processes
def test_a_folder_without_permission_to_write_is_refused_before_anything_else(request):
    with tempfile.TemporaryDirectory() as made:  # not tmp_path: nobody but its owner may pass through that one's parent
        top = Path(made)
        top.chmod(0o755)
        for name, mode in (("parent", 0o555), ("existing", 0o555), ("locked", 0o777)):
            (top / name).mkdir()
            (top / name).chmod(mode)
        (top / "locked" / "run.lock").write_text("")
        (top / "locked" / "run.lock").chmod(0o400)

        def child() -> None:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)  # root may write everywhere
            for folder in (top / "parent" / "run", top / "existing", top / "locked"):
                refusal = pytest.raises(FolderRefused, match=f"^{folder} cannot be written.*Permission denied")
                with refusal, prepare_folder(folder, resume=True):
                    pass

        assert forked(child) == 0
        assert names(top / "parent") == names(top / "existing") == []


def test_whatever_a_checkpoint_needs_of_the_disk_is_tried_at_the_door(tmp_path):
    def enter() -> None:
        with prepare_folder(tmp_path / "counted"):
            pass

    refused = set()
    for moment, name in enumerate(list_changes(enter)):
        calls = []

        def refuse(*_, calls=calls, moment=moment):
            calls.append(None)
            if len(calls) - 1 == moment:
                raise OSError(30, "Read-only file system")

        with tapped(refuse, lambda *_: None):
            try:
                with prepare_folder(tmp_path / f"{moment}"):
                    entered = True
            except FolderRefused as error:
                entered = "Read-only file system" not in str(error)
        if not entered:
            refused.add(name)
    assert refused >= {"mkdir", "open", "write", "fsync", "rename"}


@pytest.mark.processes
def test_a_kill_while_a_run_is_overwritten_or_entered_leaves_a_usable_folder(tmp_path):
    def overwrite(folder: Path) -> None:
        with prepare_folder(folder, overwrite=True):
            pass

    for moment in range(len(list_changes(partial(overwrite, finished_run(tmp_path / "counted"))))):
        folder = finished_run(tmp_path / str(moment))
        assert killed_at(partial(overwrite, folder), moment, "before") == signal.SIGKILL
        with prepare_folder(folder, resume=True):
            checkpoint.restore(folder / "checkpoints")
        overwrite(folder)
        assert names(folder) == ["run.lock"]


# metrics.jsonl


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def written(path: Path, first: int, last: int) -> Path:
    metrics = Log(path, first)
    for step in range(first + 1, last + 1):
        metrics.write(step, {"loss": 1 / step})
    metrics.close()
    return path


def test_every_line_is_an_object_with_its_step_first(tmp_path):
    metrics = Log(tmp_path / "metrics.jsonl", 0)
    metrics.write(0, {"knn": 0.25})
    metrics.write(10, {"loss": 2.5, "text": "ü\n", "flag": True, "bad": math.nan, "worse": -math.inf, "none": None})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 0, "knn": 0.25}'
    assert json.loads(lines[1], parse_constant=pytest.fail) == {
        "step": 10, "loss": 2.5, "text": "ü\n", "flag": True, "bad": None, "worse": None, "none": None,
    }  # fmt: skip
    metrics.close()


def test_after_a_restart_every_step_is_there_once_wherever_the_run_was_cut(tmp_path):
    whole = written(tmp_path / "whole", 0, 30).read_bytes()
    chance = random.Random(0)
    for cut in [0, 1, len(whole), *chance.sample(range(len(whole)), 100)]:
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        resumed = chance.randrange(lines + 1)  # a checkpoint is not newer than the log, which is synced before it
        assert steps(written(path, resumed, 30)) == list(range(1, 31))
        assert path.read_bytes() == whole


def test_a_run_from_the_start_has_a_log_from_the_start(tmp_path):
    path = written(tmp_path / "metrics.jsonl", 0, 5)
    assert steps(written(path, 0, 3)) == [1, 2, 3]


def test_lines_that_are_none_and_steps_that_come_twice_are_dropped(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1}\n\xff\xfe\n[]\n{"step": 1}\n{"step": "2"}\n{"step": 2}\n\n{"no": 3}\n{"step": 3}\n{"step": 4'
    )
    Log(path, 10).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert "7 lines" in caplog.text
    assert names(tmp_path) == ["metrics.jsonl"]


def test_steps_that_do_not_rise_are_refused(tmp_path):
    metrics = Log(tmp_path / "metrics.jsonl", 0)
    metrics.write(5, {})
    for step in (5, 4):
        with pytest.raises(ValueError, match=f"step {step} follows step 5"):
            metrics.write(step, {})
    metrics.close()


def test_a_disk_that_is_full_for_a_while_costs_no_line(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    metrics, full = Log(path, 0), False

    def refuse(name: str, args: tuple, named: dict) -> None:
        if full and name in ("pwrite", "fsync"):
            if name == "pwrite":
                path.write_bytes(path.read_bytes() + args[1][:3])  # what fitted
            raise OSError(28, "No space left on device")

    with tapped(refuse, lambda *_: None):
        for step in range(1, 10):
            full = 3 <= step < 7
            metrics.write(step, {"loss": step / 2})
            metrics.sync()
            assert steps(path) == list(range(1, 3 if full else step + 1))
    metrics.close()
    assert "No space left on device" in caplog.text


@pytest.mark.processes
def test_a_kill_while_the_log_is_opened_again_loses_no_line(tmp_path):
    whole = written(tmp_path / "whole", 0, 9).read_bytes()

    def reopen(folder: Path) -> None:
        Log(folder / "metrics.jsonl", 6).close()

    def torn(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_bytes(whole[:-3])
        return tmp_path / name

    changes = list_changes(partial(reopen, torn("counted")))
    assert "replace" in changes
    for moment in range(len(changes)):
        folder = torn(str(moment))
        assert killed_at(partial(reopen, folder), moment, "before") == signal.SIGKILL
        assert steps(written(folder / "metrics.jsonl", 6, 9)) == list(range(1, 10))
