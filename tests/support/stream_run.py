"""Tiny runs on a stream, stopped in the middle or not: what the tests of streaming start and compare.

torchrun --nproc_per_node 2 tests/support/stream_run.py SPEC OUT: one run as a whole, and one stopped
by a signal that goes on.
"""

import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from tiny_run import DEFAULTS, objective

from sslvit.config import TrainConfig
from sslvit.data.stream import Stream
from sslvit.errors import Preempted
from sslvit.processes.collectives import rank, start
from sslvit.train import pretrain
from sslvit.training.cost import IMAGES
from sslvit.views.pretraining import CropFlip

PASS = 32  # images: four steps


class Views:
    """The light view, which remembers its keys, and asks the run to stop at one of its calls."""

    def __init__(self, stop_at: int | None = None):
        self.stop_at, self.keys = stop_at, []

    def __call__(self, pixels, key, extents):
        if len(key) == IMAGES:  # not a step: a step's operations are counted
            return CropFlip(32)(pixels, key, extents)
        self.keys.append(key.clone())
        if len(self.keys) == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        return CropFlip(32)(pixels, key, extents)


def stream_run(accelerator: Accelerator, spec: str, out: Path, stop_at: int | None = None, **changes) -> torch.Tensor:
    """Returns the view keys of all images shown, which tell (epoch, sample)."""
    config = TrainConfig(out=out, **(DEFAULTS | {"save_every": 100} | changes))
    views = Views(stop_at)
    with suppress(Preempted):
        pretrain(objective(), Stream(spec, epoch_images=PASS, canvas=64), views, config, accelerator)
    return torch.cat(views.keys)


def main() -> None:
    spec, out, accelerator = sys.argv[1], Path(sys.argv[2]), start(threads=1)
    torch.save(stream_run(accelerator, spec, out / "whole"), out / f"keys-{rank()}.pt")
    stream_run(accelerator, spec, out / "stopped", stop_at=6 if rank() == 1 else None)  # one is asked, both stop
    torch.save(stream_run(accelerator, spec, out / "stopped", resume=True), out / f"rest-{rank()}.pt")


if __name__ == "__main__":
    main()
