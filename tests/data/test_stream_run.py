"""Runs on streams: exact restarts, every row once, bad rows named, and refusals in one sentence."""

import json
import sys
from pathlib import Path

import numpy as np
import preloaded
import pytest
import torch
from image_zoo import png
from PIL import Image
from stream_run import DEFAULTS, PASS, Views, objective, stream_run
from tiny_run import fingerprint, losses

from sslvit import rng
from sslvit.config import DataConfig, TrainConfig
from sslvit.data.source import Unreadable
from sslvit.data.spec import open_source
from sslvit.data.stream import SHARD, Stream
from sslvit.data.stream_order import StreamSampler
from sslvit.data.unreadable import UnreadableImages
from sslvit.errors import DataError
from sslvit.evaluate.monitor import monitor_of
from sslvit.processes.collectives import start
from sslvit.storage import checkpoint
from sslvit.train import pretrain

datasets = pytest.importorskip("datasets")
SHARDS, EACH = 3, 8  # 24 rows: the second pass of 32 images begins in the middle of the stream's second epoch


def write(folder: Path, bad: tuple[int, ...] = ()) -> str:
    """Three files of eight pictures of noise."""
    folder.mkdir(exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    noise = np.random.default_rng(0).integers(0, 256, (SHARDS * EACH, 32, 32, 3), np.uint8)
    cells = [{"bytes": b"no image" if i in bad else png(pixels, 8, 2), "path": None} for i, pixels in enumerate(noise)]
    for shard in range(SHARDS):
        rows = slice(shard * EACH, shard * EACH + EACH)
        table = datasets.Dataset.from_dict({"image": cells[rows], "label": [0] * EACH}, features=features)
        table.to_parquet(folder / f"train-{shard}.parquet")
    return f"parquet:{folder}/*.parquet"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, spec) -> tuple[Path, torch.Tensor]:
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, stream_run(start(threads=1), spec, out)


def keys_of_epoch(epoch: int) -> list[int]:
    ids = torch.tensor([shard * SHARD + row for shard in range(SHARDS) for row in range(EACH)])
    return rng.key(0, "views", torch.tensor(epoch), ids).tolist()


def test_a_pass_has_epoch_images_and_the_log_counts_it(whole):
    out, keys = whole
    assert len(keys) == 4 * PASS
    assert [line["epoch"] for line in losses(out)] == [(step + 1) / 4 for step in range(16)]
    assert json.loads((out / "environment.json").read_text())["images"] == PASS


def test_one_process_shows_every_row_of_every_epoch_once(whole):
    _, keys = whole
    rows = SHARDS * EACH
    for epoch in range(len(keys) // rows):
        assert sorted(keys[epoch * rows : epoch * rows + rows].tolist()) == sorted(keys_of_epoch(epoch))


def test_a_stream_says_what_it_is_and_shows_its_first_batch(whole, spec):
    out, _ = whole
    assert "unknown size, 32 images count as one pass" in (out / "data.txt").read_text()
    with Image.open(out / "first_batch.png") as sheet:
        assert sheet.size == (8 * 66, 66)


@pytest.mark.parametrize("stop_at", [1, 7])  # in the first epoch of the stream, and in its third
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, spec, whole, stop_at):
    out, keys = whole
    before = stream_run(start(threads=1), spec, tmp_path / "run", stop_at=stop_at)
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints").state["progress"]
    assert saved["step"] == stop_at
    assert saved["stream_positions"] == [list(divmod(8 * stop_at, SHARDS * EACH))]
    after = stream_run(start(threads=1), spec, tmp_path / "run", resume=True)
    assert torch.equal(torch.cat([before, after]), keys)
    assert fingerprint(tmp_path / "run") == fingerprint(out)


@pytest.mark.processes
def test_two_processes_share_each_epoch_go_on_bit_for_bit_and_cannot_be_one(tmp_path, spec):
    script = [sys.executable, str(Path(__file__).parents[1] / "support" / "stream_run.py"), spec, str(tmp_path)]
    for done in preloaded.run_ranks(script):
        assert done.returncode == 0, done.stderr
    keys, rest = ([torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)] for name in ("keys", "rest"))
    for epoch in range(5):  # 128 images are five epochs of 24 and a part
        shown = sorted(key for mine in keys for key in mine.tolist() if key in set(keys_of_epoch(epoch)))
        assert shown == sorted(keys_of_epoch(epoch))
    assert all(
        torch.equal(later, mine[-len(later) :]) and len(later) == 40 for later, mine in zip(rest, keys, strict=True)
    )
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")
    saved = checkpoint.latest(tmp_path / "stopped" / "checkpoints").state["progress"]
    assert saved["stream_positions"] == [[5, 4], [5, 4]]
    with pytest.raises(DataError, match="2 processes were reading it, 1 would read other rows"):
        stream_run(start(threads=1), spec, tmp_path / "stopped", resume=True)


def test_bad_rows_are_named_once_and_replaced(tmp_path):
    spec = write(tmp_path / "set", bad=(3, 20))
    keys = stream_run(start(threads=1), spec, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()]
    assert sorted((line["id"], line["path"]) for line in lines) == [
        (3, "shard 0, row 3"),
        (2 * SHARD + 4, "shard 2, row 4"),
    ]
    assert "not" in lines[0]["reason"]
    assert len(keys) == 4 * PASS


def test_too_many_bad_rows_stop_the_run(tmp_path):
    spec = write(tmp_path / "set", bad=tuple(range(18)))
    with pytest.raises(DataError, match=r"18 of \d+ images read cannot be used"):
        stream_run(start(threads=1), spec, tmp_path / "run")


def test_bad_rows_of_a_stream_longer_than_a_pass_are_a_share_of_all_that_was_read(tmp_path, spec):
    sampler = StreamSampler(
        Stream(spec, epoch_images=PASS, canvas=8), batch_size=1, accumulation=1, rank=0, processes=1, seed=0
    )
    unusable = UnreadableImages(tmp_path / "bad_images.jsonl", size=sampler.different)
    unusable.add(Unreadable(id, f"shard 0, row {id}", "broken", 0) for id in range(100))
    assert not unusable.too_many(100 * PASS * 10)
    assert "100 of 3,200 images read cannot be used" in unusable.too_many(100 * PASS)


def test_the_recipes_configuration_opens_a_stream_with_room_for_views(spec):
    stream = DataConfig(data=f"stream:{spec}", epoch_images=7, image_size=32).open()
    assert isinstance(stream, Stream)
    assert (len(stream), stream.channels, stream.canvas) == (7, 3, (96, 96))


def test_nothing_is_evaluated_without_eval_data(spec, capsys):
    config = DataConfig(data=f"stream:{spec}", epoch_images=7, image_size=32)
    assert monitor_of(config, config.open(), start(threads=1)) is None
    assert "--eval_data may name some" in capsys.readouterr().out
    config = DataConfig(data=f"stream:{spec}", epoch_images=7, image_size=32, eval_data="shapes:n=40")
    assert monitor_of(config, config.open(), start(threads=1)) is not None


def test_what_a_stream_cannot_do_is_one_sentence(tmp_path, spec):
    with pytest.raises(ValueError, match="--epoch_images is 0; a stream needs"):
        DataConfig(data=f"stream:{spec}").open()
    with pytest.raises(ValueError, match="--epoch_images is for streams: a pass over shapes is all its images"):
        DataConfig(epoch_images=5).open()
    with pytest.raises(ValueError, match="streams are for pretraining only"):
        open_source(f"stream:{spec}", image_size=32)
    with pytest.raises(DataError, match="no usable labels: those of a stream are known only as it is read"):
        Stream(spec, epoch_images=1, canvas=8).required_labels()
    config = TrainConfig(out=tmp_path / "run", **(DEFAULTS | {"workers": 2}))
    with pytest.raises(ValueError, match="--workers 2: a stream is decoded by threads of its own"):
        pretrain(objective(), Stream(spec, epoch_images=PASS, canvas=64), Views(), config, start(threads=1))
    assert not (tmp_path / "run").exists()
