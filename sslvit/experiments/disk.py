"""An estimate of the disk that a comparison needs, which is refused where there is less."""

import math
import shutil
from pathlib import Path

from sslvit.errors import CannotWrite
from sslvit.experiments.jobs import Job
from sslvit.objectives import OBJECTIVES, Known

BESIDE = 2 << 20  # bytes beside a model: report, pictures, log
CHECKPOINTS = 3  # of a run at a time: two, and the one that is being written
PLAIN = Known("", "")  # fine-tuning


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
        known = OBJECTIVES.get(job.recipe, PLAIN)
        whole = known.backbones * weights + known.heads
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
