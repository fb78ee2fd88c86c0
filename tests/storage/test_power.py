"""Power lost at any moment: a file, a model's folder and the log are there as they were, or as they were to be.

tests/storage/test_checkpoint.py has the same for checkpoints. The last tests here plant what each of them is there to
find.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from crashes import Folder, PowerLoss
from tiny_run import tiny_run

from sslvit.errors import NoInput
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.runs.log import Log
from sslvit.storage import checkpoint, durable
from sslvit.weights.folder import load_backbone, save_backbone

ABOUT = {"objective": "none", "readout": "mean", "data": "nothing"}


def after_power_losses(
    top: Path, work: Callable[[], None], where: Path, at: Callable[[tuple], bool] = lambda operation: True
) -> Iterator[tuple[bool, Path]]:
    """What may be on the disk after the operations for which `at` holds, and whether the work had returned by then."""
    loss, chance = PowerLoss(top), random.Random(0)
    with loss.recording():
        work()
    for number, operation in enumerate([None, *loss.trace]):
        if operation is not None:
            loss.play(operation)
        if operation is not None and not at(operation):
            continue
        for names in ("undone", "done", "some"):
            for data in ("empty", "cut", "zeros"):
                place = where / f"{number}-{names}-{data}"
                loss.rebuild(place, names, data, chance)
                yield number == len(loss.trace), place
                shutil.rmtree(place)


def vit(seed: int) -> ViT:
    return ViT(ViTConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, seed=seed))


def lost_models(tmp_path: Path) -> tuple[int, list[str]]:
    """Of a model that replaces an older one: how many states were looked at, and what was wrong."""
    top, where = tmp_path / "top", tmp_path / "states"
    top.mkdir(), where.mkdir()
    save_backbone(vit(0), top / "model", ABOUT)
    weights = {seed: vit(seed).state_dict()["patch_embed.proj.weight"] for seed in (0, 1)}
    states, wrong = 0, []
    for returned, place in after_power_losses(top, lambda: save_backbone(vit(1), top / "model", ABOUT), where):
        states += 1
        try:
            found = load_backbone(place / "model").state_dict()["patch_embed.proj.weight"]
            seed = next(seed for seed, weight in weights.items() if torch.equal(found, weight))
        except NoInput:  # between the old and the new: the run that wrote it is told that it lacks its model
            seed = None if not (place / "model").exists() else "in pieces"
        except ValueError as error:
            seed = str(error)
        if seed not in ((1,) if returned else (0, 1, None)):
            wrong.append(f"{place.name}: {seed}")
    return states, wrong


def lost_files(tmp_path: Path) -> tuple[int, list[str]]:
    top, where = tmp_path / "top", tmp_path / "states"
    top.mkdir(), where.mkdir()
    (top / "cost.json").write_bytes(b"old")
    states, wrong = 0, []
    for returned, place in after_power_losses(top, lambda: durable.replace(top / "cost.json", [b"new" * 9]), where):
        states += 1
        found = (place / "cost.json").read_bytes() if (place / "cost.json").exists() else None
        if found not in ((b"new" * 9,) if returned else (b"old", b"new" * 9)):
            wrong.append(f"{place.name}: {found}")
    return states, wrong


def lost_lines(tmp_path: Path) -> tuple[int, list[str]]:
    """Of a run: whether its log has each step up to the newest checkpoint, looked at when each becomes visible."""
    top, where = tmp_path / "top", tmp_path / "states"
    top.mkdir(), where.mkdir()

    def at(operation: tuple) -> bool:
        return operation[0] == "rename" and operation[2].parent.name == "checkpoints"

    states, wrong = 0, []
    for _, place in after_power_losses(top, lambda: tiny_run(top / "run", epochs=2.0), where, at):
        found = checkpoint.latest(place / "run" / "checkpoints") if (place / "run").exists() else None
        if found is None:
            continue
        states += 1
        lines = (place / "run" / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        try:
            steps = [json.loads(line)["step"] for line in lines[: found.step]]
        except ValueError:
            steps = "damaged"
        if steps != list(range(1, found.step + 1)):
            wrong.append(f"{place.name}: step {found.step}, lines of {steps}")
    return states, wrong


def test_a_model_s_folder_is_the_old_one_or_the_new_one_or_not_there(tmp_path):
    states, wrong = lost_models(tmp_path)
    assert states >= 150
    assert wrong == []


def test_a_file_that_is_replaced_is_the_old_one_or_the_new_one(tmp_path):
    states, wrong = lost_files(tmp_path)
    assert states >= 70
    assert wrong == []


def test_the_log_has_every_step_up_to_the_newest_checkpoint(tmp_path):
    states, wrong = lost_lines(tmp_path)
    assert states >= 20
    assert wrong == []


# What these tests are there to find


@pytest.mark.parametrize("look", [lost_models, lost_files])
def test_a_missing_sync_of_a_file_is_found(tmp_path, look, monkeypatch):
    class Forgetful(PowerLoss):
        def play(self, operation: tuple) -> None:
            if operation[0] != "fsync" or isinstance(self._node(operation[1]), Folder):
                super().play(operation)

    monkeypatch.setitem(globals(), "PowerLoss", Forgetful)
    assert look(tmp_path)[1]


@pytest.mark.parametrize(("look", "which"), [(lost_models, 0), (lost_models, 1), (lost_files, 0)])
def test_a_missing_sync_of_a_folder_before_or_after_a_rename_is_found(tmp_path, look, which, monkeypatch):
    """which: of the calls of sync_folder that a write makes."""
    real, calls = durable.sync_folder, []

    def forgetful(folder: Path) -> None:
        calls.append(folder)
        if (len(calls) - 1) % (2 if look is lost_models else 1) != which:
            real(folder)

    monkeypatch.setattr(durable, "sync_folder", forgetful)
    assert look(tmp_path)[1]


def test_a_log_that_is_not_synced_before_a_checkpoint_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(Log, "sync", lambda self: None)
    assert lost_lines(tmp_path)[1]
