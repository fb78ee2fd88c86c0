"""Objectives trained with whole and with split weights, under a launcher.

python tests/support/sharded_run.py OUT METHOD ...

Where the method is `launcher`: one of them, as the launcher asks.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from objectives_zoo import OBJECTIVES, Views
from torch import nn

from sslvit.cli import run_cli
from sslvit.config import TrainConfig
from sslvit.data.labels import Labels
from sslvit.data.source import ArraySource
from sslvit.processes.collectives import rank, start
from sslvit.train import pretrain
from sslvit.training import sharding

STEPS, IMAGES, BATCH = 12, 32, 8


def run(method: str, out: Path, **changes) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, 16, 16), np.uint8)
    source = ArraySource(pixels, name="noise", fingerprint="", labels=Labels(np.arange(IMAGES) % 3, None, ""))
    config = TrainConfig(
        out=out, epochs=STEPS * BATCH / IMAGES, batch_size=BATCH, lr=1e-3, weight_decay=0.05, save_every=4, log_every=1,
        evaluate_every=1, threads=1, clip=1.0, clip_each=0.5, **changes,
    )  # fmt: skip
    objective = OBJECTIVES[method].make(0)

    def evaluate(backbone: nn.Module) -> dict[str, float]:
        return {"eval/sum": float(sum(p.detach().double().square().sum() for p in backbone.parameters()))}

    pretrain(objective, source, Views(OBJECTIVES[method]), config, start(threads=1), evaluate)
    assert all(type(p) is nn.Parameter for p in objective.parameters())  # whole, for whoever has it


def count_shares(out: Path) -> None:
    """How much of the weights and moments a process has at a step."""
    really = sharding.clip

    def clip(parameters, most, each):
        shares = [p.to_local().numel() for p in parameters]
        (out / f"share-{rank()}.json").write_text(json.dumps([sum(shares), sum(p.numel() for p in parameters)]))
        return really(parameters, most, each)

    sharding.clip = clip


def main() -> None:
    out = Path(sys.argv[1])
    count_shares(out)
    if sys.argv[2:] == ["again"]:
        return run("mae", out / "mae-True", shard=True, accumulation=2, resume=True)
    if sys.argv[2:] == ["launcher"]:
        return run("mae", out / "mae-launcher")
    for method in sys.argv[2:]:
        accumulation = {} if OBJECTIVES[method].make(0).couples_samples else {"accumulation": 2}
        optimizer = {"optimizer": "sgd"} if method == "supervised" else {}
        for shard in (False, True):
            run(method, out / f"{method}-{shard}", shard=shard, **accumulation, **optimizer)
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_cli(main)
