"""The end of a run: whatever is killed, deleted or damaged there, what is missing is written, and nothing is announced
that was not."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import preloaded
import pytest
import torch
from crashes import forked, tapped
from recipes_run import RECIPES, TINY, run
from tiny_run import DEFAULTS, fingerprint, losses, objective, source, tiny_run

from sslvit.config import TrainConfig
from sslvit.errors import CANNOT_WRITE, CannotWrite
from sslvit.processes.collectives import start
from sslvit.reports.run import write_report
from sslvit.runs.log import Log
from sslvit.storage import checkpoint
from sslvit.train import pretrain
from sslvit.views.pretraining import CropFlip

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
OF_TIME = ("seconds", "images_per_second", "peak_memory_bytes")
OUTCOME = ("cost.json", "model", "pictures", "report.html", "report.md")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run("mpp", f"{TINY} --out {out}")
    return out


def at_its_last_checkpoint(finished: Path, out: Path) -> Path:
    """As a kill right after the last checkpoint leaves a run."""
    shutil.copytree(finished, out)
    for name in OUTCOME:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    return out


def resume(out: Path) -> None:
    run("mpp", f"{TINY} --out {out} --resume")


def check_as_unkilled(out: Path, finished: Path) -> None:
    mine, theirs = (json.loads((folder / "cost.json").read_text()) for folder in (out, finished))
    assert {k: v for k, v in mine.items() if k not in OF_TIME} == {k: v for k, v in theirs.items() if k not in OF_TIME}
    assert mine["seconds"] == theirs["seconds"]  # of the training, which was not done again
    assert mine["peak_memory_bytes"] > 0
    for name in ("model/model.safetensors", "model/config.json", "data.txt", "first_batch.png"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    pictures = sorted(path.name for path in (finished / "pictures").iterdir())
    assert sorted(path.name for path in (out / "pictures").iterdir()) == pictures
    assert losses(out) == losses(finished)
    for name in ("report.md", "report.html", "model/README.md"):
        assert (out / name).exists(), name
    tables = [[line for line in (f / "report.md").read_text().splitlines() if " of " in line] for f in (out, finished)]
    assert tables[0] == tables[1]
    assert not [path for path in out.rglob("*") if path.name.startswith((".tmp-", ".del-"))]


def renames(work: Callable[[], None]) -> int:
    """How many files and folders appear, in a child."""
    reader, writer = os.pipe()

    def child() -> None:
        seen = []
        with tapped(lambda name, *_: seen.append(name), lambda *_: None):
            work()
        os.write(writer, str(sum(name in ("rename", "replace") for name in seen)).encode())

    assert forked(child) == 0
    os.close(writer)
    with os.fdopen(reader) as pipe:
        return int(pipe.read())


def killed_before_rename(work: Callable[[], None], number: int) -> int:
    def child() -> None:
        seen = -1

        def before(name: str, args: tuple, named: dict) -> None:
            nonlocal seen
            seen += name in ("rename", "replace")
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

        with tapped(before, lambda *_: None):
            work()

    return forked(child)


@pytest.mark.parametrize("missing", [*OUTCOME, "config.json", "environment.json"])
def test_what_an_ended_run_lacks_is_written_when_it_is_resumed(finished, tmp_path, missing, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out / missing) if (out / missing).is_dir() else (out / missing).unlink()
    resume(out)
    check_as_unkilled(out, finished)
    assert f"The model is in {out / 'model'}, a report in {out / 'report.html'}" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", ["cost.json", "config.json", "environment.json"])
def test_what_is_damaged_is_written_anew(finished, tmp_path, damaged):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / damaged).write_bytes(b'{"images": 1\xff')
    resume(out)
    check_as_unkilled(out, finished)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_before_any_write_after_the_last_checkpoint_loses_nothing(finished, tmp_path):
    count = renames(partial(resume, at_its_last_checkpoint(finished, tmp_path / "counted")))
    check_as_unkilled(tmp_path / "counted", finished)
    assert count >= 2 * len(OUTCOME)
    for number in range(count):
        out = at_its_last_checkpoint(finished, tmp_path / f"{number}")
        assert killed_before_rename(partial(resume, out), number) == signal.SIGKILL
        assert forked(partial(resume, out)) == 0
        check_as_unkilled(out, finished)
        shutil.rmtree(out)


@pytest.mark.processes
def test_a_kill_before_each_outcome_of_a_run_loses_nothing(finished, tmp_path):
    """The moments of the exhaustive test above at which the largest pieces were missing."""
    for number in (3, 4, 5):
        out = at_its_last_checkpoint(finished, tmp_path / f"{number}")
        assert killed_before_rename(partial(resume, out), number) == signal.SIGKILL
        assert forked(partial(resume, out)) == 0
        check_as_unkilled(out, finished)


def test_a_report_that_cannot_be_written_is_not_announced_and_is_written_later(finished, tmp_path, capsys):
    out = at_its_last_checkpoint(finished, tmp_path / "run")
    (out / "pictures").write_text("a file is in the way")
    with pytest.raises(SystemExit) as ended:
        resume(out)
    assert ended.value.code == CANNOT_WRITE  # as with a link: nobody but the user can say what it is
    (out / "pictures").unlink()

    def full(name: str, args: tuple, named: dict) -> None:
        if name == "open" and Path(args[0]).name.startswith("report"):
            raise OSError(28, "No space left on device")

    with tapped(full, lambda *_: None):
        resume(out)
    printed = capsys.readouterr().out
    assert "and no report was written (No space left on device): the same command with --resume writes it" in printed
    assert "a report in" not in printed
    resume(out)
    check_as_unkilled(out, finished)


# A folder that goes away


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_run_whose_folder_goes_away_while_it_trains_ends_with_its_code(tmp_path, how):
    out, calls = tmp_path / "run", []

    def evaluate(_: torch.nn.Module) -> dict[str, float]:
        calls.append(None)
        if len(calls) == 2:  # after the first pass, of four steps
            out.rename(tmp_path / "away")
            if how == "deleted":
                shutil.rmtree(tmp_path / "away")
            if how == "replaced":
                tiny_run(out, epochs=1.0)
        return {"eval/mean/knn": 0.5}

    config = TrainConfig(out=out, **(DEFAULTS | {"evaluate_every": 1.0, "save_every": 2}))
    with pytest.raises(CannotWrite, match=rf"checkpoint of step 8 could not be written to {out}, after 3"):
        pretrain(objective(), source(), CropFlip(32), config, start(threads=1), evaluate)
    if how == "replaced":
        assert checkpoint.latest(out / "checkpoints").step == 4  # of the other run, in which nobody meddles
    else:
        assert not out.exists()


def test_a_folder_that_goes_away_after_the_last_checkpoint_is_told_with_its_code(tmp_path, monkeypatch):
    out = tmp_path / "run"

    real = Log.close

    def close(self: Log) -> None:
        real(self)
        shutil.rmtree(out)

    monkeypatch.setattr(Log, "close", close)
    with pytest.raises(CannotWrite, match=f"{out} was deleted or moved while the run was writing there"):
        tiny_run(out, epochs=1.0)
    assert not out.exists()


@pytest.mark.processes
def test_a_recipe_whose_folder_was_deleted_ends_with_73_and_announces_nothing(tmp_path):
    """A real process, whose folder is deleted after its first step."""
    out = tmp_path / "run"
    program = (
        "import runpy, shutil, sys, sslvit.training.optim as optim\n"
        "real = optim.set_rates\n"
        f"def gone(*given): shutil.rmtree({str(out)!r}, ignore_errors=True); real(*given)\n"
        "optim.set_rates = gone\n"
        f"sys.argv = ['mpp.py', *{(TINY + ' --out ' + str(out)).split()!r}]\n"
        f"runpy.run_path({str(RECIPES / 'mpp.py')!r}, run_name='__main__')\n"
    )
    done = preloaded.run([sys.executable, "-c", program], text=True)
    assert done.returncode == CANNOT_WRITE, done.stderr
    assert f"error: the checkpoint of step 4 could not be written to {out}" in done.stderr
    assert "a report in" not in done.stdout
    assert "Traceback" not in done.stderr


# Damaged lines


@pytest.mark.parametrize("seed", range(6))
def test_a_log_with_flipped_bytes_is_gone_on_with_and_told_by_file_and_line(tmp_path, seed, caplog):
    whole, out = tmp_path / "whole", tmp_path / "run"
    tiny_run(whole, epochs=2.0, keep=9)
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    lines = (out / "metrics.jsonl").read_bytes().split(b"\n")
    broken = 1 + seed % 5
    line = bytearray(lines[broken])
    line[(7 * seed) % len(line)] = (0xFF, 0)[seed % 2]
    lines[broken] = bytes(line)
    (out / "metrics.jsonl").write_bytes(b"\n".join(lines))
    tiny_run(out, epochs=2.0, resume=True)
    assert f"{out / 'metrics.jsonl'}: line {broken + 1} is damaged and left out" in caplog.text
    kept = losses(whole)
    assert losses(out) == kept[:broken] + kept[broken + 1 :]


def test_a_step_that_was_damaged_costs_its_own_line_alone(tmp_path, caplog):
    tiny_run(tmp_path / "run", epochs=1.0)
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"step": 2,', b'"step": 4,'))
    tiny_run(tmp_path / "run", epochs=1.0, resume=True)
    assert f'{file}: line 2 is damaged and left out: {{"step": 4,' in caplog.text
    assert [line["step"] for line in losses(tmp_path / "run")] == [1, 3, 4]


def test_an_ended_run_with_a_damaged_log_is_resumed_reported_and_looked_at(finished, tmp_path, caplog):
    from sslvit.weights.info import about

    out = shutil.copytree(finished, tmp_path / "run")
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "lo\xff\n')
    write_report(out)
    assert "steps       4" in about(out)
    resume(out)
    assert f"{out / 'metrics.jsonl'}: line 3 is damaged and left out" in caplog.text
    check_as_unkilled(out, finished)


def test_a_damaged_line_of_bad_images_costs_itself(tmp_path, caplog):
    from sslvit.data.source import Unreadable
    from sslvit.data.unreadable import UnreadableImages

    file = tmp_path / "bad_images.jsonl"
    UnreadableImages(file, size=1000).add([Unreadable(id, f"{id}.png", "empty file", 0) for id in (5, 6, 7)])
    for number, damage in enumerate((b'{"id": "6"}', b"\xff{", b"[6]", b"null")):
        lines = file.read_bytes().splitlines()
        lines[1] = damage
        file.write_bytes(b"\n".join(lines) + b"\n")
        again = UnreadableImages(file, size=1000)
        assert len(again) == 2
        again.add([Unreadable(10 + number, "8.png", "empty file", 0)])
        assert f"{file}: line 2 is damaged and left out" in caplog.text
        caplog.clear()
        file.write_bytes(b"".join(line + b"\n" for line in file.read_bytes().splitlines()[:3]))


def test_the_same_run_is_the_same_whatever_line_of_its_log_is_damaged(tmp_path):
    tiny_run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000016")
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"loss"', b'"lo\xffs"', 1))
    tiny_run(tmp_path / "run", resume=True)
    (tmp_path / "run" / "metrics.jsonl").write_bytes((tmp_path / "whole" / "metrics.jsonl").read_bytes())
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
