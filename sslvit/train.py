"""The one loop: images come in, views and the objective make a loss of them, and the loss moves the weights.

Everything that changes during training is a function of the step: the learning rate, the order of the images, every
random number. So a checkpoint is weights, moments and a step, and a restart goes on bit for bit. Of a stream there is
one thing more to keep: how far each process has read.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from sslvit import distributed, durable, optim, schedule, sharding, stopping
from sslvit.bad_steps import save_bad_step
from sslvit.blocks import Block
from sslvit.config import TrainConfig, steps_of
from sslvit.cost import IMAGES, flops_per_image
from sslvit.data.bad import BadImages
from sslvit.data.crop import Scaled
from sslvit.data.loader import Loaded, Parts, Row, Views, load
from sslvit.data.pieces import Size
from sslvit.data.preflight import PICTURED, contact_sheet, preflight
from sslvit.data.samples import Images
from sslvit.data.stream import Stream
from sslvit.data.stream_row import StreamRow
from sslvit.endings import cannot_write, kept_so_far, preempted, save
from sslvit.errors import DataError, Diverged
from sslvit.health import SPIKE
from sslvit.lost import watched
from sslvit.objectives.objective import Batch, Objective
from sslvit.outcome import write_outcome
from sslvit.records import Log, complete, evaluations
from sslvit.resume import Progress, facts, identity, keep, restore
from sslvit.run_folder import check_still_held, prepare_folder

Evaluate = Callable[[nn.Module], dict[str, float]]
OVERFLOWS = 40  # halve fp16's first scale, 65,536, to less than 1e-7
PATIENCE = 3  # non-finite steps in a row, or failed saves in a row, before a run stops


def pretrain(
    objective: Objective,
    source: Images,
    views: Views,
    config: TrainConfig,
    accelerator: Accelerator,
    evaluate: Evaluate | None = None,
) -> list[dict[str, Any]]:
    """Trains, and returns the evaluations: dicts with the step and its numbers, the first before any training."""
    config.check()
    stopping.listen()
    if config.log_with:
        distributed.check_trackers(config.log_with)
    if objective.couples_samples and config.accumulation > 1:
        raise ValueError(
            f"--accumulation {config.accumulation}: {type(objective).__name__} compares the images of a batch with "
            "each other: in parts its loss is another. Use more processes, a smaller batch, or --parts if it is offered"
        )
    if 0 < config.epochs <= config.warmup_epochs:
        accelerator.print(
            f"warning: the learning rate only rises: --warmup_epochs {config.warmup_epochs:g} of --epochs "
            f"{config.epochs:g}. A tenth of the epochs is usual"
        )
    shard = sharding.wanted(config, accelerator)
    config = replace(config, shard=shard)  # as it is recorded, and compared among processes and with a restart
    row = row_of(source, config, accelerator)
    if objective.couples_samples and not config.resume:  # so that too few images are refused before a run is deleted
        row.only_whole_batches()
    with ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(prepare_folder(config.out, resume=config.resume, overwrite=config.overwrite))
        accelerator.wait_for_everyone()
        objective.to(accelerator.device)
        optimizer = optimizer_of(objective, config)
        now = restore(objective, optimizer, source, config, accelerator)
        if now.step == 0:
            now.whole_batches = objective.couples_samples
        if now.whole_batches:
            row.only_whole_batches()
        row.go_on_at(now.places)
        steps = steps_of(config, row.epoch_images)
        if accelerator.num_processes > 1:
            distributed.agree(facts(objective, source, config), accelerator.device)
        first, known = now.step, {"source": source.name, "steps": steps, "lengths": now.lengths}
        known |= identity(source)
        if now.step == 0 and accelerator.is_main_process:
            look(row, objective.backbone.image_size, views, config, accelerator)
        if now.step == 0 and now.flops is None:
            now.flops = flops_per_image(objective, views, row.first(IMAGES), accelerator.device)
        if now.step < steps:
            log = Log(config, accelerator, now.step, known, owed=now.owed is not None)
            if evaluate and (now.step == 0 or now.owed is not None):
                log.write(now.step, (now.owed or {}) | evaluate(objective.backbone))
                now.owed = None
            parts = objective
            if shard:
                parts = sharding.sharded(objective, optimizer, accelerator)
                evaluate = evaluate and partial(sharding.evaluate_whole, evaluate, parts, objective)
            rescue = partial(keep, parts, optimizer, now, source, config, accelerator)
            with stopping.stepping(), watched(row, config.out, rescue):
                train(parts, optimizer, row, views, config, accelerator, evaluate, now, steps, log)
                sharding.collect(parts, objective)
            log.close()
        elif accelerator.is_main_process:
            complete(config, now.step, known)
        if accelerator.is_main_process:
            check_still_held(config.out)
            write_outcome(objective, source, config, now, steps, accelerator, trained=now.step > first)
        accelerator.wait_for_everyone()
        return evaluations(config.out / "metrics.jsonl")


def row_of(source: Images, config: TrainConfig, accelerator: Accelerator) -> Parts:
    """This process's share of every batch."""
    share = {name: getattr(config, name) for name in ("batch_size", "accumulation", "seed")}
    share |= {"rank": accelerator.process_index, "processes": accelerator.num_processes}
    if not isinstance(source, Stream):
        return Row(source, **share)
    if config.workers:
        raise ValueError(f"--workers {config.workers}: a stream is decoded by threads of its own; leave --workers out")
    return StreamRow(source, **share)


def optimizer_of(objective: Objective, config: TrainConfig) -> torch.optim.Optimizer:
    given = {"spares": config.spares, "layer_decay": config.layer_decay}
    groups = optim.parameter_groups(objective, config.weight_decay, **given)
    return optim.sgd(groups, config.betas[0]) if config.optimizer == "sgd" else optim.adamw(groups, config.betas)


def look(row: Parts, image_size: Size, views: Views, config: TrainConfig, accelerator: Accelerator) -> None:
    """What is about to be trained on, before the hours begin: in words, in data.txt too, and in first_batch.png."""
    if isinstance(row.source, Stream):
        text = f"{row.source.name}: a set of unknown size, {len(row.source):,} images count as one pass"
    else:
        needed = {"image_size": image_size, "canvas": views.canvas if isinstance(views, Scaled) else 0}
        text = preflight(row.source, batch_size=config.batch_size, **needed).text()
    accelerator.print(text)
    durable.replace_text(config.out / "data.txt", text + "\n")
    contact_sheet(row.first(PICTURED), config.out / "first_batch.png")


def train(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    row: Parts,
    views: Views,
    config: TrainConfig,
    accelerator: Accelerator,
    evaluate: Evaluate | None,
    now: Progress,
    steps: int,
    log: Log,
) -> None:
    """The steps from now.step on."""
    size = row.epoch_images
    for module in objective.modules():
        if config.grad_checkpointing and hasattr(module, "set_grad_checkpointing"):
            module.set_grad_checkpointing()
        if config.compile and isinstance(module, Block):
            module.compile()
    shard = sharding.is_split(objective)
    model, prepared = (
        (objective, accelerator.prepare(optimizer)) if shard else accelerator.prepare(objective, optimizer)
    )
    gpu, workers = accelerator.device.type == "cuda", config.workers
    ahead = None if gpu or not workers else views
    parts = load(row, first_step=now.step, steps=steps, workers=workers, timeout=config.timeout, pin=gpu, views=ahead)
    unusable = BadImages(config.out / "bad_images.jsonl", size=row.different, max_bad=config.max_bad)
    bad, overflows, failed, kept, clock = 0, 0, 0, now.step, time.perf_counter()
    bar = progress_bar(accelerator.is_main_process, now.step * config.batch_size, steps * config.batch_size)
    for step in range(now.step, steps):
        progress = step / steps
        set_rates(optimizer, progress, config)
        try:
            values, entered = gradients(model, parts, views, progress, config, accelerator, unusable)
        except stopping.Interrupted:  # all processes, while images were awaited: the last step is whole
            bar.close()
            if kept < now.step and not save(objective, optimizer, row, now, config, accelerator, log):
                raise cannot_write(objective, optimizer, now, config, accelerator, failed + 1) from None
            raise preempted(now, steps, config.out) from None
        # One collective for all numbers of a step: every process sees the same means, and whether any was asked to stop
        # or met too much.
        too_many = unusable.too_many((step + 1) * config.batch_size)
        values = distributed.all_means(values | {"stop": float(stopping.asked()), "too many": float(bool(too_many))})
        stop = values.pop("stop") > 0
        if values.pop("too many") > 0:
            raise DataError(too_many or f"too many images cannot be used: see {unusable.file}")
        for parameter in objective.held(progress):
            parameter.grad = None
        finite, spike = math.isfinite(values["gradient_norm"]), now.watch.spike(values["gradient_norm"])
        left_out = 0 < config.skip_spikes < spike < math.inf
        if SPIKE < spike < math.inf:
            told = "it is left out" if left_out else f"--skip_spikes {SPIKE:g} would leave it out"
            accelerator.print(f"warning: step {now.step + 1}: the gradient norm is {spike:.3g} times the usual; {told}")
        if not left_out and math.isfinite(values["loss"]) and (finite or accelerator.scaler):
            prepared.step()
            if finite:
                objective.after_step((step + 1) / steps)
                bad = overflows = 0
            else:  # fp16's scaler has skipped the step, since its scale was too large, and halved it
                overflows += 1
        else:
            if accelerator.scaler:  # or it would take the next gradients for these
                accelerator.scaler.update(accelerator.scaler.get_scale())
            bad = 0 if left_out else bad + 1
            if bad:
                facts = values | {"precision": accelerator.mixed_precision, "seed": config.seed}
                save_bad_step(config.out, objective, entered, step=step, progress=progress, **facts)
        del entered  # its views need not wait for the next step's
        prepared.zero_grad()
        if bad == PATIENCE:
            accelerator.wait_for_everyone()  # who ends first has the others ended, which may still be writing theirs
            raise Diverged(
                f"loss or gradients were not finite at {PATIENCE} steps in a row, up to step {step}: {values}. They "
                f"changed no weight. {kept_so_far(config.out, step + 1 - PATIENCE)}. Try a smaller --lr or --clip 1"
            )
        if overflows == OVERFLOWS:
            raise Diverged(
                f"gradients overflowed at {OVERFLOWS} steps in a row, up to step {step}, at any scale of fp16. They "
                f"changed no weight. {kept_so_far(config.out)}. Try --precision bf16, or no"
            )
        verdict = now.watch.update(values)
        if verdict and config.stop_on_collapse:
            raise Diverged(f"step {step}: {verdict}")
        if verdict:
            accelerator.print(f"warning: step {step}: {verdict}")
        now.step, last = step + 1, step + 1 == steps
        now.add(values)
        now.seconds += time.perf_counter() - clock
        clock = time.perf_counter()
        unreadable = f", {len(unusable)} unreadable images" if len(unusable) else ""
        bar.set_postfix_str(f"loss {values['loss']:.4f}{unreadable}", refresh=False)
        bar.update(config.batch_size)
        line: dict[str, Any] = {}
        if now.step % config.log_every == 0 or last or stop or verdict:
            line = {"epoch": now.step * config.batch_size / size, "lr": optimizer.param_groups[0]["lr"]}
            line |= now.means() | {"seconds": now.seconds}
            line |= {"health": str(verdict)} if verdict else {}
        if evaluate and (last or due(now.step, config, size)):
            if stop and not last:
                now.owed, line = line, {}  # who asks to stop may not wait for an evaluation
            else:
                line |= evaluate(objective.backbone)
                clock = time.perf_counter()
        if line:
            log.write(now.step, line)
        if now.step % config.save_every == 0 or last or stop:
            saved = save(objective, optimizer, row, now, config, accelerator, log)
            failed, kept = (0, now.step) if saved else (failed + 1, kept)
            if failed == PATIENCE or (failed and (last or stop)):
                raise cannot_write(objective, optimizer, now, config, accelerator, failed)
        if stop and not last:
            bar.close()
            raise preempted(now, steps, config.out)
    bar.close()
    for module in objective.modules():
        if config.compile and isinstance(module, Block):
            module._compiled_call_impl = None  # who looks into blocks from here on finds them as they are written


def gradients(
    model: nn.Module,
    parts: Iterator[Loaded],
    views: Views,
    progress: float,
    config: TrainConfig,
    accelerator: Accelerator,
    unusable: BadImages,
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Batch]]]:
    """The gradients of one step, over all its parts; returns the means of its metrics, and what entered it."""
    sums: dict[str, Tensor] = {}
    entered, shard = [], sharding.is_split(model)
    for part in range(config.accumulation):
        samples, view_key, slot_key, made = to_device(awaited(parts, accelerator.device), accelerator.device)
        if samples.bad:
            unusable.add(samples.bad)
        batch = Batch(made or views(samples.pixels, view_key, samples.extents), slot_key, samples.labels)
        entered.append((samples.ids, batch))
        last = part + 1 == config.accumulation
        with nullcontext() if last else accelerator.no_sync(model):
            loss, metrics = model(batch, progress)
            accelerator.backward(loss / config.accumulation)
        for name, value in ({"loss": loss.detach()} | metrics).items():
            sums[name] = sums.get(name, 0) + value.float() / config.accumulation
    parameters = [p for p in model.parameters() if p.grad is not None]
    if shard:
        return sums | {"gradient_norm": sharding.clip(parameters, config.clip or math.inf, config.clip_each)}, entered
    norm = accelerator.clip_grad_norm_(parameters, config.clip or math.inf)
    if config.clip_each:
        norms = torch._foreach_norm([p.grad for p in parameters])
        torch._foreach_mul_([p.grad for p in parameters], [(config.clip_each / (n + 1e-6)).clamp(max=1) for n in norms])
    return sums | {"gradient_norm": norm}, entered


def awaited(parts: Iterator[Loaded], device: torch.device) -> Loaded:
    """The next micro-batch; or Interrupted, in all processes if in one: they meet here before each part, since one that
    is in a step already would wait in it for the others."""
    loaded = None
    try:
        with stopping.waiting():
            loaded = next(parts)
    except stopping.Interrupted:
        if distributed.processes() == 1:
            raise
    if distributed.processes() > 1:
        missing = distributed.all_mean(torch.tensor(float(loaded is None), device=device))
        if missing.item() > 0:
            raise stopping.Interrupted
    return loaded


def set_rates(optimizer: torch.optim.Optimizer, progress: float, config: TrainConfig) -> None:
    end = config.weight_decay if config.final_weight_decay is None else config.final_weight_decay
    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * config.learning_rate(progress)
        if group["decays"]:
            group["weight_decay"] = schedule.cosine(progress, config.weight_decay, end)


def to_device(loaded: Loaded, device: torch.device) -> Loaded:
    def move(value: Tensor | None) -> Tensor | None:
        return value if value is None else value.to(device, non_blocking=True)

    samples = loaded.samples._replace(
        **{name: move(getattr(loaded.samples, name)) for name in ("pixels", "extents", "labels")}
    )
    return loaded._replace(samples=samples, view_key=move(loaded.view_key), slot_key=move(loaded.slot_key))


def due(step: int, config: TrainConfig, size: int) -> bool:
    """Whether this step completes another evaluate_every passes."""
    if not config.evaluate_every:
        return False
    every = config.evaluate_every * size / config.batch_size
    return int(step / every) > int((step - 1) / every)


def progress_bar(shown: bool, start: int, total: int) -> tqdm:
    """Images done, images a second and time left; a line now and then where stderr is not a terminal."""
    seconds = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        initial=start,
        desc="training",
        unit=" images",
        unit_scale=True,
        mininterval=seconds,
        maxinterval=seconds,
        dynamic_ncols=True,
        disable=not shown,
    )
