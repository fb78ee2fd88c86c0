"""No damaged, foreign or forged checkpoint is used, and none is ever executed."""

import os
import pickle
import random
import resource
import shutil
import time
from pathlib import Path

import pytest
from examples import hostile_headers, is_whole, names, payloads, save

from sslvit.errors import BAD_CONFIGURATION, DataError
from sslvit.storage import checkpoint, durable
from sslvit.storage.checkpoint import MANIFEST, STATE, TENSORS, NewerSchema


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With two checkpoints."""
    save(tmp_path / "checkpoints", 3)
    save(tmp_path / "checkpoints", 6)
    return tmp_path / "checkpoints"


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
    for name, shown in (("optimizer.bin", "optimizer.bin"), ("\x1b[2J\n", "?[2J?")):
        (root / "step-00000006" / name).write_bytes(b"?")
        found = checkpoint.latest(root)
        assert found.step == 3
        assert found.rejected == [f"step-00000006/{shown}: no manifest names such a file"]
        (root / "step-00000006" / name).unlink()


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
            DataError,
            match=r"step-00000006/tensors.safetensors: has 0 bytes.*step-00000003/state.json: No such file",
        ):
            look(root)
    assert names(root) == ["step-00000003", "step-00000006"]


def forge(folder: Path, changes: dict | None = None) -> None:
    """Seals what is in the folder, as an attacker could who has read our source."""
    files = {name: durable.fingerprint(folder / name) for name in (TENSORS, STATE)}
    step = int(folder.name.removeprefix("step-"))
    whole = {"schema": 1, "step": step, "versions": {"sslvit": "9.9"}, "files": files} | (changes or {})
    (folder / MANIFEST).write_bytes(checkpoint.seal(whole))


def test_a_newer_schema_is_an_error_that_says_to_upgrade(root):
    forge(root / "step-00000006", {"schema": 2})
    with pytest.raises(
        NewerSchema, match=r"schema 2, written by sslvit 9.9; sslvit .* reads schema 1 at most: upgrade"
    ):
        checkpoint.latest(root)
    assert NewerSchema.code == BAD_CONFIGURATION


@pytest.mark.parametrize(
    "changes",
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
def test_a_forged_manifest_of_another_form_is_refused(root, changes):
    forge(root / "step-00000006", changes)
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


# Attackers


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


def test_hostile_tensor_files_with_a_valid_manifest_are_refused_in_time_and_memory(root):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for raw in hostile_headers(300):
        (root / "step-00000006" / TENSORS).write_bytes(raw)
        forge(root / "step-00000006")
        start = time.process_time()
        try:
            found = checkpoint.latest(root)
        finally:
            assert time.process_time() - start < 0.5
        # A header may happen to be in order; then its few bytes are all that was read.
        assert found.step == 3 or sum(t.numel() for t in found.tensors.values()) <= 64
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 150_000
