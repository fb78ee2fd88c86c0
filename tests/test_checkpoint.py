"""Checkpoints survive kills, power losses, full disks, damage and attackers; or say that they did not."""

import ast
import errno
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from crashes import PowerLoss, forked, killed_at, list_changes, tapped

import sslvit
from sslvit import checkpoint, durable
from sslvit.checkpoint import MANIFEST, STATE, TENSORS, CheckpointError, NewerSchema, NoneVerifies, SaveFailed
from sslvit.errors import BAD_CONFIGURATION, BAD_DATA, CANNOT_WRITE

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(3, 5, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "count": torch.tensor(step),
        "mask": torch.rand(5, generator=generator) < 0.5,
        "none": torch.zeros(0, 4),
    }


def save(root: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(root, step, tensors_of(step), {"cursor": step * 8, "name": "é"}, keep)


def is_whole(found: checkpoint.Checkpoint) -> bool:
    """Bit for bit what was saved at its step."""
    expected = tensors_of(found.step)
    return (
        found.state == {"cursor": found.step * 8, "name": "é"}
        and found.tensors.keys() == expected.keys()
        and all(
            found.tensors[name].dtype == t.dtype and torch.equal(found.tensors[name], t) for name, t in expected.items()
        )
    )


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


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


def test_every_dtype_that_torch_can_hold_is_read_back_by_the_reference_implementation(tmp_path):
    values = torch.arange(-6, 6).reshape(3, 4)
    tensors = {str(dtype): values.to(dtype) for dtype in durable.DTYPES}
    tensors |= {"transposed": torch.randn(4, 3).T, "scalar": torch.tensor(1.5), "empty": torch.zeros(2, 0, 3)}
    tensors |= {
        "shared": tensors["transposed"],
        "slice": torch.arange(10.0)[2:7:2],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    tensors['quotes " and \\ and ü and a\nline'] = torch.ones(1)
    durable.write(tmp_path / "file", durable.tensor_pieces(tensors))
    read = safetensors.torch.load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_the_tensor_file_is_byte_for_byte_that_of_the_reference_implementation(tmp_path):
    tensors = {f"blocks.{i}.weight": torch.randn(i, 3) for i in range(12)}
    durable.write(tmp_path / "ours", durable.tensor_pieces(tensors))
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


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


# Kills


def resave(root: Path) -> None:
    save(root, 6)


def third(root: Path) -> None:
    save(root, 9)


def damaged(root: Path) -> None:
    (root / "step-00000006" / TENSORS).write_bytes(b"rotten")
    checkpoint.restore(root)
    save(root, 9)


@pytest.mark.parametrize(("work", "allowed"), [(third, {6, 9}), (resave, {6}), (damaged, {3, 9})])
def test_sigkill_before_and_within_every_change_of_the_disk_leaves_the_old_or_the_new_checkpoint(
    root, tmp_path, work, allowed
):
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


def test_a_kill_in_the_restart_after_a_kill_after_a_kill_still_leaves_a_good_checkpoint(root):
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


def power_losses(root: Path, tmp_path: Path, ignore: str | None = None) -> tuple[int, list[str]]:
    """How many states after a power loss during a save were looked at, and what was wrong."""
    loss = PowerLoss(root)
    with loss.recording():
        save(root, 9)
    wrong, states, chance = [], 0, random.Random(0)
    durable_from = max(i for i, (kind, path, *_) in enumerate(loss.trace) if kind == "fsync" and path == root) + 1
    for done in range(len(loss.trace) + 1):
        for what_names in ("undone", "done", "some"):
            for what_data in ("empty", "cut", "zeros"):
                where = tmp_path / f"{done}-{what_names}-{what_data}"
                loss.rebuild(where, what_names, what_data, chance)
                states += 1
                try:
                    found = checkpoint.latest(where)
                    if (
                        found is None
                        or found.step not in ((9,) if done >= durable_from else (6, 9))
                        or not is_whole(found)
                    ):
                        wrong.append(f"{where.name}: {found and found.step}")
                except CheckpointError as error:
                    wrong.append(f"{where.name}: {error}")
                if states % 7 == 0 and ignore is None:
                    checkpoint.restore(where)
                    save(where, 12)
                    assert is_whole(checkpoint.latest(where))
                shutil.rmtree(where)
        if done < len(loss.trace) and loss.trace[done][0] != ignore:
            loss.play(loss.trace[done])
    return states, wrong


def test_power_loss_after_any_step_of_a_save_leaves_the_old_checkpoint_or_the_new_one(root, tmp_path):
    states, wrong = power_losses(root, tmp_path)
    assert states >= 200
    assert wrong == []


def test_the_simulated_power_loss_does_find_what_a_missing_fsync_would_lose(root, tmp_path):
    assert len(power_losses(root, tmp_path, ignore="fsync")[1]) >= 10


# Damage


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def check_flips(root: Path, flips: list[tuple[str, int, int]]) -> None:
    for name, position, bit in flips:
        path = root / "step-00000006" / name
        flip(path, position, bit)
        found = checkpoint.latest(root)
        assert found.step == 3, (name, position, bit)
        assert is_whole(found)
        assert len(found.rejected) == 1
        assert found.rejected[0].startswith(f"step-00000006/{name}: ")
        assert "\n" not in found.rejected[0]
        flip(path, position, bit)
    assert checkpoint.latest(root).step == 6


def all_positions(root: Path) -> list[tuple[str, int]]:
    sizes = {name: (root / "step-00000006" / name).stat().st_size for name in (TENSORS, STATE, MANIFEST)}
    return [(name, position) for name, size in sizes.items() for position in range(size)]


def test_any_flipped_bit_is_found_and_the_older_checkpoint_used(root):
    chance = random.Random(0)
    check_flips(root, [(*place, chance.randrange(8)) for place in chance.sample(all_positions(root), 500)])


@pytest.mark.slow
def test_every_bit_of_every_file_of_a_checkpoint_is_guarded(root):
    check_flips(root, [(*place, bit) for place in all_positions(root) for bit in range(8)])


@pytest.mark.parametrize("name", [TENSORS, STATE, MANIFEST])
def test_truncated_empty_longer_missing_or_odd_files_are_found(root, tmp_path, name):
    path = root / "step-00000006" / name
    whole = path.read_bytes()
    chance = random.Random(0)

    def is_refused() -> bool:
        found = checkpoint.latest(root)
        return found.step == 3 and is_whole(found) and found.rejected[0].startswith(f"step-00000006/{name}: ")

    for length in [0, 1, len(whole) - 1, *chance.sample(range(len(whole)), 27)]:
        path.write_bytes(whole[:length])
        assert is_refused()
    for longer in (whole + b"\0", whole + b" ", whole + whole, b" " + whole):
        path.write_bytes(longer)
        assert is_refused()
    path.write_bytes(bytes(len(whole)))
    assert is_refused()
    path.unlink()
    assert is_refused()
    path.mkdir()
    assert is_refused()
    path.rmdir()
    os.mkfifo(path)
    assert is_refused()
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(whole)
    path.symlink_to(tmp_path / "elsewhere")
    assert is_refused()
    path.unlink()
    path.write_bytes(whole)
    assert checkpoint.latest(root).step == 6


def test_files_and_folders_swapped_between_checkpoints_are_found(root):
    for name in (TENSORS, STATE, MANIFEST):
        older, newer = root / "step-00000003" / name, root / "step-00000006" / name
        content = newer.read_bytes()
        shutil.copy(older, newer)
        assert checkpoint.latest(root).step == 3
        newer.write_bytes(content)
    shutil.copytree(root / "step-00000003", root / "step-00000009")
    found = checkpoint.latest(root)
    assert found.step == 6
    assert found.rejected == ["step-00000009/MANIFEST.json: is of step 3"]


def test_a_file_that_the_manifest_does_not_name_is_found(root):
    (root / "step-00000006" / "optimizer.bin").write_bytes(b"?")
    found = checkpoint.latest(root)
    assert found.step == 3
    assert found.rejected == ["step-00000006/optimizer.bin: no manifest names such a file"]


def test_names_that_are_no_checkpoints_are_passed_over(root):
    for name in (
        "step-7",
        "step-00000007x",
        "STEP-00000008",
        ".tmp-00000009-ab",
        ".del-00000009",
        "notes.txt",
        "step-0000000９",
    ):
        (root / name).mkdir()
    assert checkpoint.latest(root).step == 6
    (root / "step-00000012").write_text("a file")
    assert checkpoint.latest(root).rejected == ["step-00000012/: Not a directory"]


def test_if_all_are_damaged_that_is_said_file_by_file_and_nothing_is_moved(root):
    (root / "step-00000003" / STATE).unlink()
    (root / "step-00000006" / TENSORS).write_bytes(b"")
    for look in (checkpoint.latest, checkpoint.restore):
        with pytest.raises(
            NoneVerifies,
            match=r"step-00000006/tensors.safetensors: has 0 bytes.*step-00000003/state.json: No such file",
        ):
            look(root)
    assert NoneVerifies.code == BAD_DATA
    assert names(root) == ["step-00000003", "step-00000006"]


def forge(folder: Path, manifest: dict | None = None) -> None:
    """Seals what is in the folder, as an attacker could who has read our source."""
    files = {name: durable.fingerprint(folder / name) for name in (TENSORS, STATE)}
    step = int(folder.name.removeprefix("step-"))
    whole = {"schema": 1, "step": step, "versions": {"sslvit": "9.9"}, "files": files} | (manifest or {})
    (folder / MANIFEST).write_bytes(checkpoint._seal(whole))


def test_a_newer_schema_is_an_error_that_says_to_upgrade_and_not_a_reason_to_use_an_older_checkpoint(root):
    forge(root / "step-00000006", {"schema": 2})
    with pytest.raises(
        NewerSchema, match=r"schema 2, written by sslvit 9.9; sslvit .* reads schema 1 at most: upgrade"
    ):
        checkpoint.latest(root)
    assert NewerSchema.code == BAD_CONFIGURATION


@pytest.mark.parametrize(
    "manifest",
    [
        {"schema": 0},
        {"schema": "1"},
        {"schema": None},
        {"schema": 1.0},
        {"schema": True},
        {"step": "6"},
        {"step": 7},
        {"step": 6.0},
        {"files": {}},
        {"files": []},
        {"files": {TENSORS: {}, STATE: {}}},
        {"files": {TENSORS: None, STATE: None}},
        {"files": {TENSORS: {"size": 1, "xxh3_128": ""}, STATE: {"size": -1, "xxh3_128": ""}}},
        {"files": {"../../secret": {"size": 1, "xxh3_128": ""}}},
        {"versions": []},
        {"versions": None},
        {"more": 1},
    ],
)
def test_a_forged_manifest_of_another_form_is_refused(root, manifest):
    forge(root / "step-00000006", manifest)
    found = checkpoint.latest(root)
    assert found.step == 3
    assert len(found.rejected) == 1


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", "[" * 100_000, '{"manifest": {}}', '{"manifest": 1, "xxh3_128": 1}', "\xff", "1e999"],
)
def test_a_manifest_that_is_none_is_refused(root, text):
    (root / "step-00000006" / MANIFEST).write_text(text, encoding="latin-1")
    assert checkpoint.latest(root).step == 3


@pytest.mark.parametrize("text", ["", "null", "[]", "1", "[" * 100_000, "{", "\xff", '"x"'])
def test_a_state_that_is_no_object_is_refused_even_with_a_manifest_that_fits(root, text):
    (root / "step-00000006" / STATE).write_text(text, encoding="latin-1")
    forge(root / "step-00000006")
    assert checkpoint.latest(root).step == 3


# Schema 1 as it was first written. It must be readable for ever: a new schema adds its own, and takes none away.
SCHEMA_1 = {
    TENSORS: (168).to_bytes(8, "little")
    + b'{"__metadata__":{"format":"pt"},"objective.seen":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
    + b'"objective.weight":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}  '
    + b"`\t\0\0\0\0\0\0"
    + b"\0\0\xc0?"
    + b"\0\0\0\xc0",
    STATE: b'{\n "step": 300,\n "note": "\\u00fc"\n}',
    MANIFEST: b"""{
 "manifest": {
  "files": {
   "state.json": {
    "size": 35,
    "xxh3_128": "1e888db652eae97208fc20289fed7cdc"
   },
   "tensors.safetensors": {
    "size": 192,
    "xxh3_128": "8f459ecf322a6fdbc62d2505887c5b44"
   }
  },
  "schema": 1,
  "step": 300,
  "versions": {
   "python": "3.11.7",
   "safetensors": "0.8.0",
   "sslvit": "0.1.0",
   "torch": "2.15.0"
  }
 },
 "xxh3_128": "0b086d2e10028518e506be31e1c1c9aa"
}
""",
}


def test_a_checkpoint_of_schema_1_as_it_was_first_written_is_read(tmp_path):
    (tmp_path / "step-00000300").mkdir()
    for name, content in SCHEMA_1.items():
        (tmp_path / "step-00000300" / name).write_bytes(content)
    found = checkpoint.latest(tmp_path)
    assert (found.step, found.state) == (300, {"step": 300, "note": "ü"})
    assert found.tensors["objective.weight"].tolist() == [1.5, -2.0]
    assert found.tensors["objective.seen"].tolist() == 2400
    assert found.versions == {"python": "3.11.7", "safetensors": "0.8.0", "sslvit": "0.1.0", "torch": "2.15.0"}


# Refusals of the disk


def test_an_error_of_any_change_of_the_disk_leaves_the_old_or_the_new_checkpoint_and_the_next_save_works(
    root, tmp_path
):
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
            except SaveFailed as error:
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


def test_a_full_disk_is_one_typed_error_with_path_need_and_free_space_and_saving_works_again_later(tmp_path):
    """RLIMIT_FSIZE refuses to let a file grow, as a full disk does, in the middle of a write."""
    large = {"weight": torch.arange(50_000.0)}
    checkpoint.save(tmp_path, 1, large, {})

    def child() -> None:
        for step, limit in enumerate([0, 1, 7, 8, 100, 512, 4096, 10_000, 65_536, 100_000, 199_000, 200_000], start=2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(SaveFailed) as refused:
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
    with pytest.raises(SaveFailed, match=r"too little free space \(needs 1.2 MB, 1.0 MB free\)"):
        checkpoint.save(root, 9, {"weight": torch.zeros(250_000)}, {})
    checkpoint.save(root, 9, {"weight": torch.zeros(200_000)}, {})


def test_what_reads_back_otherwise_is_not_made_visible(root, monkeypatch):
    real = os.fsync

    def rot(fd: int) -> None:
        real(fd)
        path = Path(f"/proc/self/fd/{fd}").resolve()
        if path.name == TENSORS:
            flip(path, path.stat().st_size - 1, 0)

    monkeypatch.setattr(os, "fsync", rot)
    with pytest.raises(SaveFailed, match=r"tensors.safetensors reads back other than it was written"):
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
        with pytest.raises(SaveFailed, match=str(root)):
            save(root, 1)
        assert checkpoint.latest(root) is None


# Attackers


class Payload:
    """Unpickled, it leaves a canary."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)


def payloads(folder: Path, canary: Path) -> dict[str, bytes]:
    """Files that run code in readers which unpickle."""
    evil = Payload(canary)
    made: dict[str, Callable[[Path], object]] = {
        **{f"pickle {p}": lambda path, p=p: path.write_bytes(pickle.dumps(evil, p)) for p in range(6)},
        "in a dict": lambda path: path.write_bytes(pickle.dumps({"weight": evil})),
        "in a list": lambda path: path.write_bytes(pickle.dumps([[evil]] * 3)),
        "torch zip": lambda path: torch.save(evil, path),
        "torch zip in a dict": lambda path: torch.save({"weight": torch.ones(2), "hyper_parameters": evil}, path),
        "torch legacy": lambda path: torch.save({"weight": evil}, path, _use_new_zipfile_serialization=False),
        "module": lambda path: torch.save({"model": torch.nn.Linear(2, 2), "more": evil}, path),
        "numpy object": lambda path: np.array([evil], dtype=object).dump(path),
        "torch script-like zip": lambda path: torch.save([evil, {"code": "import os"}], path),
        "eval": lambda path: path.write_text(f"__import__('os').system('touch {canary}')"),
        "import chain": lambda path: path.write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()),
        "yaml": lambda path: path.write_text(f"!!python/object/apply:os.system ['touch {canary}']"),
        "behind a header": lambda path: path.write_bytes((8).to_bytes(8, "little") + b"{}      " + pickle.dumps(evil)),
    }
    contents = {}
    for name, make in made.items():
        make(folder / "payload")
        contents[name] = (folder / "payload").read_bytes()
    return contents


def test_no_payload_in_the_place_of_any_file_is_ever_executed(root, tmp_path):
    canary = tmp_path / "canary"
    corpus = payloads(tmp_path, canary)
    assert len(corpus) >= 15
    pickle.loads(corpus["pickle 2"])
    assert canary.exists(), "the payload works"
    canary.unlink()
    for payload in corpus.values():
        for name in (TENSORS, STATE, MANIFEST):
            for sealed in (False, True):
                path = root / "step-00000006" / name
                whole = {file.name: file.read_bytes() for file in path.parent.iterdir()}
                path.write_bytes(payload)
                if sealed and name != MANIFEST:
                    forge(path.parent)
                found = checkpoint.latest(root)
                assert found.step == 3
                assert found.rejected[0].startswith(f"step-00000006/{name}: ")
                assert not canary.exists()
                for file, content in whole.items():
                    (path.parent / file).write_bytes(content)


def hostile_headers(count: int) -> list[bytes]:
    """Safetensors files whose headers lie, and bytes at random."""
    chance = random.Random(0)

    def file(header: object, data: bytes = bytes(64), length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return (len(text) if length is None else length).to_bytes(8, "little") + text + data

    numbers = [
        -1,
        0,
        1,
        2,
        4,
        8,
        63,
        64,
        65,
        2**31,
        2**32,
        2**53,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        10**30,
        1.5,
        "4",
        None,
        True,
        [],
    ]
    dtypes = ["F32", "F64", "I8", "U8", "BOOL", "BF16", "F8_E4M3", "F8_E8M0", "F4", "C64", "X", "", None, 7]
    files = [
        b"",
        b"\0" * 7,
        bytes(8),
        b"\xff" * 8,
        file({}, b"", 2**64 - 1),
        file({}, b"", 2**62),
        file({}, b"", 100_000_000),
        file(b"{" + b'"a":' * 20_000),
        file(b"[" * 200_000),
        file(
            b'{"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        ),
    ]
    while len(files) < count:
        pick = chance.choice
        entry = {
            "dtype": pick(dtypes),
            "shape": pick([[pick(numbers) for _ in range(chance.randrange(4))], pick(numbers), [1] * 1000]),
            "data_offsets": pick([[pick(numbers), pick(numbers)], [pick(numbers)], pick(numbers), [0, 64, 64]]),
        }
        if chance.random() < 0.2:
            entry.pop(pick(list(entry)))
        header = {pick(["a", "", "../a", "a\0b", "__metadata__"]): entry}
        if chance.random() < 0.3:
            header["b"] = {"dtype": "F32", "shape": [16], "data_offsets": [pick([0, 32]), 64]}
        raw = bytearray(file(header, length=pick([None, None, None, chance.randrange(300)])))
        if chance.random() < 0.2:
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        files.append(bytes(raw))
    return files


def test_hostile_tensor_files_are_refused_in_time_and_memory_even_with_a_manifest_that_fits(root):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for raw in hostile_headers(300):
        (root / "step-00000006" / TENSORS).write_bytes(raw)
        forge(root / "step-00000006")
        start = time.perf_counter()
        try:
            found = checkpoint.latest(root)
        finally:
            assert time.perf_counter() - start < 0.5
        # A header may happen to be in order; then its few bytes are all that was read.
        assert found.step == 3 or sum(t.numel() for t in found.tensors.values()) <= 64
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 150_000


def test_nothing_in_the_package_can_unpickle_or_evaluate_what_it_reads():
    for path in Path(sslvit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = {alias.name.partition(".")[0] for alias in node.names} | {
                    (getattr(node, "module", "") or "").partition(".")[0]
                }
                assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, path
            if isinstance(node, ast.Call):
                called, named = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called not in ("eval", "exec", "yaml.load", "os.system", "yaml.unsafe_load"), path
                assert called != "torch.load" or named.get("weights_only") == "True", path
                assert named.get("allow_pickle", "False") == "False", path
                assert named.get("shell", "False") == "False", path


# Cost


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
