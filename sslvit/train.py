"""The one loop: images come in, views and the objective make a loss of them, and the loss moves the weights.

Everything that changes during training is a function of the step: the learning rate, the order of the images, every
random number. So a checkpoint is weights, moments and a step, and a restart goes on bit for bit. Of a stream there is
one thing more to keep: how far each process has read.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from sslvit.config import TrainConfig, steps_of
from sslvit.data.loader import Loaded, MicroBatches, Views, load
from sslvit.data.source import Images
from sslvit.data.unreadable import UnreadableImages
from sslvit.errors import DataError
from sslvit.models.blocks import compiled, keep_inputs_only
from sslvit.objectives.objective import Batch, Objective
from sslvit.processes import collectives, signals
from sslvit.runs.folder import check_still_ours, prepare_folder
from sslvit.runs.log import Log, complete, evaluations, progress_bar
from sslvit.training import optim, sharding
from sslvit.training.bad_steps import save_bad_step
from sslvit.training.batches import look, next_batch, sampler_for
from sslvit.training.cost import IMAGES, flops_per_image
from sslvit.training.endings import Checkpoints, preempted
from sslvit.training.guard import Judgement, StepGuard
from sslvit.training.outcome import write_outcome
from sslvit.training.state import RunState, Stopwatch, data_fingerprint, must_agree, restore, save_checkpoint
from sslvit.training.watch import Verdict
from sslvit.training.watchdog import watched

Evaluate = Callable[[nn.Module], dict[str, float]]
Inputs = list[tuple[Tensor, Batch]]  # sample ids and batch of each micro-batch of a step


class Run(NamedTuple):
    """What the steps share, made once. No settings: those are in `config`."""

    objective: Objective  # what is trained: with --shard the copy of which every process holds a share
    model: nn.Module  # the same, as Accelerate wraps it
    optimizer: AcceleratedOptimizer
    row: MicroBatches  # which images, in which order
    batches: Iterator[Loaded]
    views: Views
    unreadable: UnreadableImages
    evaluate: Evaluate | None  # of the whole backbone, however it is sharded
    config: TrainConfig
    accelerator: Accelerator
    steps: int


def pretrain(
    objective: Objective,
    source: Images,
    views: Views,
    config: TrainConfig,
    accelerator: Accelerator,
    evaluate: Evaluate | None = None,
) -> list[dict[str, Any]]:
    """Trains, and returns the evaluations: dicts with the step and its numbers, the first before any training."""
    config = checked(objective, config, accelerator)
    row = sampler_for(source, config, accelerator)
    if objective.couples_samples and not config.resume:  # so that too few images are refused before a run is deleted
        row.only_whole_batches()
    with ExitStack() as entered:
        if accelerator.is_main_process:
            entered.enter_context(prepare_folder(config.out, resume=config.resume, overwrite=config.overwrite))
        accelerator.wait_for_everyone()

        objective.to(accelerator.device)
        optimizer = optim.new_optimizer(objective, config)
        state = restore(objective, optimizer, source, config, accelerator)
        first = state.step
        if first == 0:
            state.whole_batches = objective.couples_samples
        if state.whole_batches:
            row.only_whole_batches()
        row.go_on_at(state.stream_positions)
        steps = steps_of(config, row.epoch_images)
        if accelerator.num_processes > 1:
            collectives.assert_identical_on_all_ranks(must_agree(objective, source, config), accelerator.device)
        if first == 0 and accelerator.is_main_process:
            look(row, objective.backbone.image_size, views, config, accelerator)
        if first == 0 and state.flops is None:
            state.flops = flops_per_image(objective, views, row.first(IMAGES), accelerator.device)

        known = {"source": source.name, "steps": steps, "lengths": state.lengths} | data_fingerprint(source)
        if first < steps:
            log = Log(config, accelerator, first, known, owed=state.pending_line is not None)
            if evaluate and (first == 0 or state.pending_line is not None):
                log.write(first, (state.pending_line or {}) | evaluate(objective.backbone))
                state.pending_line = None
            trained = objective
            if config.shard:
                trained = sharding.sharded(objective, optimizer, accelerator)
                evaluate = evaluate and partial(sharding.evaluate_whole, evaluate, trained, objective)
            rescue = partial(save_checkpoint, trained, optimizer, state, source, config, accelerator)
            with signals.stepping(), watched(row, config.out, rescue), compiled(trained, config.compile):
                train(assemble(trained, optimizer, row, views, evaluate, config, accelerator, first, steps), state, log)
                sharding.collect(trained, objective)
            log.close()
        elif accelerator.is_main_process:
            complete(config, first, known)

        if accelerator.is_main_process:
            check_still_ours(config.out)
            write_outcome(objective, source, config, state, steps, accelerator, trained=state.step > first)
        accelerator.wait_for_everyone()
        return evaluations(config.out / "metrics.jsonl")


def checked(objective: Objective, config: TrainConfig, accelerator: Accelerator) -> TrainConfig:
    """The settings as they are recorded, and compared among processes and with a restart."""
    config = config.with_rate()
    config.check()
    signals.listen()
    if config.log_with:
        collectives.check_trackers(config.log_with)
    if objective.couples_samples and config.accumulation > 1:
        raise ValueError(
            f"--accumulation {config.accumulation}: {type(objective).__name__} compares the images of a batch with "
            "each other, so micro-batches change its loss. Use more processes, a smaller batch, or MoCo v3's --chunks"
        )
    if 0 < config.epochs <= config.warmup_epochs:
        accelerator.print(
            f"warning: the learning rate only rises: --warmup_epochs {config.warmup_epochs:g} of --epochs "
            f"{config.epochs:g}. A tenth of the epochs is usual"
        )
    return replace(config, shard=sharding.wanted(config, accelerator))


def assemble(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    row: MicroBatches,
    views: Views,
    evaluate: Evaluate | None,
    config: TrainConfig,
    accelerator: Accelerator,
    first_step: int,
    steps: int,
) -> Run:
    if config.grad_checkpointing:
        keep_inputs_only(objective)
    if sharding.is_split(objective):
        model, prepared = objective, accelerator.prepare(optimizer)
    else:
        model, prepared = accelerator.prepare(objective, optimizer)
    gpu, workers = accelerator.device.type == "cuda", config.workers
    ahead = None if gpu or not workers else views  # a GPU makes views faster itself
    batches = load(
        row, first_step=first_step, steps=steps, workers=workers, timeout=config.timeout, pin=gpu, views=ahead
    )
    unreadable = UnreadableImages(config.out / "bad_images.jsonl", size=row.different, max_bad=config.max_bad)
    return Run(objective, model, prepared, row, batches, views, unreadable, evaluate, config, accelerator, steps)


def train(run: Run, state: RunState, log: Log) -> None:
    """The steps from state.step on."""
    objective, config = run.objective, run.config
    guard = StepGuard(config, run.accelerator, state.watch)
    checkpoints = Checkpoints(objective, run.optimizer, run.row, config, run.accelerator, state, log)
    clock = Stopwatch()
    with progress_bar(run.accelerator.is_main_process, state.step, run.steps, config.batch_size) as bar:
        for step in range(state.step, run.steps):
            progress = step / run.steps
            optim.set_rates(run.optimizer, progress, config)
            try:
                metrics, inputs = backward(run, progress)
            except signals.Interrupted:  # all processes, while images were awaited: the last step is whole
                checkpoints.save_what_is_done()
                raise preempted(state, run.steps, config.out) from None
            values, stop = agree(run, metrics, step)
            for parameter in objective.frozen_parameters(progress):
                parameter.grad = None

            judgement = guard.judge(values, step)
            if judgement in (Judgement.TAKE, Judgement.OVERFLOW):
                run.optimizer.step()
            if judgement is Judgement.TAKE:
                objective.after_step((step + 1) / run.steps)
            if judgement is Judgement.NOT_FINITE:
                about = values | {"precision": run.accelerator.mixed_precision, "seed": config.seed}
                save_bad_step(config.out, objective, inputs, step=step, progress=progress, **about)
            del inputs  # its views need not wait for the next step's
            run.optimizer.zero_grad()
            guard.raise_if_diverged(values, step)
            alarm = guard.health(values, step)

            state.record(step + 1, values, clock.restart())
            bar.show(values["loss"], len(run.unreadable))
            due = Due.after(state.step, run, stop=stop, alarm=alarm is not None)
            line = log_line(run, state, alarm) if due.log else {}
            if due.evaluate and stop and not due.last:
                state.pending_line, line = line, {}  # whoever asked to stop need not wait for an evaluation
            elif due.evaluate and run.evaluate is not None:
                line |= run.evaluate(objective.backbone)
                clock.restart()
            if line:
                log.write(state.step, line)
            if due.save:
                checkpoints.save(final=due.last or stop)
            if stop and not due.last:
                raise preempted(state, run.steps, config.out)


def backward(run: Run, progress: float) -> tuple[dict[str, Tensor], Inputs]:
    """The gradients of one step, over all its micro-batches; returns the means of its metrics, and what entered it."""
    sums: dict[str, Tensor] = {}
    inputs: Inputs = []
    config, accelerator, model = run.config, run.accelerator, run.model
    for part in range(config.accumulation):
        samples, view_key, slot_key, made = next_batch(run.batches, accelerator.device)
        if samples.bad:
            run.unreadable.add(samples.bad)
        batch = Batch(made or run.views(samples.pixels, view_key, samples.extents), slot_key, samples.labels)
        inputs.append((samples.ids, batch))
        last = part + 1 == config.accumulation
        with nullcontext() if last else accelerator.no_sync(model):
            loss, metrics = model(batch, progress)
            accelerator.backward(loss / config.accumulation)
        for name, value in ({"loss": loss.detach()} | metrics).items():
            sums[name] = sums.get(name, 0) + value.float() / config.accumulation
    return sums | {"gradient_norm": optim.clip(model, config, accelerator)}, inputs


def agree(run: Run, metrics: dict[str, Tensor], step: int) -> tuple[dict[str, float], bool]:
    """The means over all processes, and whether any was asked to stop: one collective for all numbers of a step."""
    too_many = run.unreadable.too_many((step + 1) * run.config.batch_size)
    values = collectives.all_means(
        metrics | {"stop": float(signals.stop_requested()), "too many": float(bool(too_many))}
    )
    stop = values.pop("stop") > 0
    if values.pop("too many") > 0:
        raise DataError(too_many or f"too many images cannot be used: see {run.unreadable.file}")
    return values, stop


class Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    evaluate: bool
    save: bool
    last: bool

    @classmethod
    def after(cls, step: int, run: Run, *, stop: bool, alarm: bool) -> "Due":
        """step: how many are done."""
        config, last = run.config, step == run.steps
        every = config.evaluate_every * run.row.epoch_images / config.batch_size  # steps
        return cls(
            log=step % config.log_every == 0 or last or stop or alarm,
            evaluate=run.evaluate is not None and (last or completes(step, every)),
            save=step % config.save_every == 0 or last or stop,
            last=last,
        )


def completes(step: int, every: float) -> bool:
    """Whether this step completes another `every` steps, which need not be whole; 0 never does."""
    return every > 0 and int(step / every) > int((step - 1) / every)


def log_line(run: Run, state: RunState, alarm: Verdict | None) -> dict[str, Any]:
    line = {"epoch": state.step * run.config.batch_size / run.row.epoch_images}
    line |= {"lr": run.optimizer.param_groups[0]["lr"]} | state.means() | {"seconds": state.seconds}
    return line | ({"health": str(alarm)} if alarm else {})
