"""A small model fine-tuned on noise at two rates: python tests/support/finetune_run.py OUT, alone or as a rank."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from tiny_run import source

from sslvit.finetuning import PROTOCOLS, finetune
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.processes.collectives import start

SHORT = {"steps": 4, "batch_size": 8, "log_every": 1, "save_every": 2, "threads": 1}
MEAN = {"readout": "mean", "image_size": 32}


def vit(**changes) -> ViT:
    return ViT(ViTConfig(**({"image_size": 32, "patch_size": 16, "width": 16, "depth": 2, "heads": 2} | changes)))


def write_fine_tuned(out: Path) -> None:
    config = replace(PROTOCOLS["vit"], out=out, rates=(0.01, 0.1), **SHORT)
    _, tried = finetune(vit(), source(40), config, start(threads=1), **MEAN)
    (out / "tried.json").write_text(json.dumps(tried))


if __name__ == "__main__":
    write_fine_tuned(Path(sys.argv[1]))
