"""A run of images in files, one of which can be slow: python tests/support/lost_run.py FOLDER OUT [field=value ...]

SLOW_IMAGE=9 SLOW_SECONDS=60 holds up the worker that reads image 9, and SLOW_READS=0.01 every reading of an image.
HELD=FIFO has every reading of an image wait as soon as that FIFO is there, as for a server that does not answer;
HELD_RANK=1 those of one process.
FILL_SHARED=1 has something else fill /dev/shm after the first step.
SLOW_STEPS=5 holds up each step and SLOW_SAVES=3 each checkpoint; FAIL_SAVES=1 has a disk that takes none.
"""

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from tiny_run import DEFAULTS, objective
from torch.utils.data import get_worker_info

from sslvit import train
from sslvit.cli import run_cli
from sslvit.config import TrainConfig
from sslvit.data.readers.folders import FileStore
from sslvit.data.spec import open_source
from sslvit.errors import CannotWrite
from sslvit.processes.collectives import start_run
from sslvit.storage import checkpoint
from sslvit.views.pretraining import CropFlip

read, really_save, backward = FileStore.read, checkpoint.save, train.backward


def slow_read(self: FileStore, id: int, max_pixels: int) -> bytes:
    if get_worker_info() and id == int(os.environ.get("SLOW_IMAGE", -1)):
        time.sleep(float(os.environ["SLOW_SECONDS"]))
    time.sleep(float(os.environ.get("SLOW_READS", 0)))
    mine = os.environ.get("HELD_RANK") in (None, os.environ.get("RANK"))
    if mine and Path(held := os.environ.get("HELD", "")).is_fifo():
        open(held).close()
    return read(self, id, max_pixels)


def slow_backward(run: train.Loop, progress: float) -> tuple:
    time.sleep(float(os.environ.get("SLOW_STEPS", 0)))
    if progress > 0 and "FILL_SHARED" in os.environ:
        with suppress(OSError), open("/dev/shm/full", "wb") as file:  # suppressed where it is closed, too
            file.write(bytes(os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize))
    return backward(run, progress)


def save(root: Path, step: int, *given, **options) -> Path:
    time.sleep(float(os.environ.get("SLOW_SAVES", 0)))
    if "FAIL_SAVES" in os.environ:
        raise CannotWrite(f"{root}: the checkpoint of step {step} was not saved: No space left on device")
    return really_save(root, step, *given, **options)


def main() -> None:
    FileStore.read, checkpoint.save, train.backward = slow_read, save, slow_backward
    kinds = {f.name: type(getattr(TrainConfig(), f.name)) for f in fields(TrainConfig)}
    given = dict(word.split("=") for word in sys.argv[3:])
    given = {k: json.loads(v) if kinds[k] in (int, float, bool) else v for k, v in given.items()}
    if os.environ.get("RANK") == os.environ.get("ODD_RANK", "none"):
        given |= json.loads(os.environ["ODD_SETTINGS"])
    config = TrainConfig(out=Path(sys.argv[2]), **(DEFAULTS | given))
    accelerator = start_run(config)
    source = open_source(f"folder:{sys.argv[1]}", image_size=32, cache=False)
    train.pretrain(objective(), source, CropFlip(32), config, accelerator)


if __name__ == "__main__":
    run_cli(main)
