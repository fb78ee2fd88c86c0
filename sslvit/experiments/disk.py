"""An estimate of the disk that a comparison needs, which is refused where there is less."""

import math
import shutil
from pathlib import Path

from sslvit.errors import CannotWrite
from sslvit.experiments.jobs import Job

BESIDE = 2 << 20  # bytes beside a model: report, pictures, log
CHECKPOINTS = 3  # of a run at a time: two, and the one that is being written
# A checkpoint in times the weights, two moments and a teacher with them; and what the heads and decoders of the small
# presets take in it, bytes, whatever the width.
TIMES = {"moco_v3": 4, "dino": 4, "ibot": 4, "dinov2": 4}
HEADS = {"moco_v3": 11_000_000, "dino": 7_000_000, "ibot": 7_000_000, "dinov2": 7_000_000, "mae": 6_000_000}


def needed(jobs: list[Job], at_a_time: int, *, weights: int, read: int, predicted: int, tries: int = 0) -> int:
    """Bytes at most, of the jobs that are not done: what they leave, and the checkpoints of those that run together.
    weights: of a model. read: of its features and predictions, by a probe. predicted: of those of fine-tuning, which
    first trains `tries` models more to choose a rate."""
    leaves, checkpoints = 0, []
    for job in jobs:
        if job.done:
            continue
        if job.run is None:
            leaves += read
            continue
        models = 1 + tries * (job.recipe == "finetune")
        leaves += models * (weights + BESIDE) + predicted
        whole = TIMES.get(job.recipe, 3) * weights + HEADS.get(job.recipe, 1_000_000)
        checkpoints.append(models * CHECKPOINTS * whole)
    return leaves + sum(sorted(checkpoints, reverse=True)[:at_a_time])


def check_room(need: int, out: Path) -> None:
    """Prints what is needed, and refuses if the disk has less."""
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
