"""The checkpoints that the loop leaves, and what it says of them when it ends before its last step."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from sslvit.config import TrainConfig
from sslvit.data.loader import MicroBatches
from sslvit.errors import CannotWrite, Preempted
from sslvit.processes import collectives, signals
from sslvit.runs.log import Log
from sslvit.storage import checkpoint
from sslvit.training.state import RunState, save_checkpoint, save_emergency_copy

PATIENCE = 3  # failed saves in a row before a run stops


class Checkpoints:
    """A save that fails is told of, and training goes on to the next one; the third in a row ends the run."""

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        row: MicroBatches,
        config: TrainConfig,
        accelerator: Accelerator,
        state: RunState,
        log: Log,
    ):
        self.objective, self.optimizer, self.row, self.config = objective, optimizer, row, config
        self.accelerator, self.state, self.log = accelerator, state, log
        self.failed, self.saved = 0, state.step  # how many in a row; the last step that is saved

    def save(self, *, final: bool) -> None:
        """final: there will be no other, so this one must not fail."""
        self.log.sync()
        state, accelerator = self.state, self.accelerator
        state.stream_positions = self.row.places(state.step, accelerator.device)
        with signals.saving():
            saved = save_checkpoint(self.objective, self.optimizer, state, self.row.source, self.config, accelerator)
            # Which also keeps everybody here until the one that writes has written.
            saved = collectives.all_mean(torch.tensor(float(saved), device=accelerator.device)).item() == 1
        self.failed, self.saved = (0, state.step) if saved else (self.failed + 1, self.saved)
        if self.failed == PATIENCE or (self.failed and final):
            raise CannotWrite(
                f"the checkpoint of step {state.step} could not be written to {self.config.out}, after {self.failed} "
                f"in a row that could not: see the warnings above. "
                f"{save_emergency_copy(self.objective, self.optimizer, state, accelerator)}"
            )

    def save_what_is_done(self) -> None:
        """Where the run stops between two steps."""
        if self.saved < self.state.step:
            self.save(final=True)


def preempted(state: RunState, steps: int, out: Path) -> Preempted:
    if state.step == 0:
        return Preempted(f"asked to stop before the first of {steps} steps: there was nothing to save in {out}")
    return Preempted(f"asked to stop at step {state.step} of {steps}; saved in {out}: --resume goes on from there")


def kept_so_far(out: Path, bad: int | None = None) -> str:
    """What a run that diverged leaves behind. bad: the first of the steps that were not finite."""
    saved = checkpoint.newest_step(out / "checkpoints")
    text = "No checkpoint had been saved yet" if saved is None else f"The newest checkpoint in {out} is of step {saved}"
    if bad is not None and (folder := out / "bad_steps" / f"step-{bad:08d}").exists():
        text += f"; what entered the first of these steps is in {folder}, for sslvit.training.bad_steps.replay"
    return text
