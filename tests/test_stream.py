import io
import tarfile

import numpy as np
import pytest
import torch
from image_zoo import png

from sslvit.data.stream import Place, Stream
from sslvit.errors import DataError

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


def take(stream: Stream, batches: int, batch_size: int = 4, place: Place | None = None):
    rows = stream.batches(batch_size, place)
    taken = [next(rows) for _ in range(batches)]
    rows.close()
    return taken


def labels(taken) -> list[int]:
    return [label for samples, _ in taken for label in samples.labels.tolist()]


def test_images_labels_and_ids_belong_together(parquet):
    for samples, _ in take(Stream(parquet, canvas=8, seed=1), 12):
        assert samples.pixels.shape == (4, 3, 8, 8)
        assert samples.pixels[:, 0, 0, 0].tolist() == samples.labels.tolist()
        assert (samples.extents == torch.tensor([6, 7])).all()
        assert samples.pixels[:, :, 6:].sum() == 0


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5])
def test_the_processes_show_every_row_of_an_epoch_once(parquet, processes):
    rows, ids = [], []
    for rank in range(processes):
        taken = take(Stream(parquet, canvas=8, rank=rank, processes=processes), ROWS, 1)
        first = [(samples, place) for samples, place in taken if place.epoch == 0]
        rows += labels(first)
        ids += [int(samples.ids) for samples, _ in first]
    assert sorted(rows) == list(range(ROWS))
    assert len(set(ids)) == ROWS


def test_the_order_depends_on_seed_and_epoch(parquet):
    two = labels(take(Stream(parquet, canvas=8, seed=1), 20))
    assert sorted(two[:ROWS]) == sorted(two[ROWS:]) == list(range(ROWS))
    assert two[:ROWS] != two[ROWS:]
    assert two == labels(take(Stream(parquet, canvas=8, seed=1), 20))
    assert two != labels(take(Stream(parquet, canvas=8, seed=2), 20))


@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (1, 2), (2, 3)])
def test_going_on_at_any_place_gives_the_same_batches(parquet, rank, processes):
    def stream() -> Stream:
        return Stream(parquet, canvas=8, rank=rank, processes=processes, seed=4)

    whole = take(stream(), 2 * ROWS // processes // 3 + 2, 3)
    for number, (_, place) in enumerate(whole[:-1]):
        place = Place(*place)  # as JSON gives it back
        rest = take(stream(), len(whole) - number - 1, 3, place)
        for (left, left_place), (right, right_place) in zip(whole[number + 1 :], rest, strict=True):
            assert torch.equal(left.pixels, right.pixels)
            assert torch.equal(left.ids, right.ids)
            assert left_place == right_place


def test_another_number_of_processes_cannot_go_on(parquet):
    with pytest.raises(DataError, match="saved by 2 processes, 3 read other rows: start 2, or begin another epoch"):
        take(Stream(parquet, canvas=8, rank=0, processes=3), 1, 4, Place(0, 8, 2))


def test_bad_rows_are_replaced_by_the_next_good_one(tmp_path, parquet, monkeypatch):
    monkeypatch.setattr("sslvit.data.stream.SHUFFLED", 1)
    broken, elsewhere = {"bytes": b"no image", "path": None}, {"bytes": None, "path": "/etc/passwd"}
    cells = [cell(0), broken, None, cell(3), elsewhere, cell(5)]
    (tmp_path / "odd").mkdir()
    write(tmp_path / "odd/train.parquet", range(6), cells)
    ((samples, place),) = take(Stream(f"parquet:{tmp_path}/odd", canvas=8), 1, 3)
    assert samples.labels.tolist() == [0, 3, 5]
    assert samples.ids.tolist() == [0, 3, 5]
    assert [(line.id, line.substitute) for line in samples.bad] == [(1, 3), (2, 3), (4, 5)]
    assert "outside the data's own folder" in samples.bad[2].reason
    assert place == (0, 6, 1)


def test_a_set_without_one_good_image_stops(tmp_path, parquet):
    (tmp_path / "odd").mkdir()
    write(tmp_path / "odd/train.parquet", range(3), [{"bytes": b"no", "path": None}] * 3)
    with pytest.raises(DataError, match="1,001 rows in a row cannot be used"):
        take(Stream(f"parquet:{tmp_path}/odd", canvas=8), 1)


def test_tars_are_streamed_too(tmp_path, parquet):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in range(5):
                value = 5 * shard + number
                for name, data in ((f"{value}.png", cell(value)["bytes"]), (f"{value}.cls", b"%d" % value)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    ((samples, _),) = take(Stream(f"webdataset:{tmp_path}/*.tar", canvas=8, seed=3), 1, 10)
    assert sorted(samples.labels.tolist()) == list(range(10))
    assert samples.pixels[:, 0, 0, 0].tolist() == samples.labels.tolist()


def test_what_cannot_be_streamed_says_so(tmp_path):
    with pytest.raises(ValueError, match="folder:/x cannot be streamed: hf:, parquet: and webdataset: can"):
        Stream("folder:/x", canvas=8)
