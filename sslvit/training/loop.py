"""What the steps of a run share, and what is due after each of them."""

import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from sslvit.config import TrainConfig
from sslvit.data.loader import Loaded, MicroBatches, Views, load
from sslvit.data.unreadable import UnreadableImages
from sslvit.models.blocks import keep_inputs_only
from sslvit.objectives.objective import Objective
from sslvit.runs.files import METRICS
from sslvit.storage.jsonl import read_lines
from sslvit.training.batches import Feed
from sslvit.training.sharding import collect

Evaluate = Callable[[nn.Module], dict[str, float]]


class Evaluation:
    """Numbers of the backbone as it is, and once of what it was before the first step, which is kept until then: so
    training need not wait for them."""

    def __init__(self, evaluate: Evaluate, objective: Objective, initial: nn.Module | None):
        self.evaluate, self.objective, self.initial = evaluate, objective, initial

    def of_the_start(self) -> dict[str, float]:
        assert self.initial is not None, "it is evaluated once"
        initial, self.initial = self.initial, None
        return self.evaluate(initial.to(next(self.objective.parameters()).device))

    def judge(self, step: int, numbers: dict[str, float], *, last: bool) -> None:
        """After they are logged and the step is saved: an evaluation that has a `judge` may end the run."""
        if judge := getattr(self.evaluate, "judge", None):
            judge(self.objective.backbone, step, numbers, last=last)

    def judge_again(self, step: int, out: Path, *, last: bool) -> None:
        """A resumed run begins where it stopped: at an evaluation that ended it, or whose verdict a kill prevented."""
        for line in read_lines(out / METRICS):
            if line.get("step") == step:
                self.judge(step, {name: math.nan if x is None else x for name, x in line.items()}, last=last)

    def of(self, trained: Objective) -> dict[str, float]:
        """trained: the objective, or with --shard its copy that is split among the processes."""
        collect(trained, self.objective)
        return self.evaluate(self.objective.backbone)


class Loop(NamedTuple):
    """Made once, before the first step. No settings: those are in `config`."""

    objective: Objective  # what is trained: with --shard the copy that is split among the processes
    model: nn.Module  # the same, as Accelerate wraps it
    optimizer: AcceleratedOptimizer
    sampler: MicroBatches
    batches: Generator[Loaded, None, None]
    feed: Feed
    ahead: bool  # whether the next micro-batch is prepared while the device computes
    unreadable: UnreadableImages
    evaluation: Evaluation | None
    config: TrainConfig
    accelerator: Accelerator
    steps: int

    def evaluates_after(self, step: int) -> bool:
        """step: the number of steps done."""
        return self.evaluation is not None and self.config.is_evaluated(step, self.steps, self.sampler.epoch_images)


def assemble(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    sampler: MicroBatches,
    views: Views,
    evaluation: Evaluation | None,
    config: TrainConfig,
    accelerator: Accelerator,
    first_step: int,
    steps: int,
) -> Loop:
    if config.grad_checkpointing:
        keep_inputs_only(objective)
    if config.shard:
        model, prepared = objective, accelerator.prepare(optimizer)
    else:
        model, prepared = accelerator.prepare(objective, optimizer)
    gpu, workers = accelerator.device.type == "cuda", config.workers
    ahead = None if gpu or not workers else views  # a GPU makes views faster itself
    batches = load(
        sampler, first_step=first_step, steps=steps, workers=workers, timeout=config.timeout, pin=gpu, views=ahead
    )
    unreadable = UnreadableImages(
        config.out / "bad_images.jsonl", size=sampler.different, max_bad=config.max_bad,
        before=first_step * config.batch_size,
    )  # fmt: skip
    feed = Feed(batches, views, objective.check_labels, accelerator.device)
    return Loop(
        objective, model, prepared, sampler, batches, feed, gpu, unreadable, evaluation, config, accelerator, steps
    )


class Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    evaluate: bool
    save: bool
    last: bool  # this process takes no further step
    preempted: bool  # and the run is not complete

    @classmethod
    def after(cls, step: int, run: Loop, *, stop: bool, alarm: bool) -> "Due":
        """step: the number of steps done."""
        config, complete = run.config, step == run.steps
        last = complete or stop
        return cls(
            log=step % config.log_every == 0 or last or alarm,
            evaluate=run.evaluates_after(step),
            save=step % config.save_every == 0 or last,
            last=last,
            preempted=not complete and stop,
        )
