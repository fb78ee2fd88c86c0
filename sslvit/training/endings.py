"""The checkpoints of the loop, and its messages about them when it ends before its last step."""

from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sslvit.config import TrainConfig, steps_of
from sslvit.data.loader import MicroBatches
from sslvit.errors import CannotWrite, Preempted
from sslvit.objectives.objective import Objective
from sslvit.processes import collectives, signals
from sslvit.runs.folder import check_still_ours
from sslvit.runs.log import Log
from sslvit.runs.settings import configuration
from sslvit.storage import checkpoint
from sslvit.training.cost import peak_memory
from sslvit.training.state import RunState, about_model, data_fingerprint, training_tensors
from sslvit.weights.folder import written_about

PATIENCE = 3  # failed saves in a row before a run stops


class Checkpoints:
    """A save that fails is reported, and training continues to the next one; the third in a row ends the run."""

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        sampler: MicroBatches,
        config: TrainConfig,
        accelerator: Accelerator,
        state: RunState,
        log: Log,
    ):
        self.objective, self.optimizer, self.sampler, self.config = objective, optimizer, sampler, config
        self.accelerator, self.state, self.log = accelerator, state, log
        self.failed, self.saved = 0, state.step  # failed saves in a row; the last step that is saved

    def save(self, *, final: bool) -> None:
        """final: there will be no other, so this one must not fail."""
        if self.write():
            self.failed, self.saved = 0, self.state.step
            return
        self.failed += 1
        if final or self.failed == PATIENCE:
            raise CannotWrite(
                f"the checkpoint of step {self.state.step} could not be written to {self.config.out}, after "
                f"{self.failed} failed saves in a row: see the warnings above. {kept_so_far(self.config.out)}"
            )

    def save_what_is_done(self) -> None:
        """Where the run stops between two steps."""
        if self.saved < self.state.step:
            self.save(final=True)

    def write(self) -> bool:
        """Whether the checkpoint of the last step was saved. Called by all processes."""
        self.log.sync()
        state, device = self.state, self.accelerator.device
        state.stream_positions = self.sampler.places(state.step, device)
        with signals.saving():
            saved, tensors = True, training_tensors(self.objective, self.optimizer)
            if self.accelerator.is_main_process:
                saved = self._write(tensors)
            # The collective also keeps all processes here until the first has written.
            return collectives.all_mean(torch.tensor(float(saved), device=device)).item() == 1

    def _write(self, tensors: dict[str, Tensor]) -> bool:
        state, config, scaler = self.state, self.config, self.accelerator.scaler
        source = self.sampler.source
        state.memory = max(state.memory, peak_memory(self.accelerator.device))
        facts = about_model(self.objective, source, steps_of(config, self.sampler.epoch_images))
        content = {
            "progress": asdict(state),
            "config": configuration(config),
            "scaler": None if scaler is None else scaler.state_dict(),
            "data": data_fingerprint(source),
            "model": written_about(self.objective.backbone, sorted(self.objective.head_state_dict()), facts),
        }
        try:
            check_still_ours(config.out)
            checkpoint.save(config.out / "checkpoints", state.step, tensors, content, keep=config.keep)
        except CannotWrite as error:
            self.accelerator.print(f"warning: {error}. The next try is in {config.save_every} steps")
            return False
        return True


def preempted(state: RunState, steps: int, out: Path) -> Preempted:
    if state.step == 0:
        return Preempted(f"asked to stop before the first of {steps} steps: there was nothing to save in {out}")
    return Preempted(f"asked to stop at step {state.step} of {steps}; saved in {out}: --resume continues from there")


def kept_so_far(out: Path, bad: int | None = None) -> str:
    """A sentence about the newest checkpoint of a run that ends early. bad: the first of the non-finite steps."""
    saved = checkpoint.newest_step(out / "checkpoints")
    text = "No checkpoint had been saved yet" if saved is None else f"The newest checkpoint in {out} is of step {saved}"
    if bad is not None and (folder := out / "bad_steps" / f"step-{bad:08d}").exists():
        text += f"; the inputs of the first of these steps are in {folder}, for sslvit.training.bad_steps.replay"
    return text
