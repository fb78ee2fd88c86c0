"""Files of features hold what `extract` computes, bit for bit, whatever kills, processes and workers made them."""

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas
import preloaded
import pyarrow.parquet as pq
import pytest
import torch
from crashes import forked, killed_at, list_changes
from PIL import Image
from random_models import ABOUT, vit
from recipes_run import RECIPES, run

from sslvit import __version__
from sslvit.data.spec import open_source
from sslvit.errors import CannotWrite
from sslvit.evaluate import embedding
from sslvit.evaluate.features import extract
from sslvit.evaluate.shards import Shards
from sslvit.processes.collectives import start
from sslvit.storage import durable
from sslvit.views.pretraining import eval_view
from sslvit.weights.folder import load_backbone, save_backbone

BAD = 5  # of 41 images, the one that is torn


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model; 41 images in two classes, one of them torn; and an array of 30 without labels."""
    folder, draw = tmp_path_factory.mktemp("embedding"), np.random.default_rng(0)
    save_backbone(vit(), folder / "model", ABOUT)
    for number in range(41):
        (folder / "set" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        file = folder / "set" / "ab"[number % 2] / f"{number:02}.png"
        Image.fromarray(draw.integers(0, 256, (32, 36 + number % 3, 3), np.uint8)).save(file)
    file = folder / "set" / "a" / "10.png"  # the sixth of its class: id 5
    file.write_bytes(file.read_bytes()[:300])
    np.savez(folder / "array.npz", x_train=draw.integers(0, 256, (30, 32, 32, 3), np.uint8))
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch, tmp_path):
    monkeypatch.setattr(embedding, "SHARD_BATCHES", 2)
    monkeypatch.chdir(tmp_path)


def words(place: Path, *more: str, data: str = "set", out: str = "features.parquet") -> str:
    kind = "npz" if data.endswith("npz") else "folder"
    return " ".join([f"--model {place / 'model'} --data {kind}:{place / data} --out {out} --batch_size 4", *more])


def expected(place: Path, data: str = "set", readout: str = "mean", ids: np.ndarray | None = None):
    kind = "npz" if data.endswith("npz") else "folder"
    source = open_source(f"{kind}:{place / data}", image_size=32)
    accelerator, backbone = start(threads=1), load_backbone(place / "model")
    return extract(backbone, source, eval_view(32), accelerator, readouts=(readout,), ids=ids, batch_size=4), source


def values_of(table, shape: tuple[int, ...]) -> np.ndarray:
    flat = table["features"].combine_chunks()
    for _ in shape:
        flat = flat.flatten()
    return flat.to_numpy().reshape(-1, *shape)


def test_a_parquet_file_has_the_rows_of_extract_with_paths_and_labels(place, capsys):
    run("embed", words(place, "--threads 1"))
    table, (features, source) = pq.read_table("features.parquet"), expected(place)
    assert table.column_names == ["id", "path", "label", "features"]
    assert table["id"].to_pylist() == features.ids.tolist() == [id for id in range(41) if id != BAD]
    assert (values_of(table, (32,)) == features.by_readout["mean"].numpy()).all()
    assert table["label"].to_pylist() == features.labels.tolist()
    assert table["path"].to_pylist() == [source.store.where(id) for id in features.ids.tolist()]
    assert all(Path(path).is_file() for path in table["path"].to_pylist())
    about = json.loads(table.schema.metadata[b"about"])
    weights = durable.tensors_hash(load_backbone(place / "model").state_dict())
    assert about["weights"] == weights
    assert about["fingerprint"] == source.fingerprint
    assert (about["readout"], about["image_size"], about["version"]) == ("mean", [32, 32], __version__)
    assert (about["images"], about["unreadable"], about["classes"]) == (41, 1, ["a", "b"])
    (line,) = map(json.loads, Path("features.parquet.unreadable.jsonl").read_text().splitlines())
    assert (line["id"], line["path"]) == (BAD, str(place / "set" / "a" / "10.png"))
    printed = capsys.readouterr().out
    assert f"skipped, unreadable: {line['path']}: {line['reason']}" in printed
    assert "40 rows of 32 in features.parquet" in printed
    assert sorted(os.listdir()) == ["features.parquet", "features.parquet.unreadable.jsonl"]


def test_pandas_and_datasets_read_the_file(place):
    run("embed", words(place, "--threads 1"))
    values = expected(place)[0].by_readout["mean"].numpy()
    frame = pandas.read_parquet("features.parquet")
    assert (np.stack(frame["features"]) == values).all()
    assert frame["label"].dtype == np.int64
    read = datasets.Dataset.from_parquet("features.parquet", cache_dir="cache").with_format("numpy")
    assert (read["features"][:] == values).all()


@pytest.mark.parametrize("readout", ["cls", "both", "cls:2", "patches"])
def test_an_npy_file_is_mapped_into_memory_and_its_rows_are_beside_it(place, readout):
    run("embed", words(place, f"--threads 1 --readout {readout}", out="features.npy"))
    mapped, (features, _) = np.load("features.npy", mmap_mode="r"), expected(place, readout=readout)
    assert isinstance(mapped, np.memmap)
    assert mapped.shape == features.by_readout[readout].shape
    assert (mapped == features.by_readout[readout].numpy()).all()
    rows = pq.read_table("features.npy.rows.parquet")
    assert rows.column_names == ["id", "path", "label"]
    assert rows["id"].to_pylist() == features.ids.tolist()
    assert json.loads(rows.schema.metadata[b"about"])["readout"] == readout


def test_patches_are_lists_of_lists_in_parquet(place):
    run("embed", words(place, "--threads 1 --readout patches"))
    table = pq.read_table("features.parquet")
    assert str(table.schema.field("features").type).count("fixed_size_list") == 2
    features, _ = expected(place, readout="patches")
    assert (values_of(table, (16, 32)) == features.by_readout["patches"].numpy()).all()


def test_an_array_without_labels_has_ids_and_features_alone(place):
    run("embed", words(place, "--threads 1", data="array.npz"))
    table = pq.read_table("features.parquet")
    assert table.column_names == ["id", "features"]
    assert (values_of(table, (32,)) == expected(place, "array.npz")[0].by_readout["mean"].numpy()).all()


def test_the_images_of_a_cache_keep_their_paths(place, tmp_path, monkeypatch):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    for number in range(3):
        (tmp_path / "same").mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(tmp_path / "same" / f"{number}.png")
    run("embed", words(place, "--threads 1", data=str(tmp_path / "same")))
    assert any((tmp_path / "cache").iterdir())
    wanted = [str(tmp_path / "same" / f"{number}.png") for number in range(3)]
    assert pq.read_table("features.parquet")["path"].to_pylist() == wanted


def test_half_precision_is_rounded_when_stored_and_refused_if_too_large(place, capsys):
    run("embed", words(place, "--threads 1 --float16", out="features.npy"))
    mapped, features = np.load("features.npy", mmap_mode="r"), expected(place)[0].by_readout["mean"]
    assert mapped.dtype == np.float16
    assert (mapped == features.numpy().astype(np.float16)).all()
    run("embed", words(place, "--threads 1 --float16"))
    assert (values_of(pq.read_table("features.parquet"), (32,)) == mapped).all()
    work = embedding.Work(expected(place)[1], np.arange(2), "mean", (3,), torch.float16, 4)
    rows = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1e5, 1.0]])
    with pytest.raises(ValueError, match=r"of image 1 of .* are not finite: 100000 is too large for --float16"):
        embedding._shard(work, np.arange(2), rows, [])


def test_features_that_are_not_finite_are_refused_with_their_image(place):
    work = embedding.Work(expected(place)[1], np.arange(2), "mean", (1,), torch.float32, 4)
    with pytest.raises(ValueError, match=r"mean of image 1 of .* are not finite$"):
        embedding._shard(work, np.arange(2), torch.tensor([[1.0], [float("nan")]]), [])


def test_a_limit_takes_random_images_in_the_order_of_their_ids(place):
    run("embed", words(place, "--threads 1 --limit 17", data="array.npz", out="some.parquet"))
    ids = np.array(pq.read_table("some.parquet")["id"])
    assert len(ids) == 17
    assert (np.diff(ids) > 0).all()
    features, _ = expected(place, "array.npz", ids=ids)
    assert (values_of(pq.read_table("some.parquet"), (32,)) == features.by_readout["mean"].numpy()).all()


@pytest.mark.processes
def test_workers_and_processes_do_not_change_a_byte(place):
    run("embed", words(place, "--threads 1"))
    alone = Path("features.parquet").read_bytes()
    run("embed", words(place, "--threads 1 --workers 2 --overwrite"))
    assert Path("features.parquet").read_bytes() == alone
    for done in preloaded.run_ranks(
        [sys.executable, str(RECIPES / "embed.py"), *words(place, out="two.parquet").split()]
    ):
        assert done.returncode == 0, done.stderr
    one, two = pq.read_table("features.parquet"), pq.read_table("two.parquet")
    assert one.equals(two)
    assert one.schema.metadata == two.schema.metadata
    assert sorted(os.listdir()) == [
        "features.parquet", "features.parquet.unreadable.jsonl", "two.parquet", "two.parquet.unreadable.jsonl"
    ]  # fmt: skip


@pytest.mark.parametrize("out", ["features.parquet", "features.npy"])
def test_killed_anywhere_and_again_the_same_command_ends_in_the_same_bytes(place, out):
    def work() -> None:
        run("embed", words(place, "--threads 1", out=out))

    files = [out, f"{out}.unreadable.jsonl"] + ["features.npy.rows.parquet"] * (out == "features.npy")
    counts: list[int] = []
    assert forked(lambda: Path("count").write_text(str(len(list_changes(work))))) == 0
    changes = int(Path("count").read_text())
    Path("count").unlink()
    whole = {name: Path(name).read_bytes() for name in files}
    assert sorted(os.listdir()) == sorted(files)
    draw = random.Random(0)
    moments = [*draw.sample(range(changes), 6), changes - 3]
    for moment in moments:
        for name in files:
            Path(name).unlink(missing_ok=True)
        assert killed_at(work, moment, draw.choice(["before", "midway", "after"])) == signal.SIGKILL
        again = killed_at(work, draw.randrange(changes // 2), "after") if not Path(out).exists() else 0
        counts.append(again)
        if not Path(out).exists():
            assert forked(work) == 0
        assert {name: Path(name).read_bytes() for name in files} == whole
    assert counts.count(signal.SIGKILL) >= 2  # or nothing was killed twice


@pytest.mark.parametrize("out", ["features.parquet", "features.npy"])
def test_killed_while_files_are_renamed_and_its_folder_deleted_the_same_command_ends_it(place, out, capfd):
    def work() -> None:
        run("embed", words(place, "--threads 1", out=out))

    def prepare() -> None:
        Path("names").write_text("\n".join(list_changes(work)))

    files = sorted([out, f"{out}.unreadable.jsonl"] + ["features.npy.rows.parquet"] * (out == "features.npy"))
    assert forked(prepare) == 0
    names = Path("names").read_text().split()
    Path("names").unlink()
    first = max(n for n, name in enumerate(names) if name == "mkdir")  # the hidden folder is made
    renames = [n for n, name in enumerate(names) if n > first and name in ("rename", "replace")][-len(files) - 1 :]
    refused = 0
    for moment in [*renames, renames[-1] + 2]:  # each file's, the hidden folder's, and amid its deletion
        for name in files:
            Path(name).unlink()
        assert killed_at(work, moment, "after") == signal.SIGKILL
        again = forked(work)
        refused += again != 0
        assert (again != 0) == (f"--out: {out} exists" in capfd.readouterr().err)
        assert sorted(os.listdir()) == files
    assert refused == 3  # the file was whole by then


def test_only_what_cannot_be_written_is_blamed_on_out(place, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        refuse(patched, embedding.EncodedSource, "read", OSError(errno.EMFILE, "Too many open files", "/set/a"))
        said = ends(capsys, 70, words(place, "--threads 1"))
    assert "the limit of open files is reached" in said
    assert "--out" not in said
    refuse(monkeypatch, Shards, "write", OSError(errno.EDQUOT, "Disk quota exceeded"))
    said = ends(capsys, CannotWrite.code, words(place, "--threads 1"))
    assert said.endswith("--out features.parquet cannot be written: Disk quota exceeded\n")


def refuse(patched: pytest.MonkeyPatch, kind: type, name: str, error: OSError) -> None:
    def fail(*_: object) -> None:
        raise error

    patched.setattr(kind, name, fail)


@pytest.mark.processes
def test_a_process_that_is_killed_leaves_its_shards_and_the_next_goes_on(place):
    """From outside, at any time, as a scheduler does."""
    run("embed", words(place, "--threads 1", out="whole.parquet"))
    code = "import sys; from sslvit.evaluate import embedding; embedding.SHARD_BATCHES = 1\n"
    code += "from sslvit.cli import run_cli; from sslvit.recipes import embed; import time\n"
    code += "real = embedding.Shards.write\n"
    code += "embedding.Shards.write = lambda *all: (real(*all), print('shard', flush=True), time.sleep(0.2))\n"
    code += "run_cli(embed.main, embed.Config)"
    command = [sys.executable, "-c", code, *words(place, "--threads 1 --limit 40").split()]
    made = 0
    for kills in (2, 3):
        process = preloaded.Process(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(kills):
            while process.stdout.readline().strip() != "shard":
                assert process.poll() is None
        process.kill()
        process.wait()
        process.stdout.close()
        assert not Path("features.parquet").exists()
        made += kills
        assert len(Shards(Path("features.parquet")).files()) in (made, made + 1)
        made = len(Shards(Path("features.parquet")).files())
    done = preloaded.run(command, text=True, check=True)
    assert f"Resuming: {made} of 10 shards" in done.stdout
    assert done.stdout.count("shard\n") == 10 - made
    run("embed", words(place, "--threads 1 --limit 40", out="at-once.parquet"))
    assert pq.read_table("features.parquet").equals(pq.read_table("at-once.parquet"))


def begun(place: Path, *more: str) -> Shards:
    """A command that was killed at some shard."""

    def work() -> None:
        real = Shards.write
        Shards.write = lambda self, number, shard: os._exit(9) if number == 3 else real(self, number, shard)
        run("embed", words(place, "--threads 1", *more))

    assert os.waitstatus_to_exitcode(forked(work)) == 9
    shards = Shards(Path("features.parquet"))
    assert list(shards.files()) == [0, 1, 2]
    return shards


def ends(capsys, code: int, command: str) -> str:
    with pytest.raises(SystemExit) as ended:
        run("embed", command)
    said = capsys.readouterr().err
    assert ended.value.code == code, said
    return said


def test_another_model_other_images_or_options_are_refused_or_start_afresh(place, tmp_path, capsys):
    shards = begun(place)
    save_backbone(vit(depth=3), tmp_path / "other", ABOUT)
    other_model = words(place, "--threads 1").replace(str(place / "model"), str(tmp_path / "other"))
    for command, what in [
        (other_model, "a different model"),
        (words(place, "--threads 1", data="array.npz"), "different images"),
        (words(place, "--threads 1 --limit 7"), "different images"),
        (words(place, "--threads 1 --readout cls"), "different options"),
    ]:
        said = ends(capsys, CannotWrite.code, command)
        assert what in said
        assert "--overwrite starts afresh" in said
        assert list(shards.files()) == [0, 1, 2]
    run("embed", words(place, "--threads 1 --readout cls --overwrite"))
    assert "Resuming" not in capsys.readouterr().out
    features, _ = expected(place, readout="cls")
    assert (values_of(pq.read_table("features.parquet"), (32,)) == features.by_readout["cls"].numpy()).all()


def test_an_overwriting_command_that_was_killed_goes_on_and_leaves_the_old_file_until_then(place, capsys):
    Path("features.parquet").write_text("old")
    begun(place, "--overwrite")
    assert Path("features.parquet").read_text() == "old"
    run("embed", words(place, "--threads 1 --overwrite"))
    assert "Resuming: 3 of 6 shards" in capsys.readouterr().out
    assert pq.read_table("features.parquet").num_rows == 40


def test_a_damaged_shard_is_made_again(place, capsys):
    shards = begun(place)
    content = bytearray(shards.files()[1].read_bytes())
    content[len(content) // 2] ^= 1
    shards.files()[1].write_bytes(content)
    run("embed", words(place, "--threads 1"))
    assert "Resuming: 2 of 6 shards" in capsys.readouterr().out
    features, _ = expected(place)
    assert (values_of(pq.read_table("features.parquet"), (32,)) == features.by_readout["mean"].numpy()).all()


def test_what_cannot_be_written_is_refused_before_anything_is(place, tmp_path, monkeypatch, capsys):
    Path("old.npy").touch()
    Path("folder.npy").mkdir()
    Path("file").touch()
    before = sorted(os.listdir())
    assert "old.npy exists: --overwrite" in ends(capsys, CannotWrite.code, words(place, out="old.npy"))
    for more in ("", "--overwrite"):
        assert "folder.npy is a folder" in ends(capsys, CannotWrite.code, words(place, more, out="folder.npy"))
    assert "cannot be written" in ends(capsys, CannotWrite.code, words(place, out="file/features.npy"))
    stream = words(place).replace("folder:", "stream:parquet:")
    assert "streams are for pretraining only" in ends(capsys, 78, stream)
    no_test = ends(capsys, 66, words(place, "--split test"))
    assert "has no test split" in no_test
    free = 41 * 4 * 32 * 2 + 41 * embedding.ROW_BYTES  # shards, and the file; a byte more is not needed
    usage = type("Usage", (), {"free": free - 1})
    with monkeypatch.context() as patched:
        patched.setattr(embedding.shutil, "disk_usage", lambda _: usage)
        assert "41 rows of 128 bytes" in ends(capsys, CannotWrite.code, words(place, "--threads 1"))
        assert sorted(os.listdir()) == before
        usage.free = free
        run("embed", words(place, "--threads 1"))


def test_two_commands_do_not_write_one_file(place, capsys):
    shards = begun(place)
    with open(shards.folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = ends(capsys, CannotWrite.code, words(place, "--threads 1"))
    assert "another process is writing it" in said
    assert list(shards.files()) == [0, 1, 2]


def test_images_of_which_none_can_be_read_leave_no_file(place, tmp_path, capsys):
    (tmp_path / "torn").mkdir()
    for number in range(2):
        (tmp_path / "torn" / f"{number}.png").write_bytes(b"no image")
    assert "cannot be used" in ends(capsys, 65, words(place, "--threads 1", data=str(tmp_path / "torn")))
    assert not Path("features.parquet").exists()
