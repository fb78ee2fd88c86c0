"""The one loop: images come in, views and the objective make a loss of them, and the loss moves the weights.

Everything that changes during training is a function of the step: the learning rate, the order of the images, every
random number. So a checkpoint is weights, moments and a step, and a restart continues bit for bit. A stream adds one
thing to it: how far each process has read.
"""

import copy
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from sslvit.config import TrainConfig, steps_of
from sslvit.data.loader import Views
from sslvit.data.source import Images
from sslvit.errors import DataError, Diverged
from sslvit.models.blocks import compiled
from sslvit.objectives.objective import Batch, Objective
from sslvit.processes import collectives, signals
from sslvit.runs.ending import Watcher, recorded
from sslvit.runs.folder import prepare_folder
from sslvit.runs.log import Bar, Log, complete, evaluations, open_log
from sslvit.training import optim, sharding
from sslvit.training.bad_steps import save_bad_step
from sslvit.training.batches import key_on_host, look, sampler_for
from sslvit.training.cost import IMAGES, flops_per_image
from sslvit.training.endings import Checkpoints, preempted
from sslvit.training.guard import Judgement, StepGuard
from sslvit.training.loop import Due, Evaluate, Evaluation, Loop, assemble
from sslvit.training.outcome import write_outcome
from sslvit.training.state import RunState, Stopwatch, data_fingerprint, described, must_agree, restore, weights_hash
from sslvit.training.watch import Verdict
from sslvit.training.watchdog import watched

Inputs = list[tuple[Tensor, Batch]]  # sample ids and batch of each micro-batch of a step


@signals.listening()
def pretrain(
    objective: Objective,
    source: Images,
    views: Views,
    config: TrainConfig,
    accelerator: Accelerator,
    evaluate: Evaluate | None = None,
    *watchers: Watcher,
) -> list[dict[str, Any]]:
    """Trains, and returns the evaluations: dicts with the step and its numbers, the first from before any training.

    watchers: see what is logged, such as sslvit.reports.live.LiveReport."""
    config = checked(objective, config, accelerator)
    sampler = sampler_for(source, config, accelerator)
    if objective.couples_samples and not config.resume:  # so that too few images are refused before a run is deleted
        sampler.only_whole_batches()
    folder = prepare_folder(config.out, resume=config.resume, overwrite=config.overwrite)
    with recorded(folder, watchers) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()

        # The state of the newest checkpoint, or of the beginning.
        initial = copy.deepcopy(objective.backbone) if evaluate and config.start_is_evaluated else None
        objective.to(accelerator.device)
        optimizer = optim.new_optimizer(objective, config)
        state = restore(objective, optimizer, source, config, accelerator)
        if state.whole_batches:
            sampler.only_whole_batches()
        sampler.go_on_at(state.stream_positions)
        first, steps = state.step, steps_of(config, sampler.epoch_images)
        if accelerator.num_processes > 1:
            collectives.assert_identical_on_all_ranks(must_agree(objective, source, config), accelerator.device)
        if first == 0:  # the data in words and pictures, and the cost of a step
            look(sampler, objective.backbone.image_size, views, config, accelerator)
            state.flops = flops_per_image(objective, views, sampler.first(IMAGES), accelerator.device)
        evaluation = evaluation_of(evaluate, objective, initial, state, accelerator)
        del initial
        if evaluation and first and state.pending_line is None:
            evaluation.judge_again(first, config.out, last=first == steps)

        facts = {"source": source.name, "steps": steps, "lengths": state.lengths}
        facts |= described(objective) | data_fingerprint(source)
        if first < steps:
            kept = 0 if state.start_pending else first  # its line comes first, and nothing was logged before it
            log = open_log(config, accelerator, kept, facts, pending=state.pending_line is not None, watchers=watchers)
            trained = sharding.sharded(objective, optimizer, accelerator) if config.shard else objective
            checkpoints = Checkpoints(trained, optimizer, sampler, config, accelerator, state, log)
            watch = watched(sampler, config.out, checkpoints.write)
            with closing(log), signals.stepping(), watch, compiled(trained, config.compile):
                run = assemble(trained, optimizer, sampler, views, evaluation, config, accelerator, first, steps)
                train(run, state, log, checkpoints)
                sharding.collect(trained, objective)
        elif accelerator.is_main_process:
            complete(config, first, facts)

        if accelerator.is_main_process:
            write_outcome(objective, source, config, state, steps, accelerator, trained=state.step > first)
        accelerator.wait_for_everyone()
        return evaluations(config.out)


def checked(objective: Objective, config: TrainConfig, accelerator: Accelerator) -> TrainConfig:
    """The settings as they are recorded and compared among processes and at a restart. Nothing is written before."""
    config = config.with_rate()
    config.check()
    collectives.check_trackers(config.log_with)
    if objective.couples_samples and config.accumulation > 1:
        chunks = ", or --chunks" if hasattr(objective, "chunks") else ""
        raise ValueError(
            f"--accumulation {config.accumulation}: the loss of {type(objective).__name__} depends on which images are "
            f"in a batch together, and micro-batches would change it. Use more processes or a smaller batch{chunks}"
        )
    if 0 < config.epochs <= config.warmup_epochs:
        accelerator.print(
            f"warning: --warmup_epochs {config.warmup_epochs:g} of --epochs {config.epochs:g}: the learning rate only "
            f"rises. A tenth of the epochs is usual: --warmup_epochs {config.epochs / 10:g}"
        )
    return replace(config, shard=sharding.wanted(config, accelerator))


def evaluation_of(
    evaluate: Evaluate | None,
    objective: Objective,
    initial: nn.Module | None,
    state: RunState,
    accelerator: Accelerator,
) -> Evaluation | None:
    """initial: the backbone from before anything was restored, which is evaluated too if the run has not done so."""
    if state.step == 0:
        state.start_pending = weights_hash(initial) if initial else ""
    elif state.start_pending and (initial is None or weights_hash(initial) != state.start_pending):
        why = "the objective does not have its weights any more" if initial else "evaluation is off"
        accelerator.print(f"warning: the start of this run is not evaluated: {why}")
        state.start_pending = ""
    return Evaluation(evaluate, objective, initial if state.start_pending else None) if evaluate else None


def train(run: Loop, state: RunState, log: Log, checkpoints: Checkpoints) -> None:
    """The steps from state.step on."""
    objective, config = run.objective, run.config
    guard = StepGuard(config, run.accelerator, state.watch)
    bar = Bar(run.accelerator.is_main_process, state.step, run.steps, config.batch_size)
    with bar, closing(run.batches):
        write_pending_line(run, state, log, bar)
        clock = Stopwatch()
        for step in range(state.step, run.steps):
            progress = step / run.steps
            optim.set_rates(run.optimizer, progress, config)
            try:
                means, inputs = backward(run, progress)
            except signals.Interrupted:  # in all processes, while they wait for images: the last step is complete
                checkpoints.save_what_is_done()
                raise preempted(state, run.steps, config.out) from None
            metrics, stop = mean_over_processes(run, means, step)
            drop_gradients(objective.frozen_parameters(progress))

            judgement = guard.judge(metrics, step)
            if judgement in (Judgement.TAKE, Judgement.OVERFLOW):
                run.optimizer.step()
            if judgement is Judgement.TAKE:
                objective.after_step((step + 1) / run.steps)
            if judgement is Judgement.NOT_FINITE:
                facts = metrics | {"precision": run.accelerator.mixed_precision, "seed": config.seed}
                save_bad_step(config.out, objective, inputs, step=step, progress=progress, **facts)
            del inputs  # its views need not wait for the next step's
            run.optimizer.zero_grad()
            guard.raise_if_diverged(metrics, step)
            alarm = guard.health(metrics, step)

            state.record(step + 1, metrics, clock.restart())
            bar.show(metrics["loss"], len(run.unreadable))
            due = Due.after(state.step, run, stop=stop, alarm=alarm is not None)
            line = log_line(run, state, alarm) if due.log else {}
            if due.preempted and (due.evaluate or state.start_pending):
                state.pending_line, line = line, {}  # a stop does not wait for an evaluation
            elif due.evaluate or (due.log and state.start_pending):
                with bar.evaluating():
                    line |= evaluated(run, state, log, due=due.evaluate)
                clock.restart()
            if line:
                log.write(state.step, line)
            if due.save:
                checkpoints.save(final=due.last)
            if due.preempted:
                raise preempted(state, run.steps, config.out)
            if due.evaluate:
                judged(run, state, line, checkpoints, last=due.last)


def judged(run: Loop, state: RunState, line: dict[str, Any], checkpoints: Checkpoints, *, last: bool) -> None:
    """An evaluation that ends the run ends it with a checkpoint."""
    assert run.evaluation
    try:
        run.evaluation.judge(state.step, line, last=last)
    except Diverged:
        checkpoints.save_what_is_done()
        raise


def backward(run: Loop, progress: float) -> tuple[dict[str, Tensor], Inputs]:
    """The gradients of one step, over all its micro-batches; returns the means of its metrics, and its inputs."""
    sums: dict[str, Tensor] = {}
    inputs: Inputs = []
    config, accelerator, model = run.config, run.accelerator, run.model
    for number in range(1, config.accumulation + 1):
        loaded, batch = run.feed.take()
        if loaded.samples.bad:
            run.unreadable.add(loaded.samples.bad)
        inputs.append((loaded.samples.ids, batch))
        with nullcontext() if number == config.accumulation else accelerator.no_sync(model):
            with key_on_host(run.objective, batch) as given:
                loss, metrics = model(given, progress)
            accelerator.backward(loss / config.accumulation)
        for name, value in ({"loss": loss.detach()} | metrics).items():
            part = value.float() / config.accumulation
            sums[name] = sums[name] + part if name in sums else part
    return sums | {"gradient_norm": optim.clip(model, config, accelerator)}, inputs


def mean_over_processes(run: Loop, metrics: dict[str, Tensor], step: int) -> tuple[dict[str, float], bool]:
    """The metrics, and whether any process was asked to stop: one collective for all numbers of a step, and its only
    wait for the device, which has the next micro-batch to go on with."""
    ahead = run.ahead and step + 1 < run.steps
    if ahead:
        run.feed.look_ahead()
    too_many = run.unreadable.too_many((step + 1) * run.config.batch_size)
    flags = {"stop": float(signals.stop_requested()), "too many": float(bool(too_many))}
    coming = collectives.Means(metrics | flags)
    if ahead:
        run.feed.queue()
    means = coming.read()
    stop = means.pop("stop") > 0
    if means.pop("too many") > 0:
        raise DataError(too_many or f"too many images cannot be used: see {run.unreadable.file}")
    return means, stop


def evaluated(run: Loop, state: RunState, log: Log, *, due: bool) -> dict[str, float]:
    """The numbers of the backbone as it is now, if they are due. Those of its start become the log's first line."""
    if run.evaluation and state.start_pending:
        with signals.between_steps():  # the steps so far are not worth a stop's waiting
            log.write(0, run.evaluation.of_the_start())
        state.start_pending = ""
    return run.evaluation.of(run.objective) if run.evaluation and due else {}


def write_pending_line(run: Loop, state: RunState, log: Log, bar: Bar) -> None:
    """What a stop did not wait for."""
    if state.pending_line is None:
        return
    with bar.evaluating(), signals.between_steps():
        due = run.evaluates_after(state.step)
        line = state.pending_line | evaluated(run, state, log, due=due)
        log.write(state.step, line)
    state.pending_line = None
    if due:
        assert run.evaluation
        run.evaluation.judge(state.step, line, last=False)


def drop_gradients(parameters: list[nn.Parameter]) -> None:
    """The optimizer passes over what has no gradient."""
    for parameter in parameters:
        parameter.grad = None


def log_line(run: Loop, state: RunState, alarm: Verdict | None) -> dict[str, Any]:
    line = {"epoch": state.step * run.config.batch_size / run.sampler.epoch_images}
    line |= {"lr": run.optimizer.param_groups[0]["lr"]} | state.means() | {"seconds": state.seconds}
    return line | ({"health": str(alarm)} if alarm else {})
