import json
import multiprocessing
import re

import numpy as np
import pytest

from sslvit.data.source import Unreadable
from sslvit.data.unreadable import UnreadableImages


def bad(*ids: int) -> tuple[Unreadable, ...]:
    return tuple(Unreadable(id, f"/set/{id}\n.png", "empty file", id + 1) for id in ids)


def test_each_bad_image_is_one_line_however_often_it_is_met(tmp_path):
    images = UnreadableImages(tmp_path / "bad_images.jsonl", size=1000)
    assert len(images) == 0
    for _ in range(3):
        images.add(bad(5, 7, 5))
        images.add(())
    images.add(bad(7, 9))
    lines = [json.loads(line) for line in (tmp_path / "bad_images.jsonl").read_text().splitlines()]
    assert lines == [
        {"id": id, "path": f"/set/{id}\n.png", "reason": "empty file", "substitute": id + 1} for id in (5, 7, 9)
    ]
    assert len(images) == 3


def test_a_run_without_bad_images_writes_no_file(tmp_path):
    images = UnreadableImages(tmp_path / "bad_images.jsonl", size=1000)
    images.add(())
    assert not images.too_many(1000)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_goes_on_with_its_log(tmp_path):
    file = tmp_path / "bad_images.jsonl"
    UnreadableImages(file, size=1000).add(bad(1, 2))
    with file.open("a") as stream:
        stream.write('{"id": 3, "pa')  # what a kill leaves
    again = UnreadableImages(file, size=1000)
    assert len(again) == 2
    again.add(bad(2, 4))
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == [1, 2, 4]


def test_bad_images_of_lost_steps_do_not_stop_a_run_that_goes_on(tmp_path):
    """Killed after 38,400 images without a checkpoint: 115 bad ones are in the file, more than 256 images may have."""
    file = tmp_path / "bad_images.jsonl"
    UnreadableImages(file, size=300_000).add(bad(*range(115)))
    again = UnreadableImages(file, size=300_000)
    assert not again.too_many(256)
    again.add(bad(*range(1000, 1012)))
    assert not again.too_many(256)
    again.add(bad(*range(2000, 2100)))
    assert again.too_many(256).startswith("112 of 256 images read")
    later = UnreadableImages(file, size=300_000, before=25_600)
    assert not later.too_many(25_600 + 256)
    later.add(bad(*range(3000, 3050)))
    assert later.too_many(25_600 + 256).startswith("50 of 256 images read")
    later.add(bad(*range(3050, 6000)))  # more than a hundredth of all, in however many parts
    assert UnreadableImages(file, size=300_000).too_many(256).startswith("3,227 of 300,000 images")


def _add(file, first: int) -> None:
    images = UnreadableImages(file, size=100_000)
    for number in range(0, 200, 2):
        images.add(bad(first + number, 5000 + number))


@pytest.mark.processes
def test_processes_share_one_log_and_count_each_other(tmp_path):
    file = tmp_path / "bad_images.jsonl"
    watcher = UnreadableImages(file, size=100_000)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add, args=(file, 1000 * rank)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    ids = [json.loads(line)["id"] for line in file.read_text().splitlines()]
    assert len(ids) == len(set(ids)) == len(watcher) == 400


def filled(tmp_path, count: int, size: int, **options) -> UnreadableImages:
    images = UnreadableImages(tmp_path / "bad.jsonl", size=size, **options)
    images.add(bad(*range(count)))
    return images


def test_one_percent_is_tolerated_and_more_stops_with_advice(tmp_path):
    images = filled(tmp_path, 100, 10_000)
    assert not images.too_many(10_000)
    images.add(bad(200))
    sentence = r"101 of 10,000 images read cannot be used.*bad\.jsonl.*empty file.*--max_bad"
    assert re.match(sentence, images.too_many(10_000))
    assert re.match(sentence, images.too_many(25_000))  # later epochs read the same images


@pytest.mark.parametrize(
    ("size", "max_bad", "borne"),
    [
        *((20, 0.01, 2), (72, 0.01, 8), (100, 0.01, 8), (1000, 0.01, 10), (100_000, 0.01, 1000)),
        *((20, 0.001, 0), (100, 0.05, 12), (100, 0.5, 50), (1000, 0.001, 1), (100, 1, 100), (100, 0, 0)),
    ],
)
def test_this_many_bad_images_are_tolerated_and_one_more_stops(tmp_path, size, max_bad, borne):
    images = filled(tmp_path, borne, size, max_bad=max_bad)
    assert not images.too_many(size)
    assert not images.too_many(3 * size)
    images.add(bad(size))
    assert images.too_many(size).startswith(f"{borne + 1:,} of {size:,} images read cannot be used")


def test_a_set_of_twenty_with_sixteen_rotten_stops_within_its_first_epoch(tmp_path):
    assert filled(tmp_path, 16, 20).too_many(20)


@pytest.mark.parametrize("size", [20, 100, 1000, 100_000, float("inf")])
def test_a_set_at_the_tolerated_limit_never_stops_early_in_random_orders(tmp_path, size):
    few = int(min(size, 100_000))
    images = UnreadableImages(tmp_path / "bad.jsonl", size=size)
    rotten = np.arange(few) < int(images.share * few)
    for seed in range(100):
        met = np.random.default_rng(seed).permutation(rotten).cumsum()[7::8]  # after each batch of 8
        for read, count in enumerate(met.tolist(), 1):
            assert count <= images.tolerated(8 * read)


def test_a_rotten_set_stops_early_and_a_good_one_never_by_chance(tmp_path):
    half = filled(tmp_path, 60, 1_000_000)
    assert half.too_many(120)
    assert not half.too_many(6000)


def test_max_bad_zero_stops_at_the_first(tmp_path):
    assert filled(tmp_path, 1, 1000, max_bad=0).too_many(4).startswith("1 of 4 images")
    with pytest.raises(ValueError, match=r"--max_bad must be .* got 2"):
        UnreadableImages(tmp_path / "x", size=3, max_bad=2)


def test_a_full_disk_keeps_the_count_and_writes_later(tmp_path, caplog):
    result = UnreadableImages(tmp_path / "gone" / "bad.jsonl", size=1000)
    result.add([Unreadable(3, "a.png", "empty file", 4)])
    assert len(result) == 1
    assert "wait to be written" in caplog.text
    (tmp_path / "gone").mkdir()
    result.add([Unreadable(3, "a.png", "empty file", 4), Unreadable(7, "b.png", "empty file", 8)])
    assert len(result) == 2
    assert [json.loads(line)["id"] for line in result.file.read_text().splitlines()] == [3, 7]
