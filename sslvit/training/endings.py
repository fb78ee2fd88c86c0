"""The checkpoint that the loop leaves, and what it says of it when it ends before its last step."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from sslvit.config import TrainConfig
from sslvit.data.loader import Parts
from sslvit.errors import CannotWrite, Preempted
from sslvit.processes import collectives, signals
from sslvit.runs.log import Log
from sslvit.storage import checkpoint
from sslvit.training.state import Progress, elsewhere, keep


def save(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    row: Parts,
    now: Progress,
    config: TrainConfig,
    accelerator: Accelerator,
    log: Log,
) -> bool:
    """A checkpoint of the last step; returns whether it could be written."""
    log.sync()
    now.places = row.places(now.step, accelerator.device)
    with signals.saving():
        saved = keep(objective, optimizer, now, row.source, config, accelerator)
        # Which also keeps everybody here until the one that writes has written.
        return collectives.all_mean(torch.tensor(float(saved), device=accelerator.device)).item() == 1


def cannot_write(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    now: Progress,
    config: TrainConfig,
    accelerator: Accelerator,
    failed: int,
) -> CannotWrite:
    return CannotWrite(
        f"the checkpoint of step {now.step} could not be written to {config.out}, after {failed} in a row "
        f"that could not: see the warnings above. {elsewhere(objective, optimizer, now, accelerator)}"
    )


def preempted(now: Progress, steps: int, out: Path) -> Preempted:
    if now.step == 0:
        return Preempted(f"asked to stop before the first of {steps} steps: there was nothing to save in {out}")
    return Preempted(f"asked to stop at step {now.step} of {steps}; saved in {out}: --resume goes on from there")


def kept_so_far(out: Path, bad: int | None = None) -> str:
    """What a run that diverged leaves behind. bad: the first of the steps that were not finite."""
    saved = checkpoint.newest_step(out / "checkpoints")
    text = "No checkpoint had been saved yet" if saved is None else f"The newest checkpoint in {out} is of step {saved}"
    if bad is not None and (folder := out / "bad_steps" / f"step-{bad:08d}").exists():
        text += f"; what entered the first of these steps is in {folder}, for sslvit.training.bad_steps.replay"
    return text
