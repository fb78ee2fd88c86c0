"""Judgement of each step before it moves the weights: spikes, non-finite numbers, fp16's overflows, and collapse."""

import math
from enum import Enum, auto

from accelerate import Accelerator

from sslvit.config import TrainConfig
from sslvit.errors import Diverged
from sslvit.training.endings import kept_so_far
from sslvit.training.watch import SPIKE, Verdict, Watch

OVERFLOWS = 40  # halve fp16's first scale, 65,536, to less than 1e-7
PATIENCE = 3  # non-finite steps in a row before a run stops


class Judgement(Enum):
    TAKE = auto()
    OVERFLOW = auto()  # fp16's scaler skips the step, since its scale was too large, and halves it
    SPIKE = auto()
    NOT_FINITE = auto()


class StepGuard:
    """Judges the steps of one process; all processes see the same metrics and judge alike."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, watch: Watch):
        self.config, self.accelerator, self.watch = config, accelerator, watch
        self.not_finite = self.overflows = 0  # in a row

    def judge(self, metrics: dict[str, float], step: int) -> Judgement:
        judgement = self._judge(metrics, step)
        if judgement is Judgement.TAKE:
            self.not_finite = self.overflows = 0
        elif judgement is Judgement.OVERFLOW:
            self.overflows += 1
        else:
            if self.accelerator.scaler:  # or it would treat the next gradients as these
                self.accelerator.scaler.update(self.accelerator.scaler.get_scale())
            self.not_finite = self.not_finite + 1 if judgement is Judgement.NOT_FINITE else 0
        return judgement

    def _judge(self, metrics: dict[str, float], step: int) -> Judgement:
        spike = self.watch.spike(metrics["gradient_norm"])  # times the median of the last steps
        skipped = 0 < self.config.skip_spikes < spike < math.inf
        if SPIKE < spike < math.inf:
            fate = "it is skipped" if skipped else f"--skip_spikes {SPIKE:g} would skip it"
            self.accelerator.print(
                f"warning: step {step + 1}: the gradient norm is {spike:.3g} times the usual; {fate}"
            )
        if skipped:
            return Judgement.SPIKE
        finite = math.isfinite(metrics["gradient_norm"])
        if not math.isfinite(metrics["loss"]) or not (finite or self.accelerator.scaler):
            return Judgement.NOT_FINITE
        return Judgement.TAKE if finite else Judgement.OVERFLOW

    def raise_if_diverged(self, metrics: dict[str, float], step: int) -> None:
        out = self.config.out
        if self.not_finite == PATIENCE:
            self.accelerator.wait_for_everyone()  # the first to end ends the others, which may still write theirs
            raise Diverged(
                f"loss or gradients were not finite at {PATIENCE} steps in a row, up to step {step}: {metrics}. They "
                f"changed no weight. {kept_so_far(out, step + 1 - PATIENCE)}. Try a smaller --lr or --clip 1"
            )
        if self.overflows == OVERFLOWS:
            raise Diverged(
                f"gradients overflowed at {OVERFLOWS} steps in a row, up to step {step}, at any scale of fp16. They "
                f"changed no weight. {kept_so_far(out)}. Try --precision bf16, or no"
            )

    def health(self, metrics: dict[str, float], step: int) -> Verdict | None:
        """A verdict at the step at which a collapse is noticed; with --stop_on_collapse the run ends."""
        verdict = self.watch.update(metrics)
        if verdict and self.config.stop_on_collapse:
            raise Diverged(f"step {step}: {verdict}")
        if verdict:
            self.accelerator.print(f"warning: step {step}: {verdict}")
        return verdict
