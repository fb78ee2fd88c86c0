"""Workers with little shared memory, as in a container: the same run by another way, and a sentence about it."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from started import SCRIPT, draw_images, with_shared_memory
from tiny_run import fingerprint, source

from sslvit.data import shared
from sslvit.data.loader import EpochSampler, bytes_of, load
from sslvit.data.source import Unreadable
from sslvit.views.pretraining import ContrastivePair, CropFlip

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


def run(images: Path, out: Path, size: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment
    program = f"import runpy; sys.path.insert(0, {str(Path(SCRIPT).parent)!r})\n"
    program += f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
    return with_shared_memory(size, program, str(images), str(out), "workers=2", *words, env=env)


def test_a_run_with_too_little_shared_memory_warns_first_and_is_the_same(images, tmp_path):
    small, large = (run(images, tmp_path / size, size) for size in ("1m", "64m"))
    assert (small.returncode, large.returncode) == (0, 0), small.stderr
    # 8 images of 3 x 32 x 32 float32: 98,304 bytes, and 65,536 for small tensors, ten times.
    warning = "/dev/shm has 1.0 MB free, and 2 workers with 4 batches of 0.1 MB need 1.6 MB: batches are copied through"
    assert small.stderr.index(warning) < small.stderr.index("training:")
    assert "/dev/shm" not in large.stderr
    assert fingerprint(tmp_path / "1m") == fingerprint(tmp_path / "64m")


def test_shared_memory_that_something_else_fills_later_ends_the_run_in_a_sentence(images, tmp_path):
    done = run(images, tmp_path / "run", "4m", "epochs=100", FILL_SHARED="1")
    assert done.returncode == 70, done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert sentence.startswith("error: a worker that reads images found no room in shared memory (/dev/shm, ")
    assert "fewer --workers need less. The same command with --resume continues" in sentence
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("views", [None, ContrastivePair(16)])
def test_what_comes_through_a_pipe_is_what_was_sent(monkeypatch, views):
    options = {"first_step": 0, "steps": 3, "workers": 1, "timeout": 60, "pin": False, "views": views}
    sampler = EpochSampler(source(), batch_size=8, accumulation=1, rank=0, processes=1, seed=0)
    plain = list(load(sampler, **options))
    assert not sampler.piped
    monkeypatch.setattr(shared, "room", lambda: 0)
    piped = list(load(sampler, **options))
    assert sampler.piped
    for one, other in zip(plain, piped, strict=True):
        assert torch.equal(one.samples.ids, other.samples.ids)
        assert torch.equal(one.samples.pixels, other.samples.pixels)
        assert torch.equal(one.slot_key, other.slot_key)
        assert (one.views is None) == (other.views is None) == (views is None)
        assert all(torch.equal(a, b) for a, b in zip(one.views or (), other.views or (), strict=True))


def test_batches_that_are_read_ahead_take_pipes_where_there_is_no_room(monkeypatch):
    batches, read = [np.arange(3), np.arange(3, 7)], source().read
    plain = list(shared.read_ahead(batches, read, 1 << 20, 1))
    monkeypatch.setattr(shared, "room", lambda: 0)
    came, unpack = [], shared.out_of_pipe
    monkeypatch.setattr(shared, "out_of_pipe", lambda value: came.append(value) or unpack(value))
    piped = list(shared.read_ahead(batches, read, 1 << 20, 1))
    assert sum(isinstance(value, shared.Piped) for value in came) >= 2 * len(batches)  # pixels and ids of each
    for found in (plain, piped):
        for samples, ids in zip(found, batches, strict=True):
            assert samples.ids.tolist() == ids.tolist()
            assert torch.equal(samples.pixels, read(ids).pixels)


def test_only_tensors_change_in_a_pipe():
    bad = (Unreadable(3, "a.png", "broken", 4),)
    value = (torch.arange(3), None, bad, 5)
    there = shared.into_pipe(value)
    assert isinstance(there[0].array, np.ndarray)
    back = shared.out_of_pipe(there)
    assert torch.equal(back[0], value[0])
    assert back[1:] == (None, bad, 5)
    assert type(back[2][0]) is Unreadable


def test_bytes_of_a_batch_are_those_of_its_pixels_or_of_its_views():
    sampler = EpochSampler(
        source(), batch_size=8, accumulation=2, rank=0, processes=1, seed=0
    )  # parts of 4 images, 3 x 32 x 32
    assert bytes_of(sampler, None) == 4 * 3 * 32 * 32
    assert bytes_of(sampler, CropFlip(16)) == 4 * 3 * 16 * 16 * 4
    assert bytes_of(sampler, ContrastivePair(16)) == 2 * 4 * 3 * 16 * 16 * 4
