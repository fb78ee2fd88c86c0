import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_zoo import png

from sslvit import rng
from sslvit.data.loader import Loaded
from sslvit.data.stream import SHARD, Stream
from sslvit.data.stream_order import Position, StreamSampler
from sslvit.errors import DataError, NoInput

datasets = pytest.importorskip("datasets")
ROWS = 40


@pytest.fixture
def parquet(tmp_path, monkeypatch) -> str:
    """Four files of ten rows; the image of row i has the value i, its label is i."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    for shard in range(4):
        write(tmp_path / f"train-{shard}.parquet", range(10 * shard, 10 * shard + 10))
    return f"parquet:{tmp_path}/*.parquet"


def cell(value: int) -> dict:
    return {"bytes": png(np.full((6, 7, 3), value, np.uint8), 8, 2), "path": None}


def write(file, values, cells=None) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": cells or [cell(value) for value in values], "label": list(values)}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)


def sampler(spec: str, part: int = 4, *, processes: int = 1, accumulation: int = 1, rank: int = 0, seed: int = 0):
    source = Stream(spec, epoch_images=ROWS, canvas=8)
    share = {"batch_size": part * processes * accumulation, "accumulation": accumulation, "processes": processes}
    return StreamSampler(source, **share, rank=rank, seed=seed)


def take(sampler: StreamSampler, items: int, first: int = 0) -> list[tuple[Loaded, Position]]:
    return [(sampler[item], sampler.position) for item in range(first, first + items)]


def labels(taken) -> list[int]:
    return [label for loaded, _ in taken for label in loaded.samples.labels.tolist()]


def test_images_labels_and_ids_belong_together(parquet):
    for (samples, *_), _ in take(sampler(parquet, seed=1), 12):
        assert samples.ids.tolist() == [label // 10 * SHARD + label % 10 for label in samples.labels.tolist()]
        assert samples.pixels.shape == (4, 3, 8, 8)
        assert samples.pixels[:, 0, 0, 0].tolist() == samples.labels.tolist()
        assert (samples.extents == torch.tensor([6, 7])).all()
        assert samples.pixels[:, :, 6:].sum() == 0


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5])
def test_the_processes_show_every_row_of_an_epoch_once(parquet, processes):
    shown = {0: [], 1: []}
    for rank in range(processes):
        taken = take(sampler(parquet, 1, rank=rank, processes=processes), 2 * ROWS)
        for epoch, rows in shown.items():
            rows += labels([(loaded, position) for loaded, position in taken if position.epoch == epoch])
    assert sorted(shown[0]) == sorted(shown[1]) == list(range(ROWS))


def test_the_order_depends_on_seed_and_epoch(parquet):
    two = labels(take(sampler(parquet, seed=1), 20))
    assert sorted(two[:ROWS]) == sorted(two[ROWS:]) == list(range(ROWS))
    assert two[:ROWS] != two[ROWS:]
    assert two == labels(take(sampler(parquet, seed=1), 20))
    assert two != labels(take(sampler(parquet, seed=2), 20))


def test_view_keys_belong_to_epoch_and_sample_for_any_number_of_processes(parquet):
    shown = {}
    for processes in (1, 2, 3):
        for rank in range(processes):
            for (samples, key, *_), position in take(
                sampler(parquet, 1, rank=rank, processes=processes, seed=7), 2 * ROWS
            ):
                if position.epoch < 2:
                    shown.setdefault((position.epoch, int(samples.ids)), set()).add(int(key))
                    assert torch.equal(key, rng.key(7, "views", torch.tensor([position.epoch]), samples.ids))
    assert len(shown) == 2 * ROWS
    assert all(len(keys) == 1 for keys in shown.values())


def test_an_item_across_two_epochs_has_the_view_keys_of_both(parquet):
    (samples, key, *_), _ = take(sampler(parquet, 16), 3)[2]
    epochs = torch.tensor([0] * 8 + [1] * 8)
    assert torch.equal(key, rng.key(0, "views", epochs, samples.ids))


def test_slot_keys_number_the_global_batch_as_those_of_a_source_do(parquet):
    for step in range(2):
        for rank in range(2):
            micro_batches = sampler(parquet, 4, rank=rank, processes=2, accumulation=3, seed=5)
            slots = torch.cat([loaded.slot_key for loaded, _ in take(micro_batches, 6)][3 * step : 3 * step + 3])
            assert torch.equal(slots, rng.key(5, "forward", step, torch.arange(12 * rank, 12 * rank + 12)))


def test_looking_at_the_first_batch_takes_nothing_from_it(parquet):
    looked_at, other = sampler(parquet), sampler(parquet)
    first = looked_at.first(64)
    one, two = take(looked_at, 12), take(other, 12)
    assert torch.equal(first.pixels, one[0][0].samples.pixels)
    assert labels(one) == labels(two)
    assert [position for _, position in one] == [position for _, position in two]


@pytest.mark.parametrize(("rank", "processes"), [(0, 1), pytest.param(1, 2, marks=pytest.mark.slow), (2, 3)])
def test_going_on_at_any_place_gives_the_same_batches(parquet, rank, processes):
    whole = take(sampler(parquet, 3, rank=rank, processes=processes, seed=4), 2 * ROWS // processes // 3 + 2)
    for item, (_, position) in enumerate(whole[:-1], 1):
        again = sampler(parquet, 3, rank=rank, processes=processes, seed=4)
        again.go_on_at([list(position) if other == rank else [9, 9] for other in range(processes)])
        rest = take(again, len(whole) - item, item)
        for (left, left_position), (right, right_position) in zip(whole[item:], rest, strict=True):
            assert torch.equal(left.samples.pixels, right.samples.pixels)
            assert torch.equal(left.samples.ids, right.samples.ids)
            assert torch.equal(left.view_key, right.view_key)
            assert torch.equal(left.slot_key, right.slot_key)
            assert left_position == right_position


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_whole_batches_hold_no_row_twice_over_all_processes_and_go_on_as_they_began(parquet, processes):
    """Also while one process is an epoch ahead: with three, their shares of the 40 rows differ in length."""
    taken = []
    for rank in range(processes):
        whole = sampler(parquet, 3, rank=rank, processes=processes, seed=4)
        whole.only_whole_batches()
        taken.append(take(whole, 60))
        again = sampler(parquet, 3, rank=rank, processes=processes, seed=4)
        again.only_whole_batches()
        again.go_on_at([list(taken[-1][16][1])] * processes)
        assert labels(take(again, 20, 17)) == labels(taken[-1][17:37])
    for batch in zip(*taken, strict=True):
        assert len(set(labels(batch))) == 3 * processes
    epochs = {loaded.view_key.tolist()[0]: position.epoch for part in taken for loaded, position in part}
    assert len(epochs) == 60 * processes  # no key of a view twice
    assert len({label for part in taken for label in labels(part)}) == ROWS  # what is left out is not always the same


def test_a_stream_that_never_fills_a_whole_batch_says_so(parquet):
    whole = sampler(parquet, 41)
    whole.only_whole_batches()
    with pytest.raises(DataError, match=r"40 rows.*41.*smaller --batch_size"):
        take(whole, 1)


def test_another_number_of_processes_cannot_go_on(parquet):
    with pytest.raises(DataError, match=r"2 processes were reading it, 3 would read other rows.*: use 2 processes"):
        sampler(parquet, processes=3).go_on_at([[0, 8], [0, 8]])


def test_bad_rows_are_replaced_by_the_next_good_one(tmp_path, parquet, monkeypatch):
    monkeypatch.setattr("sslvit.data.stream_order.SHUFFLED", 1)
    broken, elsewhere = {"bytes": b"no image", "path": None}, {"bytes": None, "path": "/etc/passwd"}
    cells = [cell(0), broken, None, cell(3), elsewhere, cell(5)]
    (tmp_path / "odd").mkdir()
    write(tmp_path / "odd/train.parquet", range(6), cells)
    (((samples, *_), position),) = take(sampler(f"parquet:{tmp_path}/odd", 3), 1)
    assert samples.labels.tolist() == [0, 3, 5]
    assert samples.ids.tolist() == [0, 3, 5]
    assert [(line.id, line.substitute) for line in samples.bad] == [(1, 3), (2, 3), (4, 5)]
    assert samples.bad[0].path == "shard 0, row 1"
    assert "outside the data's own folder" in samples.bad[2].reason
    assert position == (0, 6)


def test_a_set_without_one_good_image_stops(tmp_path, parquet):
    (tmp_path / "odd").mkdir()
    write(tmp_path / "odd/train.parquet", range(3), [{"bytes": b"no", "path": None}] * 3)
    with pytest.raises(DataError, match="1,001 rows in a row cannot be used"):
        take(sampler(f"parquet:{tmp_path}/odd"), 1)


def test_a_row_without_a_label_is_still_an_image(tmp_path, parquet):
    (tmp_path / "odd").mkdir()
    write(tmp_path / "odd/train.parquet", [7, None], [cell(7), cell(8)])
    (((samples, *_), _),) = take(sampler(f"parquet:{tmp_path}/odd", 2), 1)
    assert sorted(samples.labels.tolist()) == [-1, 7]


def test_files_that_are_no_parquet_stop_in_one_sentence(tmp_path, parquet):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/train.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match="odd cannot be read: "):
        sampler(f"parquet:{tmp_path}/odd")


def test_a_damaged_parquet_file_stops_a_stream_with_its_number(tmp_path, parquet):
    data = (tmp_path / "train-2.parquet").read_bytes()
    (tmp_path / "train-2.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"\*\.parquet \(train, streamed\): shard 2 cannot be read: "):
        take(sampler(parquet), 10)


def pack(file: Path, content: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path) -> str:
    """Two tars of five samples; the image and the label of sample i have the value i."""
    for shard in range(2):
        content = {}
        for value in range(5 * shard, 5 * shard + 5):
            content |= {f"{value}.cls": b"%d\n" % value, f"{value}.png": cell(value)["bytes"]}
        pack(tmp_path / f"{shard}.tar", content)
    return f"webdataset:{tmp_path}/*.tar"


def test_tars_are_streamed_too(tars):
    (((samples, *_), _),) = take(sampler(tars, 10, seed=3), 1)
    assert sorted(samples.labels.tolist()) == list(range(10))
    assert samples.pixels[:, 0, 0, 0].tolist() == samples.labels.tolist()
    assert samples.ids.tolist() == [label // 5 * SHARD + label % 5 for label in samples.labels.tolist()]


def test_going_on_in_tars_gives_the_same_batches(tars):
    whole = take(sampler(tars, 3, seed=4), 8)
    again = sampler(tars, 3, seed=4)
    again.go_on_at([list(whole[2][1])])
    assert labels(take(again, 5, 3)) == labels(whole[3:])


def test_of_a_tar_nothing_but_images_and_labels_is_read(tmp_path, capsys):
    broken = ("json", "txt.gz", "npy", "npz", "pkl", "pth", "mp4", "wav", "msgpack", "gz")
    content = {f"1.{ending}": b"\x1f\x8b\x08broken" for ending in broken}
    pack(tmp_path / "set.tar", {"1.png": cell(1)["bytes"]} | content | {"1.cls": b"7"})
    (((samples, *_), _),) = take(sampler(f"webdataset:{tmp_path}/set.tar", 1), 1)
    assert (samples.pixels[0, 0, 0, 0], samples.labels.tolist(), samples.bad) == (1, [7], ())
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert (
        f"not read, of what lies at the beginning of {tmp_path}/set.tar: 2 *.gz: 1.txt.gz; 1 *.json: 1.json" in message
    )


def test_no_more_of_a_member_is_read_than_an_image_may_have(tmp_path):
    with open(tmp_path / "set.tar", "wb") as file:
        for name, size in (("1.png", 1 << 33), ("2.png", len(cell(2)["bytes"]))):
            header = tarfile.TarInfo(name)
            header.size = size
            file.write(header.tobuf(tarfile.GNU_FORMAT))
            if name == "1.png":
                file.seek(size, os.SEEK_CUR)
        file.write(cell(2)["bytes"] + bytes(-size % 512 + 1024))
    (((samples, *_), _),) = take(sampler(f"webdataset:{tmp_path}/set.tar", 1, seed=1), 1)
    assert samples.pixels[0, 0, 0, 0] == 2
    (((samples, *_), _),) = take(sampler(f"webdataset:{tmp_path}/set.tar", 2, seed=1), 1)
    assert {line.reason for line in samples.bad} == {"8,589,934,592 bytes > limit 256,000,000"}


def test_a_damaged_tar_stops_a_stream_with_the_file_and_the_place(tmp_path, tars):
    data = (tmp_path / "1.tar").read_bytes()
    for end in (0, 100, 512 * 3, len(data) // 2 - 100):
        (tmp_path / "1.tar").write_bytes(data[:end])
        with pytest.raises(DataError, match=rf"1\.tar is damaged at byte {end:,}, where it ends"):
            sampler(tars)
    changed = bytearray(data)
    changed[512 * 8 + 3] ^= 1
    (tmp_path / "1.tar").write_bytes(changed)
    with pytest.raises(DataError, match=r"1\.tar is damaged at byte 4,096, which is not a member"):
        take(sampler(tars, 10), 1)


def test_a_stream_of_tars_names_what_it_lacks_when_opened(tmp_path):
    pack(tmp_path / "text.tar", {"1.txt": b"a dog"})
    with pytest.raises(NoInput, match=r"no images in .*text\.tar, the first of 1 tar files: found 1 \*\.txt: 1\.txt"):
        sampler(f"webdataset:{tmp_path}/text.tar")
    pack(tmp_path / "two.tar", {"1.left.png": cell(1)["bytes"], "1.right.png": cell(2)["bytes"], "1.cls": b"dog"})
    with pytest.raises(ValueError, match=r"has several images, left.png and right.png: choose one with --image_column"):
        sampler(f"webdataset:{tmp_path}/two.tar")
    chosen = Stream(f"webdataset:{tmp_path}/two.tar", epoch_images=1, canvas=8, image_column="right.png")
    share = {"batch_size": 1, "accumulation": 1, "processes": 1, "rank": 0, "seed": 0}
    (((samples, *_), _),) = take(StreamSampler(chosen, **share), 1)
    assert (samples.pixels[0, 0, 0, 0], samples.labels) == (2, None)
    with pytest.raises(ValueError, match=r"--label_column txt: in tars a label is the member \.cls of its sample"):
        Stream(f"webdataset:{tmp_path}/two.tar", epoch_images=1, canvas=8, label_column="txt")


def test_what_cannot_be_streamed_says_so(tmp_path):
    with pytest.raises(ValueError, match="'folder:/x' cannot be streamed: hf:, parquet: and webdataset: can"):
        Stream("folder:/x", canvas=8, epoch_images=1)
