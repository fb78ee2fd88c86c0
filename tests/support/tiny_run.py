"""A real training run that takes a second: what the tests of the loop start, kill, restart and compare.

python tests/support/tiny_run.py OUT [field=value ...]: fields of TrainConfig; needs no more than torch and sslvit.
"""

import hashlib
import json
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from sslvit.cli import run_cli
from sslvit.config import TrainConfig
from sslvit.data.labels import Labels
from sslvit.data.source import ArraySource
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.mpp import MPP
from sslvit.processes.collectives import start
from sslvit.storage import checkpoint
from sslvit.train import pretrain
from sslvit.views.pretraining import CropFlip

STEPS = 16
DEFAULTS = {"epochs": 4.0, "batch_size": 8, "lr": 1e-3, "clip": 1.0, "log_every": 1, "save_every": 3, "threads": 1}


def source(images: int = 32) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 3, 32, 32), np.uint8)
    return ArraySource(
        pixels, name="noise", fingerprint=f"noise:{images}", labels=Labels(np.arange(images) % 4, None, "")
    )


def objective() -> MPP:
    return MPP(ViT(ViTConfig(image_size=32, patch_size=8, width=64, depth=2, heads=2)))


def tiny_run(out: Path, **changes) -> None:
    config = TrainConfig(out=out, **(DEFAULTS | changes))
    accelerator = start(config.precision, threads=config.threads)
    pretrain(objective(), source(), CropFlip(32), config, accelerator)


def losses(out: Path) -> list[dict]:
    """The log without its times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def fingerprint(out: Path) -> str:
    """A hash of all that a run leaves: weights, optimizer, exported model, every logged number but times."""
    final = checkpoint.latest(out / "checkpoints")
    digest = hashlib.sha256(json.dumps([final.step, losses(out)]).encode())
    for name, tensor in sorted(final.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else str(tensor).encode())
    digest.update((out / "model" / "model.safetensors").read_bytes())
    return digest.hexdigest()


def main() -> None:
    kinds = {f.name: type(getattr(TrainConfig(), f.name)) for f in fields(TrainConfig)}
    given = dict(word.split("=") for word in sys.argv[2:])
    changes = {k: json.loads(v) if kinds[k] in (int, float, bool) else v for k, v in given.items()}
    tiny_run(Path(sys.argv[1]), **changes)


if __name__ == "__main__":
    run_cli(main)
