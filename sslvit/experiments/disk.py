"""How much of the disk a comparison needs: said before it begins, and refused where it is not there. An estimate."""

import math
import shutil
from pathlib import Path

from sslvit.errors import CannotWrite
from sslvit.experiments.jobs import Job

SMALL = 2 << 20  # bytes of what lies beside a model: report, pictures, log
KEPT = 3  # checkpoints of a run at a time: two, and the one that is being written
# A checkpoint in times the weights, two moments and a teacher with them; and what the heads and decoders of the small
# presets take in it, bytes, whatever the width.
TIMES, HEADS = {"moco_v3": 4, "dino": 4}, {"moco_v3": 11_000_000, "dino": 7_000_000, "mae": 6_000_000}


def needed(parts: list[Job], jobs: int, *, weights: int, read: int, predicted: int, tries: int = 0) -> int:
    """Bytes at most, of the parts that are not done: what they leave, and the checkpoints of those that run at a time.
    weights: of a model. read: of its features and predictions, by a probe. predicted: of those of fine-tuning, which
    first trains `tries` models more to choose a rate."""
    leaves, held = 0, []
    for part in (part for part in parts if not part.product.exists()):
        if part.run is None:
            leaves += read
            continue
        models = 1 + tries * (part.recipe == "finetune")
        leaves += models * (weights + SMALL) + predicted
        held.append(models * KEPT * (TIMES.get(part.recipe, 3) * weights + HEADS.get(part.recipe, 1_000_000)))
    return leaves + sum(sorted(held, reverse=True)[:jobs])


def check_room(need: int, out: Path) -> None:
    """Says what is needed, and refuses if the disk has less."""
    free = shutil.disk_usage(out).free
    if need > free:
        raise CannotWrite(
            f"--out {out}: {megabytes(free)} are free, and what is left to do needs about {megabytes(need)}. "
            "Make room, choose another --out, or fewer --jobs"
        )
    if need:
        print(f"about {megabytes(need)} of disk are needed at most, {megabytes(free)} are free", flush=True)


def megabytes(size: int) -> str:
    return f"{math.ceil(size / 1e6):,} MB"
