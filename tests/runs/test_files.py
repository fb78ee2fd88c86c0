"""What a run writes is in one list: no more than that is ever deleted, and no link in its folder is written through."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from recipes_run import TINY, run
from tiny_run import DEFAULTS, objective, source, tiny_run

from sslvit.config import TrainConfig
from sslvit.data.source import Unreadable
from sslvit.data.unreadable import UnreadableImages
from sslvit.objectives.objective import Batch
from sslvit.processes.collectives import check_trackers, start
from sslvit.runs import files
from sslvit.runs.folder import FolderRefused, RunLocked, lock, prepare_folder
from sslvit.runs.log import Log
from sslvit.storage import checkpoint, durable
from sslvit.train import pretrain
from sslvit.training.bad_steps import save_bad_step
from sslvit.views.pretraining import CropFlip

SECRET = b"of the user, and of no run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with all that one can leave: pictures and report, bad images, a bad step, a rejected checkpoint."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run("mpp", f"{TINY} --out {out}")
    UnreadableImages(out / "bad_images.jsonl", size=1000).add([Unreadable(1, "a.png", "empty file", 2)])
    batch = Batch((torch.full((2, 3, 32, 32), float("nan")),), torch.arange(2))
    assert save_bad_step(out, objective(), [(torch.arange(2), batch)], step=3, progress=0.5)
    shutil.copytree(out / "checkpoints" / "step-00000004", out / "checkpoints" / "rejected-step-00000004.1")
    durable.replace_text(out / "stacks" / "process-1.txt", "where it waited")
    return out


@pytest.fixture(scope="module")
def tuned(finished, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    words = "--data shapes:n=32 --threads 1 --batch_size 16 --steps 1 --rates .1 .01"
    run("finetune", f"--model {finished} {words} --out {out}")
    return out


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


def test_all_that_runs_leave_is_in_the_list_and_nothing_there_is_misplaced(finished, tuned, tmp_path):
    assert files.foreign(finished) == files.misplaced(finished) == []
    assert files.foreign(tuned) == files.misplaced(tuned) == []
    assert {"choice/lr-0.1/run.lock", "test.json", "confusion.png", "predictions.parquet"} <= set(files_of(tuned))


def test_all_that_a_tracker_writes_beside_a_run_is_in_the_list(tmp_path):
    try:
        check_trackers(("tensorboard",))
    except ValueError:
        pytest.skip("tensorboard is not installed")
    run("mpp", f"{TINY} --out {tmp_path / 'run'} --log_with tensorboard")
    assert any((tmp_path / "run" / "sslvit").iterdir())
    assert files.foreign(tmp_path / "run") == []


# --overwrite


@pytest.mark.parametrize(
    "theirs",
    [
        "notes.txt",
        "mpp/config.json",  # another run
        "checkpoints/last.ckpt",
        "checkpoints/step-00000004/notes.txt",
        "model/head.safetensors",
        "pictures/holiday.png",
        "choice/mine/config.json",
        "config.json.old",
        "a\nb",
    ],
)
def test_overwriting_is_refused_where_anything_else_lies_and_names_it(finished, tmp_path, theirs):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / theirs).parent.mkdir(parents=True, exist_ok=True)
    (folder / theirs).write_bytes(SECRET)
    before = contents(folder)
    named = theirs if theirs.startswith(("checkpoints", "model", "pictures")) else "/".join(theirs.split("/")[:2])
    named = "mpp" if theirs.startswith("mpp") else named
    with pytest.raises(FolderRefused) as refused, prepare_folder(folder, overwrite=True):
        pass
    assert f"--overwrite: {folder} holds more than a run: {named}. Move these away" in str(refused.value)
    assert {name: data for name, data in contents(folder).items() if name != "run.lock"} == {
        name: data for name, data in before.items() if name != "run.lock"
    }


def test_overwriting_is_refused_for_empty_folders_and_links_of_others_too(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "plans").mkdir()
    (folder / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(FolderRefused, match=r"more than a run: elsewhere, plans\. Move"):
        prepare_folder(folder, overwrite=True).__enter__()


def test_overwriting_a_run_and_a_fine_tuned_one_leaves_nothing_of_them(finished, tuned, tmp_path):
    for number, made in enumerate((finished, tuned)):
        folder = shutil.copytree(made, tmp_path / str(number))
        with prepare_folder(folder, overwrite=True):
            assert files_of(folder) == ["run.lock"]


# Links


def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").write_bytes(SECRET)
    return tmp_path / "outside"


def linked(folder: Path, name: str, target: Path, how=os.symlink) -> None:
    (folder / name).unlink()
    how(target, folder / name)


def test_no_file_of_a_run_that_is_a_link_is_written_through(finished, tuned, tmp_path):
    target, looked_at = outside(tmp_path), 0
    for made in (finished, tuned):
        for name in files_of(made):
            folder = shutil.copytree(made, tmp_path / "run")
            linked(folder, name, target)
            with pytest.raises(FolderRefused, match=r"is a link|has links") as refused:
                prepare_folder(folder, resume=True).__enter__()
            assert name in str(refused.value)
            with pytest.raises(FolderRefused):
                prepare_folder(folder).__enter__()
            if name == "run.lock":  # whose lock would be another's
                with pytest.raises(FolderRefused, match=r"run\.lock is a link"):
                    prepare_folder(folder, overwrite=True).__enter__()
            else:
                with prepare_folder(folder, overwrite=True):
                    assert files_of(folder) == ["run.lock"]
            assert target.read_bytes() == SECRET
            shutil.rmtree(folder)
            looked_at += 1
    assert looked_at > 60


@pytest.mark.parametrize(
    "name", ["checkpoints", "checkpoints/step-00000004", "model", "pictures", "bad_steps", "stacks"]
)
def test_no_folder_of_a_run_that_is_a_link_is_written_into(finished, tmp_path, name):
    folder, elsewhere = shutil.copytree(finished, tmp_path / "run"), tmp_path / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    before = contents(elsewhere)
    with pytest.raises(FolderRefused, match=rf"has links.* where a run writes: {name}\. Nothing is written"):
        prepare_folder(folder, resume=True).__enter__()
    with prepare_folder(folder, overwrite=True):
        assert files_of(folder) == ["run.lock"]
    assert contents(elsewhere) == before


@pytest.mark.parametrize("name", ["run.lock", "metrics.jsonl", "bad_images.jsonl", "config.json"])
def test_a_named_pipe_is_refused_and_not_waited_for(finished, tmp_path, name):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(FolderRefused, match=name):
        prepare_folder(folder, resume=True).__enter__()


def test_a_run_folder_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    tiny_run(tmp_path / "runs", epochs=1.0)
    tiny_run(tmp_path / "runs", epochs=1.0, resume=True)
    assert json.loads((tmp_path / "disk" / "cost.json").read_text())["images"] == 32


def test_a_copy_of_a_run_by_hard_links_does_not_change_when_the_run_goes_on(finished, tmp_path):
    folder, copy = shutil.copytree(finished, tmp_path / "run"), tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=os.link)
    before = contents(copy)
    with prepare_folder(folder, resume=True):
        with lock(copy):  # each has a lock of its own
            pass
        with pytest.raises(RunLocked):
            prepare_folder(folder, resume=True).__enter__()
        metrics = Log(folder / "metrics.jsonl", 4)
        metrics.write(5, {"loss": 1.0})
        metrics.close()
        UnreadableImages(folder / "bad_images.jsonl", size=1000).add([Unreadable(7, "b.png", "empty file", 2)])
    after = contents(copy)
    assert {name for name in before if before[name] != after[name]} <= {"run.lock"}  # which was entered itself
    assert (folder / "run.lock").stat().st_nlink == 1


def test_links_that_are_put_in_the_way_while_a_run_trains_are_not_followed(tmp_path):
    target, calls = outside(tmp_path), []

    def evaluate(_: torch.nn.Module) -> dict[str, float]:
        calls.append(None)
        if len(calls) == 2:
            for name in ("cost.json", "report.md"):
                (tmp_path / "run" / name).symlink_to(target)
        return {"eval/mean/knn": 0.5}

    config = TrainConfig(out=tmp_path / "run", **DEFAULTS)
    pretrain(objective(), source(), CropFlip(32), config, start(threads=1), evaluate)
    assert target.read_bytes() == SECRET
    assert stat.S_ISREG((tmp_path / "run" / "cost.json").lstat().st_mode)
    assert files.misplaced(tmp_path / "run") == ["report.md"]


def test_what_is_appended_to_is_opened_without_following_a_link(tmp_path, caplog):
    for name in ("metrics.jsonl", "bad_images.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "new")
    with pytest.raises(OSError, match="symbolic links"):
        Log(tmp_path / "metrics.jsonl", 0)
    UnreadableImages(tmp_path / "bad_images.jsonl", size=1000).add([Unreadable(7, "b.png", "empty file", 2)])
    assert "Too many levels of symbolic links; the bad images since then wait" in caplog.text
    assert not (tmp_path / "new").exists()


def test_writing_a_file_replaces_a_link_and_leaves_what_it_points_to(tmp_path):
    target = outside(tmp_path)
    for number, how in enumerate((os.symlink, os.link)):
        how(target, tmp_path / f"{number}")
        durable.replace_text(tmp_path / f"{number}", "new")
        assert (tmp_path / f"{number}").read_text() == "new"
    assert target.read_bytes() == SECRET


# --resume of what cannot be gone on with


def test_a_model_without_checkpoints_is_not_trained_anew_and_overwritten(tmp_path):
    tiny_run(tmp_path / "run", epochs=1.0)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = contents(tmp_path / "run")
    with pytest.raises(FolderRefused, match=r"holds a trained model and no checkpoint to continue from\. --init_from"):
        tiny_run(tmp_path / "run", epochs=1.0, resume=True)
    after = contents(tmp_path / "run")
    assert {name for name in before if before[name] != after[name]} <= {"run.lock"}
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is None
