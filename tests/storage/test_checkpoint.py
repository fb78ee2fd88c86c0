"""Checkpoints survive kills, power losses, full disks, damage and attackers; or say that they did not."""

import errno
import logging
import os
import random
import resource
import shutil
import signal
import stat
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from crashes import PowerLoss, forked, killed_at, list_changes, tapped
from examples import is_whole, names, save

import sslvit
from sslvit.errors import CANNOT_WRITE, CannotWrite, Error
from sslvit.storage import checkpoint
from sslvit.storage.checkpoint import STATE, TENSORS

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With two checkpoints."""
    save(tmp_path / "checkpoints", 3)
    save(tmp_path / "checkpoints", 6)
    return tmp_path / "checkpoints"


# What is saved


def test_what_was_saved_is_what_is_read_bit_for_bit(root):
    found = checkpoint.latest(root)
    assert found.step == 6
    assert found.path == root / "step-00000006"
    assert is_whole(found)
    assert found.rejected == []
    assert found.versions["torch"] == torch.__version__
    assert found.versions["sslvit"] == sslvit.__version__


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse()])
def test_a_tensor_that_the_format_cannot_hold_is_refused_by_name(root, tensor):
    with pytest.raises(ValueError, match="'odd'"):
        checkpoint.save(root, 9, {"odd": tensor}, {})
    assert names(root) == ["step-00000003", "step-00000006"]


def test_state_that_is_not_json_is_refused_before_anything_is_written(root):
    with pytest.raises(ValueError, match="Tensor is not JSON"):
        checkpoint.save(root, 9, {}, {"loss": torch.ones(1)})
    assert names(root) == ["step-00000003", "step-00000006"]


def test_files_and_folders_follow_the_umask(tmp_path):
    for mask, file_mode, folder_mode in ((0o022, 0o644, 0o755), (0o007, 0o660, 0o770)):
        old = os.umask(mask)
        try:
            folder = save(tmp_path / f"{mask}", 1)
        finally:
            os.umask(old)
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {file_mode}
        assert stat.S_IMODE(folder.stat().st_mode) == folder_mode


def test_nothing_there_is_none_and_no_error(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None
    assert checkpoint.restore(tmp_path / "missing") is None


# What is kept


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=3)
        assert names(tmp_path) == [f"step-{s:08d}" for s in range(max(1, step - 2), step + 1)]


def test_keep_1_is_taken_as_2_with_one_warning(tmp_path, caplog):
    checkpoint._warn_of_keep_1.cache_clear()
    for step in range(1, 5):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    assert [record.message for record in caplog.records if "keep=1" in record.message] == [
        "keep=1 is taken as 2: with one checkpoint, damage to it would lose the run"
    ]


@pytest.mark.parametrize(("step", "keep"), [(-1, 2), (1, 0), (1, -3)])
def test_impossible_steps_and_numbers_to_keep_are_refused(tmp_path, step, keep):
    with pytest.raises(ValueError, match="at least"):
        save(tmp_path, step, keep)


def test_the_same_step_saved_again_supersedes_the_first_which_goes_only_afterwards(root):
    assert save(root, 6).name == "step-00000006.1"
    assert names(root) == ["step-00000003", "step-00000006.1"]
    assert save(root, 6).name == "step-00000006.2"
    assert is_whole(checkpoint.latest(root))
    save(root, 9)
    assert names(root) == ["step-00000006.2", "step-00000009"]


def test_steps_beyond_eight_digits_are_newer_than_those_below(tmp_path):
    save(tmp_path, 99_999_999)
    save(tmp_path, 100_000_000)
    assert checkpoint.latest(tmp_path).step == 100_000_000
    assert checkpoint.newest_step(tmp_path) == 100_000_000


def test_restoring_sets_aside_what_does_not_verify_so_that_two_good_ones_are_kept(root, caplog):
    save(root, 9)
    (root / "step-00000009" / STATE).write_bytes(b"{}")
    assert checkpoint.restore(root).step == 6
    assert "step-00000009/state.json" in caplog.text
    assert names(root) == ["rejected-step-00000009", "step-00000006"]
    save(root, 12)
    assert names(root) == ["rejected-step-00000009", "step-00000006", "step-00000012"]


def test_a_folder_that_cannot_be_deleted_is_a_warning_and_not_the_end(root, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    save(root, 9)
    assert "could not be deleted" in caplog.text
    monkeypatch.undo()
    save(root, 12)
    assert names(root) == ["step-00000009", "step-00000012"]


@pytest.mark.processes
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_someone_who_looks_at_any_time_finds_a_checkpoint_that_verifies(tmp_path, keep):
    save(tmp_path, 0, keep)
    pid = os.fork()
    if pid == 0:
        logging.disable()
        for step in range(1, 1_000_000):
            save(tmp_path, step, keep)
        os._exit(0)
    try:
        steps = []
        while len(steps) < 200 or len(set(steps)) < 10:
            found = checkpoint.latest(tmp_path)
            assert is_whole(found)
            steps.append(found.step)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert steps == sorted(steps)
    assert is_whole(checkpoint.restore(tmp_path))


def test_who_looks_while_all_that_was_listed_is_pruned_looks_again(root, monkeypatch):
    real = os.listdir

    def slow(path):
        listed = real(path)
        if Path(path) == root:
            monkeypatch.undo()
            save(root, 9)
            save(root, 12)
        return listed

    monkeypatch.setattr(os, "listdir", slow)
    found = checkpoint.latest(root)
    assert found.step == 12
    assert is_whole(found)
    assert found.rejected == []


def test_a_clock_that_jumps_and_a_copied_or_moved_root_change_nothing(root, tmp_path):
    for step, when in ((3, 4e9), (6, 0)):  # the older one seems to be of the future, the newer one of 1970
        for path in [root / f"step-{step:08d}", *(root / f"step-{step:08d}").iterdir()]:
            os.utime(path, (when, when))
    assert checkpoint.latest(root).step == 6
    shutil.copytree(root, tmp_path / "copied")
    assert checkpoint.restore(tmp_path / "copied").step == 6
    root.rename(tmp_path / "moved")
    save(tmp_path / "moved", 9)
    assert names(tmp_path / "moved") == ["step-00000006", "step-00000009"]


def test_a_checkpoint_that_cannot_be_written_to_is_read(root):
    for folder in (root, *root.iterdir()):
        for path in [*folder.glob("*.*"), folder]:
            path.chmod(0o555 if path.is_dir() else 0o444)
    assert checkpoint.latest(root).step == 6
    for folder in (root, *root.iterdir()):
        folder.chmod(0o755)


def test_a_second_checkpoint_of_a_step_that_is_refused_does_not_end_the_restart(root, caplog):
    for turn in range(3):
        (root / "step-00000006" / TENSORS).write_bytes(b"rotten" + bytes(turn))
        assert checkpoint.restore(root).step == 3
        assert names(root) == ["rejected-step-00000006", "step-00000003"]
        assert (root / "rejected-step-00000006" / TENSORS).read_bytes() == b"rotten" + bytes(turn)  # the newest is kept
        save(root, 6)
    assert caplog.text.count("checkpoint rejected and set aside: step-00000006/tensors.safetensors") == 3
    assert is_whole(checkpoint.restore(root))


# Kills


def resave(root: Path) -> None:
    save(root, 6)


def third(root: Path) -> None:
    save(root, 9)


def damaged(root: Path) -> None:
    (root / "step-00000006" / TENSORS).write_bytes(b"rotten")
    checkpoint.restore(root)
    save(root, 9)


@pytest.mark.processes
@pytest.mark.parametrize(("work", "allowed"), [(third, {6, 9}), (resave, {6}), (damaged, {3, 9})])
def test_sigkill_at_any_change_of_the_disk_leaves_the_old_or_the_new_checkpoint(root, tmp_path, work, allowed):
    shutil.copytree(root, tmp_path / "counted")
    changes = list_changes(partial(work, tmp_path / "counted"))
    # To be killed before a change is to be killed after the one before it.
    moments = [(i, "before") for i in range(len(changes))] + [(len(changes) - 1, "after")]
    moments += [(i, "midway") for i, name in enumerate(changes) if name == "write"]
    assert len(moments) >= 25
    seen = set()
    for moment, when in moments:
        here = tmp_path / f"{moment}-{when}"
        shutil.copytree(root, here)
        assert killed_at(partial(work, here), moment, when) == signal.SIGKILL
        found = checkpoint.latest(here)
        assert found.step in allowed
        assert is_whole(found)
        seen.add(found.step)
        assert checkpoint.restore(here).step == found.step
        save(here, 12)
        assert is_whole(checkpoint.latest(here))
        left = names(here)
        assert left[-1] == "step-00000012"
        assert len([name for name in left if name.startswith("step-")]) == 2
        assert not [name for name in left if name.startswith(".")]
    assert seen == allowed


@pytest.mark.processes
def test_sigkill_in_the_first_save_ever_leaves_nothing_or_a_whole_checkpoint(tmp_path):
    outcomes = set()
    for moment in range(len(list_changes(partial(save, tmp_path / "counted" / "checkpoints", 9)))):
        here = tmp_path / f"{moment}" / "checkpoints"
        assert killed_at(partial(save, here, 9), moment, "before") == signal.SIGKILL
        found = checkpoint.restore(here)
        assert found is None or is_whole(found)
        outcomes.add(found is None)
        save(here, 12)
        assert is_whole(checkpoint.latest(here))
    assert outcomes == {True, False}


@pytest.mark.processes
def test_kills_in_restarts_after_kills_still_leave_a_good_checkpoint(root):
    def one_more() -> None:
        save(root, checkpoint.restore(root).step + 1)

    chance, last = random.Random(0), 6
    for _ in range(40):
        killed_at(one_more, chance.randrange(50), "before")
        found = checkpoint.latest(root)
        assert is_whole(found)
        assert found.step in (last, last + 1)
        last = found.step
    one_more()
    assert names(root) == [f"step-{last:08d}", f"step-{last + 1:08d}"]


# Power loss


def power_losses(root: Path, tmp_path: Path, older: int | None = 6, ignore: str | None = None) -> tuple[int, list[str]]:
    """How many states after a power loss during a save were looked at, and what was wrong."""
    loss = PowerLoss(root.parent)
    with loss.recording():
        save(root, 9)
    wrong, states, chance = [], 0, random.Random(0)
    returned = next(i for i, change in reversed([*enumerate(loss.trace)]) if change == ("fsync", root)) + 1
    for done in range(len(loss.trace) + 1):
        for what_names in ("undone", "done", "some"):
            for what_data in ("empty", "cut", "zeros"):
                top = tmp_path / f"{done}-{what_names}-{what_data}"
                loss.rebuild(top, what_names, what_data, chance)
                states += 1
                here = top / root.name
                try:
                    found = checkpoint.latest(here)
                    step = found and found.step
                    if step not in ((9,) if done >= returned else (older, 9)) or (found and not is_whole(found)):
                        wrong.append(f"{top.name}: {step}")
                except Error as error:
                    wrong.append(f"{top.name}: {error}")
                if states % 7 == 0 and ignore is None:
                    checkpoint.restore(here)
                    save(here, 12)
                    assert is_whole(checkpoint.latest(here))
                shutil.rmtree(top)
        if done < len(loss.trace) and loss.trace[done][0] != ignore:
            loss.play(loss.trace[done])
    return states, wrong


def test_power_loss_at_any_step_of_a_save_leaves_the_old_or_the_new_checkpoint(root, tmp_path):
    (tmp_path / "states").mkdir()
    states, wrong = power_losses(root, tmp_path / "states")
    assert states >= 200
    assert wrong == []


def test_power_loss_in_the_first_save_leaves_nothing_or_a_whole_checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "states").mkdir()
    states, wrong = power_losses(tmp_path / "run" / "checkpoints", tmp_path / "states", older=None)
    assert states >= 100
    assert wrong == []


def test_the_simulated_power_loss_does_find_what_a_missing_fsync_would_lose(root, tmp_path):
    (tmp_path / "states").mkdir()
    assert len(power_losses(root, tmp_path / "states", ignore="fsync")[1]) >= 10


# Refusals of the disk


def test_an_error_at_any_change_of_the_disk_leaves_a_good_checkpoint(root, tmp_path):
    shutil.copytree(root, tmp_path / "counted")
    failed = 0
    for moment in range(len(list_changes(partial(save, tmp_path / "counted", 9)))):
        here = tmp_path / f"{moment}"
        shutil.copytree(root, here)
        calls = []

        def refuse(name, args, named):
            calls.append(name)  # noqa: B023
            if len(calls) - 1 == moment:  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")

        with tapped(refuse, lambda *_: None):
            try:
                save(here, 9)
                message = None
            except CannotWrite as error:
                message = str(error)
        if message is not None:
            failed += 1
            assert message.startswith(
                f"{here}: the checkpoint of step 9 was not saved: No space left on device (needs "
            )
        assert is_whole(checkpoint.latest(here))
        assert not [name for name in names(here) if name.startswith(".tmp-")]
        save(here, 12)
        assert is_whole(checkpoint.latest(here))
        assert not [name for name in names(here) if name.startswith(".")]
    assert failed >= 10


@pytest.mark.processes
def test_a_full_disk_is_one_error_with_path_need_and_free_space_and_passes(tmp_path):
    """RLIMIT_FSIZE refuses to let a file grow, as a full disk does, in the middle of a write."""
    large = {"weight": torch.arange(50_000.0)}
    checkpoint.save(tmp_path, 1, large, {})

    def child() -> None:
        for step, limit in enumerate([0, 1, 7, 8, 100, 512, 4096, 10_000, 65_536, 100_000, 199_000, 200_000], start=2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(CannotWrite) as refused:
                checkpoint.save(tmp_path, step, large, {})
            assert refused.value.code == CANNOT_WRITE
            for part in (
                str(tmp_path),
                "File too large",
                "needs 0.2 MB",
                " MB free",
                "earlier checkpoints are untouched",
            ):
                assert part in str(refused.value)
            assert names(tmp_path) == ["step-00000001"]
            assert checkpoint.latest(tmp_path).step == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        checkpoint.save(tmp_path, 99, large, {})

    assert forked(child) == 0
    found = checkpoint.latest(tmp_path)
    assert found.step == 99
    assert torch.equal(found.tensors["weight"], large["weight"])


def test_too_little_free_space_is_noticed_before_anything_is_written(root, monkeypatch):
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1_000_000))
    with pytest.raises(CannotWrite, match=r"too little free space \(needs 1.2 MB, 1.0 MB free\)"):
        checkpoint.save(root, 9, {"weight": torch.zeros(250_000)}, {})
    checkpoint.save(root, 9, {"weight": torch.zeros(200_000)}, {})


def test_what_reads_back_otherwise_is_not_made_visible(root, monkeypatch):
    real = os.fsync

    def rot(fd: int) -> None:
        real(fd)
        path = Path(f"/proc/self/fd/{fd}").resolve()
        if path.name == TENSORS:
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(os, "fsync", rot)
    with pytest.raises(CannotWrite, match=r"tensors.safetensors reads back other than it was written"):
        save(root, 9)
    monkeypatch.undo()
    assert names(root) == ["step-00000003", "step-00000006"]


def test_a_root_that_was_deleted_during_the_run_is_made_again(root):
    shutil.rmtree(root.parent / "checkpoints")
    save(root, 9)
    assert checkpoint.latest(root).step == 9


def test_a_root_that_is_a_file_is_a_typed_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(CannotWrite, match=str(root)):
            save(root, 1)
        assert checkpoint.latest(root) is None


# Cost


@pytest.mark.timing
@pytest.mark.slow
def test_a_save_costs_at_most_twice_a_plain_save_that_is_as_durable(tmp_path):
    tensors = {f"{i}": torch.randn(1000, 1000) for i in range(66)}
    ours, plain = [], []
    for step in range(7):
        os.sync()
        start = time.perf_counter()
        safetensors.torch.save_file(tensors, tmp_path / f"{step}")
        fd = os.open(tmp_path / f"{step}", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        (tmp_path / f"{step - 2}").unlink(missing_ok=True)
        plain.append(time.perf_counter() - start)
        os.sync()
        start = time.perf_counter()
        checkpoint.save(tmp_path / "checkpoints", step, tensors, {})
        ours.append(time.perf_counter() - start)
    ratio = sorted(ours)[3] / sorted(plain)[3]
    print(f"save {sorted(ours)[3]:.2f} s, plain {sorted(plain)[3]:.2f} s, ratio {ratio:.2f}")
    assert ratio <= 2
