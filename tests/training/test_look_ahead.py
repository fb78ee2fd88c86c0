"""The loop as it runs on a GPU, which loads the next batch before a step is done, here on the CPU."""

import os
import signal

import numpy as np
import pytest
from tiny_run import DEFAULTS, STEPS, fingerprint, losses, objective, source, tiny_run

from sslvit import train
from sslvit.config import TrainConfig
from sslvit.data.source import ArraySource, Samples
from sslvit.errors import DataError, Preempted
from sslvit.processes.collectives import start
from sslvit.storage import checkpoint
from sslvit.train import pretrain
from sslvit.views.pretraining import CropFlip


@pytest.fixture
def ahead(monkeypatch):
    assemble = train.assemble
    monkeypatch.setattr(train, "assemble", lambda *given: assemble(*given)._replace(ahead=True))


class Broken(ArraySource):
    """Does something when images are read for the n-th time."""

    def __init__(self, at: int, what):
        whole = source()
        super().__init__(whole.pixels, name=whole.name, fingerprint=whole.fingerprint)
        self.labels, self.reads, self.at, self.what = whole.labels, 0, at, what

    def read(self, ids: np.ndarray) -> Samples:
        self.reads += 1
        if self.reads == self.at:
            self.what()
        return super().read(ids)


def run(out, images, **changes) -> None:
    config = TrainConfig(out=out, **(DEFAULTS | changes))
    pretrain(objective(), images, CropFlip(32), config, start(threads=1))


def reads_before_the_first_step(out) -> int:
    images = Broken(0, None)
    run(out, images, epochs=1.0)
    return images.reads - STEPS // 4


@pytest.mark.parametrize("accumulation", [1, 2])
def test_looking_ahead_changes_no_bit(tmp_path, monkeypatch, accumulation):
    tiny_run(tmp_path / "plain", accumulation=accumulation)
    assemble = train.assemble
    monkeypatch.setattr(train, "assemble", lambda *given: assemble(*given)._replace(ahead=True))
    tiny_run(tmp_path / "ahead", accumulation=accumulation)
    assert fingerprint(tmp_path / "plain") == fingerprint(tmp_path / "ahead")


def test_a_signal_while_the_next_batch_is_awaited_stops_after_the_step(tmp_path, ahead):
    """It comes in step 5 of 16, counted from 1, which is done and saved; the run goes on bit for bit."""
    before = reads_before_the_first_step(tmp_path / "counted")
    images = Broken(before + 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match="step 5 of 16"):
        run(tmp_path / "stopped", images)
    assert checkpoint.newest_step(tmp_path / "stopped" / "checkpoints") == 5
    run(tmp_path / "stopped", source(), resume=True)
    run(tmp_path / "whole", source())
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")


def test_an_error_in_the_next_batch_does_not_undo_the_step(tmp_path, ahead):
    def fail() -> None:
        raise DataError("the disk is gone")

    before = reads_before_the_first_step(tmp_path / "counted")
    with pytest.raises(DataError, match="the disk is gone"):
        run(tmp_path / "stopped", Broken(before + 6, fail))
    assert len(losses(tmp_path / "stopped")) == 5
