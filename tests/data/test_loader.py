"""The sequence of images: each once per epoch, the same for any number of processes, micro-batches and workers."""

import signal
import time
from itertools import chain
from multiprocessing import Process

import numpy as np
import psutil
import pytest
import torch
from started import within

from sslvit import rng
from sslvit.data.labels import Labels
from sslvit.data.loader import EpochSampler, epoch_order, load, sample_ids
from sslvit.data.source import ArraySource
from sslvit.data.waiting import WorkerDied, fetch
from sslvit.views.pretraining import ContrastivePair, CropFlip


def numbered(size: int) -> ArraySource:
    """A source whose image i is filled with i, labelled i."""
    pixels = np.arange(size, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), np.uint8)
    return ArraySource(
        pixels, name="numbered", fingerprint=f"numbered:{size}", labels=Labels(np.arange(size), None, "")
    )


def of_many_sizes(size: int) -> ArraySource:
    """A source of noise, whose images fill different parts of their canvas."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, 3, 12, 12), dtype=np.uint8)
    source = ArraySource(pixels, name="sizes", fingerprint=f"sizes:{size}")
    source.read = lambda ids, read=source.read: read(ids)._replace(
        extents=torch.from_numpy(np.stack([4 + ids % 9, 12 - ids % 7], 1))
    )
    return source


def rows(source, processes=1, accumulation=1, batch_size=8, seed=5) -> list[EpochSampler]:
    options = {"batch_size": batch_size, "accumulation": accumulation, "processes": processes, "seed": seed}
    return [EpochSampler(source, rank=rank, **options) for rank in range(processes)]


@pytest.mark.parametrize("size", [1, 3, 8, 20, 37])
def test_every_epoch_shows_every_image_once(size):
    ids, epochs = sample_ids(0, size, 0, 3 * size)
    for epoch in range(3):
        assert torch.equal(ids[epochs == epoch].sort().values, torch.arange(size))
        assert torch.equal(ids[epochs == epoch], epoch_order(0, epoch, size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [epoch_order(seed, epoch, 50) for seed in range(3) for epoch in range(3)]
    assert len(torch.stack(orders).unique(dim=0)) == 9


def test_the_row_can_be_entered_anywhere():
    whole, _ = sample_ids(3, 10, 0, 45)
    for start in range(0, 45, 7):
        assert torch.equal(sample_ids(3, 10, start, 45)[0], whole[start:])


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1), (1, 8)])
def test_processes_and_parts_share_the_same_global_batch(processes, accumulation):
    source = numbered(20)
    whole = [rows(source)[0][step] for step in range(6)]
    split = rows(source, processes, accumulation)
    for step, expected in enumerate(whole):
        parts = [r[step * accumulation + part] for r in split for part in range(accumulation)]
        for field in ("pixels", "extents", "ids", "labels"):
            assert torch.equal(torch.cat([getattr(p.samples, field) for p in parts]), getattr(expected.samples, field))
        assert torch.equal(torch.cat([p.view_key for p in parts]), expected.view_key)
        assert torch.equal(torch.cat([p.slot_key for p in parts]), expected.slot_key)


@pytest.mark.parametrize("size_of_world", [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16, 20, 24, 32, 64, 128])
def test_sample_ids_agree_for_world_sizes_up_to_128(size_of_world):
    source, batch = numbered(1500), 1920
    expected = sample_ids(5, 1500, batch, 2 * batch)[0]
    got = torch.cat([r[1].samples.ids for r in rows(source, size_of_world, batch_size=batch)])
    assert torch.equal(got, expected)


@pytest.mark.processes
def test_workers_change_nothing():
    source = numbered(20)
    expected = list(load(rows(source)[0], first_step=1, steps=7, workers=0, timeout=0, pin=False))
    assert len(expected) == 6
    for workers in (1, 2):
        got = list(load(rows(source)[0], first_step=1, steps=7, workers=workers, timeout=30, pin=False))
        for a, b in zip(chain(*(one[:3] for one in expected)), chain(*(one[:3] for one in got)), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor))


@pytest.mark.processes
@within(2)
def test_a_dead_worker_is_noticed_even_if_its_signal_was_not_heard(limit):
    source = numbered(20)
    source.read = lambda ids, read=source.read: time.sleep(0.5) or read(ids)  # nothing it has read is on its way
    others = set(psutil.Process().children())
    loaded = load(rows(source)[0], first_step=0, steps=100, workers=1, timeout=60, pin=False)
    next(loaded)
    (worker,) = set(psutil.Process().children()) - others
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        worker.kill()
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            list(loaded)
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert time.monotonic() - began < limit


@pytest.mark.processes
def test_slow_images_are_waited_for_as_long_as_was_asked():
    source = numbered(20)
    source.read = lambda ids, read=source.read: time.sleep(1.4) or read(ids)
    options = {"first_step": 0, "steps": 2, "workers": 1, "pin": False}
    assert len(list(load(rows(source)[0], timeout=30, **options))) == 2
    with pytest.raises(RuntimeError, match=r"timed out after 0\.5 seconds"):
        list(load(rows(source)[0], timeout=0.5, **options))


@pytest.mark.processes
@pytest.mark.parametrize("source", [numbered(20), of_many_sizes(20)], ids=["of one size", "of many sizes"])
def test_views_made_by_workers_are_those_made_of_their_images(source):
    view = ContrastivePair(8)
    options = {"first_step": 1, "steps": 4, "timeout": 30, "pin": False}
    for plain, made in zip(
        load(rows(source)[0], workers=0, **options),
        load(rows(source)[0], workers=2, views=view, **options),
        strict=True,
    ):
        expected = view(plain.samples.pixels, plain.view_key, plain.samples.extents)
        assert made.samples.pixels.numel() == 0
        assert torch.equal(made.samples.ids, plain.samples.ids)
        for one, other in zip(expected, made.views, strict=True):
            assert torch.equal(one, other)


def test_views_of_one_process_are_those_of_two():
    source, view = numbered(20), ContrastivePair(8)
    one, two = (
        torch.cat([view(part[2].samples.pixels, part[2].view_key)[1] for part in rows(source, processes)])
        for processes in (1, 2)
    )
    assert torch.equal(one, two)


def test_view_keys_belong_to_the_sample_and_slot_keys_to_the_place():
    loaded = rows(numbered(20))[0][1]
    ids, epochs = sample_ids(5, 20, 8, 16)
    assert torch.equal(loaded.view_key, rng.key(5, "views", epochs, ids))
    assert torch.equal(loaded.slot_key, rng.key(5, "forward", 1, torch.arange(8)))
    assert torch.equal(loaded.samples.labels, ids)


def test_no_two_of_20000_views_share_a_draw_whoever_reads_them():
    """96 images, 105 epochs, two views, two processes. With seeded workers, ranks draw the same."""
    extents, draws = torch.full((8, 2), 100_000), {}
    for process, mine in enumerate(rows(numbered(96), processes=2, batch_size=16)):
        for item in range(96 * 105 // 16):
            loaded = mine[item]
            epochs = (16 * item + 8 * process + torch.arange(8)) // 96
            for view in range(2):
                crop = CropFlip(32).draw(rng.fold(loaded.view_key, "view", view), extents)
                drawn = torch.stack([field.double() for field in crop], 1).tolist()
                for epoch, id, one in zip(epochs.tolist(), loaded.samples.ids.tolist(), drawn, strict=True):
                    draws[epoch, id, view] = tuple(one)
    assert len(draws) == 96 * 105 * 2 > 20_000
    assert len(set(draws.values())) == len(draws)


def ids_of(parts: list[EpochSampler], steps: int) -> list[list[int]]:
    """The images of each global batch."""
    return [[id for part in parts for id in part[step].samples.ids.tolist()] for step in range(steps)]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("size", [8, 9, 15, 20, 31])
def test_whole_batches_hold_no_image_twice_and_leave_out_an_epochs_last_few(size, processes):
    """As the official loaders, which have drop_last=True: size // 8 batches an epoch, of its own random order."""
    parts = rows(numbered(size), processes)
    for part in parts:
        part.only_whole_batches()
    epochs, each = 5, size // 8
    batches = ids_of(parts, epochs * each)
    assert all(len(set(batch)) == 8 for batch in batches)
    for epoch in range(epochs):
        shown = [id for batch in batches[epoch * each : (epoch + 1) * each] for id in batch]
        assert shown == epoch_order(5, epoch, size)[: 8 * each].tolist()
        assert len(set(shown)) == 8 * each
    assert parts[0].epoch_images == 8 * each


def test_without_whole_batches_the_endless_sequence_repeats_images_within_a_batch():
    assert any(len(set(batch)) < 8 for batch in ids_of(rows(numbered(20)), 50))


@pytest.mark.parametrize(("size", "processes", "way_out"), [(7, 1, "--batch_size 7"), (5, 2, "--batch_size 4")])
def test_fewer_images_than_a_whole_batch_are_refused_with_a_batch_size_that_fits(size, processes, way_out):
    with pytest.raises(ValueError, match=f"--batch_size 8: {size} images.*{way_out}"):
        rows(numbered(size), processes)[0].only_whole_batches()


def test_a_batch_that_does_not_split_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="--batch_size 8 must be divisible by 3 processes x 1"):
        rows(numbered(9), processes=3)


def test_fewer_images_than_a_batch_wrap_into_the_next_epochs():
    loaded = rows(numbered(3))[0][0]
    assert torch.equal(loaded.samples.ids[:3].sort().values, torch.arange(3))
    assert len(loaded.samples.ids) == 8


@pytest.mark.slow
def test_five_epochs_of_60000_images_leave_the_memory_as_the_first_did():
    pixels = np.random.default_rng(0).integers(0, 256, (60_000, 1, 28, 28), np.uint8)
    source = ArraySource(pixels, name="noise", fingerprint="noise")
    (mine,), view = rows(source, batch_size=500), CropFlip(28)
    memory = []
    for epoch in range(5):
        for loaded in load(mine, first_step=120 * epoch, steps=120 * (epoch + 1), workers=0, timeout=0, pin=False):
            view(loaded.samples.pixels, loaded.view_key)
        memory.append(psutil.Process().memory_info().rss)
    assert max(memory[1:]) < 1.1 * memory[0]


@pytest.mark.parametrize(
    "torn", [ConnectionResetError("Connection reset by peer"), EOFError(), RuntimeError("received 0 items of ancdata")]
)
def test_a_batch_that_breaks_off_because_its_worker_was_killed_is_that_workers_death(torn):
    """Torch says it only where the worker's end has reached it before the broken message has."""
    worker = Process(target=time.sleep, args=(60,))
    worker.start()

    def loaded():
        yield 1
        worker.kill()
        raise torn

    result = fetch(loaded(), 2, [worker], timeout=30)
    assert next(result) == 1
    with pytest.raises(WorkerDied, match=rf"^DataLoader worker \(pid {worker.pid}\) ended"):
        next(result)


def test_an_error_of_reading_is_itself_while_all_workers_live():
    worker = Process(target=time.sleep, args=(60,))
    worker.start()

    def loaded():
        yield 1
        raise PermissionError("no entry")

    with pytest.raises(PermissionError, match="no entry"):
        list(fetch(loaded(), 2, [worker], timeout=30))
