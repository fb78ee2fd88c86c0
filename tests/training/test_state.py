"""A run that goes on from any of its steps, in a process of its own, ends as the one that was never stopped."""

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from objectives_zoo import OBJECTIVES, Views
from tiny_run import fingerprint

from sslvit.config import TrainConfig
from sslvit.data.labels import Labels
from sslvit.data.source import ArraySource
from sslvit.processes.collectives import start
from sslvit.train import pretrain

pytestmark = pytest.mark.processes

STEPS, IMAGES, BATCH = 48, 32, 8
CONTEXT = multiprocessing.get_context("forkserver")  # imports once; each run is a process all the same
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "objectives_zoo"])


def train(method: str, out: Path, workers: int) -> None:
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as from a command line
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, 16, 16), np.uint8)
    source = ArraySource(pixels, name="noise", fingerprint="", labels=Labels(np.arange(IMAGES) % 4, None, ""))
    config = TrainConfig(
        out=out, epochs=STEPS * BATCH / IMAGES, batch_size=BATCH, lr=1e-3, save_every=1, keep=STEPS + 1, log_every=1,
        threads=1, resume=True, workers=workers,
    )  # fmt: skip
    pretrain(OBJECTIVES[method].make(0), source, Views(OBJECTIVES[method]), config, start(threads=1))


def run(method: str, out: Path, workers: int = 0) -> str:
    process = CONTEXT.Process(target=train, args=(method, out, workers))
    process.start()
    process.join(120)
    assert process.exitcode == 0, Path(f"{out}.log").read_text()
    return fingerprint(out)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["dino", "ibot", "dinov2-sinkhorn", "mae", "simmim", "moco_v3"])
def test_going_on_from_every_step_ends_bit_for_bit_the_same(method, tmp_path):
    whole = tmp_path / "whole"
    reference, identical = run(method, whole), []
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in (whole / "checkpoints").glob("step-*"))
    assert steps == list(range(1, STEPS + 1))
    for step in (0, *steps):
        out = tmp_path / "again"
        shutil.copytree(whole, out, ignore=shutil.ignore_patterns("checkpoints", "model"))
        (out / "checkpoints").mkdir()
        if step:
            shutil.copytree(whole / f"checkpoints/step-{step:08d}", out / f"checkpoints/step-{step:08d}")
        workers = 2 if step % 8 == 5 else 0  # six of them
        if run(method, out, workers) == reference:
            identical.append(step)
        shutil.rmtree(out)
    assert identical == [0, *steps]
    print(f"{method}: {len(identical)} of {len(steps) + 1} identical")
