"""A look before a run: --dry_run takes a recipe through everything once, in a minute, and trains nothing that stays.

It looks at the data, draws the views, takes a few steps, writes a checkpoint and reads it back, and reports the time
and memory of the whole run. Its files are in a folder beside the run's, OUT-dry_run, never in the run's own.
"""

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from sslvit.config import TrainConfig, steps_of
from sslvit.data.loader import Views
from sslvit.data.source import Images
from sslvit.objectives.objective import Batch, Objective
from sslvit.reports.plan import batches, machine, memory_of, told
from sslvit.reports.show_views import show_views
from sslvit.runs.log import duration
from sslvit.storage import checkpoint, durable, sealed
from sslvit.train import backward
from sslvit.training import optim
from sslvit.training.batches import look, sampler_for
from sslvit.training.cost import IMAGES, flops_per_image, peak_memory
from sslvit.training.loop import Loop, assemble
from sslvit.training.sharding import wanted
from sslvit.training.state import training_tensors

MEASURED = "measured.json"
TIMED, REPEATED = 6, 20  # steps whose time is taken, after one that is not; steps on one batch


class Steps(NamedTuple):
    """What a few steps showed."""

    seconds: list[float]  # of those that are timed
    without_gradient: list[str]  # trained parameters that no gradient reaches
    losses: list[float]  # of the steps on one batch


def preview(config: TrainConfig, objective: Objective, images: Images, views: Views, accelerator: Accelerator) -> bool:
    """Whether --show_views or --dry_run asked for a look instead of a run; then the recipe ends."""
    if config.show_views:
        show_views(config, config.show_views, objective, images, views, accelerator)
    elif config.dry_run:
        dry_run(config, objective, images, views, accelerator)
    return bool(config.show_views or config.dry_run)


def dry_run(config: TrainConfig, objective: Objective, images: Images, views: Views, accelerator: Accelerator) -> None:
    if wanted(config, accelerator):
        accelerator.print("note: this dry run shards nothing: a run with --shard needs less memory, and more time")
    if config.plan:
        machine(config.plan)  # refuses what it does not know, before anything is tried
    out = config.out.absolute()
    say, folder = accelerator.print, out.with_name(f"{out.name}-dry_run")
    config = replace(config, out=folder).with_rate()
    config.check()
    if accelerator.is_main_process:
        durable.make_folder(folder)
    accelerator.wait_for_everyone()
    row = sampler_for(images, config, accelerator)
    if objective.couples_samples:
        row.only_whole_batches()
    if accelerator.is_main_process:
        look(row, objective.backbone.image_size, views, config, accelerator)
    show_views(config, folder / "views.png", objective, images, views, accelerator)
    objective.to(accelerator.device).train()
    flops = flops_per_image(objective, views, row.first(IMAGES), accelerator.device)
    steps = steps_of(config, row.epoch_images)
    optimizer = optim.new_optimizer(objective, config)
    tolerant = replace(config, max_bad=1.0, shard=False)
    run = assemble(objective, optimizer, row, views, None, tolerant, accelerator, first_step=0, steps=1 + TIMED)
    taken = take_steps(run, optimizer, steps)

    seconds = median(taken.seconds)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    reached = f"no gradient reaches {taken.without_gradient}" if taken.without_gradient else "all get a gradient"
    say(f"parameters  {trained:,} that are trained; {reached}")
    spread = f"{min(taken.seconds):.2f} to {max(taken.seconds):.2f}"
    say(f"a step      {seconds:.2f} s ({spread}), {config.batch_size / seconds:,.0f} images per second")
    say(f"the run     {steps:,} steps, about {duration(steps * seconds)} without evaluations")
    say("FLOPs       " + ("not counted, for lack of memory" if flops is None else f"{flops:.2e} per image"))
    say(f"memory      {peak_memory(accelerator.device) / 2**20:,.0f} MiB at most so far, of each process")
    before, *_, after = taken.losses
    verdict = "it learns" if after < before else "WARNING: it does not fall; is the learning rate right?"
    say(f"one batch   {REPEATED} times: the loss went from {before:.4f} to {after:.4f}: {verdict}")
    if config.plan and accelerator.is_main_process:
        first = row.first(IMAGES)
        planned = memory_of(objective.cpu(), config, batches(views, first.pixels, first.extents, first.labels))
        for line in told(planned, machine(config.plan), config, flops):
            say(line)
        objective.to(accelerator.device)
    if accelerator.is_main_process:
        measured = {"seconds_per_image": seconds / config.batch_size, "flops_per_image": flops}
        sealed.write(folder / MEASURED, measured)
        say(saved_and_read(objective, optimizer, folder, config.keep))
    say(f"Nothing was trained. Pictures and this look at the data are in {folder}")


def take_steps(run: Loop, optimizer: torch.optim.Optimizer, steps: int) -> Steps:
    """A few steps of a run of this length, then more on the last batch alone."""
    seconds, losses = [], []
    inputs: list[tuple[Tensor, Batch]] = []
    for step in range(1 + TIMED + REPEATED):
        began = time.perf_counter()
        repeated = step > TIMED
        optim.set_rates(optimizer, 0.5 if repeated else step / steps, run.config)
        if repeated:
            loss, _ = run.model(inputs[-1][1], 0.5)
            run.accelerator.backward(loss)
            losses.append(loss.item())
        else:
            metrics, inputs = backward(run, step / steps)
            metrics["loss"].item()  # waits for the device
        if step == 0:
            trained = [(name, p) for name, p in run.objective.named_parameters() if p.requires_grad]
            without_gradient = [name for name, p in trained if p.grad is None]
        run.optimizer.step()
        run.objective.after_step((step + 1) / steps)
        run.optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return Steps(seconds[1 : 1 + TIMED], without_gradient, losses)


def saved_and_read(objective: Objective, optimizer: torch.optim.Optimizer, folder: Path, keep: int) -> str:
    tensors = training_tensors(objective, optimizer)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        began = time.perf_counter()
        path = checkpoint.save(Path(place), 0, tensors, {})
        took = time.perf_counter() - began
        size = sum(file.stat().st_size for file in path.iterdir())
        newest = checkpoint.latest(Path(place))
    assert newest is not None
    read = newest.tensors
    same = read.keys() == tensors.keys() and all(torch.equal(read[n], t.cpu()) for n, t in tensors.items())
    room, needed = shutil.disk_usage(folder).free, (keep + 1) * size
    enough = (
        "" if room > 2 * needed else f"; WARNING: {room / 2**20:,.0f} MiB are free and {needed / 2**20:,.0f} needed"
    )
    back = "read back the same" if same else "WARNING: read back other than it was written"
    return f"checkpoint  {size / 2**20:,.1f} MiB in {took:.2f} s, {back}{enough}"
