"""What would happen: --dry_run takes a recipe through everything once, in a minute, and trains nothing that stays.

It looks at the data, draws the views, takes a few steps, writes a checkpoint and reads it back, and says what the whole
run will take. What it leaves lies in a folder beside the run's, OUT-dry_run, never in the run's own.
"""

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from torch import Tensor

from sslvit.config import TrainConfig, steps_of
from sslvit.data.loader import Views
from sslvit.data.source import Images
from sslvit.objectives.objective import Batch, Objective
from sslvit.preflight.views import show_views
from sslvit.runs.log import duration
from sslvit.storage import checkpoint, durable, sealed
from sslvit.train import backward
from sslvit.training import optim
from sslvit.training.batches import look, sampler_for
from sslvit.training.cost import IMAGES, flops_per_image, peak_memory
from sslvit.training.run import assemble
from sslvit.training.sharding import wanted
from sslvit.training.state import training_tensors

MEASURED = "measured.json"
TIMED, REPEATED = 6, 20  # steps whose time is taken, after one that is not; steps on one batch


def dry_run(config: TrainConfig, objective: Objective, source: Images, views: Views, accelerator: Accelerator) -> bool:
    """Whether it was asked for; the recipe then ends."""
    if not config.dry_run:
        return False
    if wanted(config, accelerator):
        accelerator.print("note: this dry run splits nothing: of a run with --shard it measures more memory, less time")
    out = config.out.absolute()
    say, folder = accelerator.print, out.with_name(f"{out.name}-dry_run")
    config = replace(config, out=folder)
    config.check()
    if accelerator.is_main_process:
        durable.make_folder(folder)
    accelerator.wait_for_everyone()
    row = sampler_for(source, config, accelerator)
    if objective.couples_samples:
        row.only_whole_batches()
    if accelerator.is_main_process:
        look(row, objective.backbone.image_size, views, config, accelerator)
    show_views(replace(config, show_views=folder / "views.png"), source, views, accelerator)
    objective.to(accelerator.device).train()
    operations = flops_per_image(objective, views, row.first(IMAGES), accelerator.device)
    steps = steps_of(config, row.epoch_images)
    optimizer = optim.new_optimizer(objective, config)
    tolerant = replace(config, max_bad=1.0, shard=False)
    run = assemble(objective, optimizer, row, views, None, tolerant, accelerator, first_step=0, steps=1 + TIMED)
    seconds, losses = [], []
    entered: list[tuple[Tensor, Batch]] = []
    for step in range(1 + TIMED + REPEATED):
        began = time.perf_counter()
        repeated = step > TIMED
        optim.set_rates(optimizer, 0.5 if repeated else step / steps, config)
        if repeated:
            loss, _ = run.model(entered[-1][1], 0.5)
            accelerator.backward(loss)
            losses.append(loss.item())
        else:
            values, entered = backward(run, step / steps)
            values["loss"].item()  # waits for the device
        if step == 0:
            without = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
        run.optimizer.step()
        objective.after_step((step + 1) / steps)
        run.optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    step_seconds = median(seconds[1 : 1 + TIMED])
    parameters = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    say(
        f"parameters  {parameters:,} that are trained; "
        + (f"no gradient reaches {without}" if without else "all get a gradient")
    )
    spread = f"{min(seconds[1 : 1 + TIMED]):.2f} to {max(seconds[1 : 1 + TIMED]):.2f}"
    say(f"a step      {step_seconds:.2f} s ({spread}), {config.batch_size / step_seconds:,.0f} images a second")
    say(f"the run     {steps:,} steps, about {duration(steps * step_seconds)} without evaluations")
    say("operations  " + ("not counted, for lack of memory" if operations is None else f"{operations:.2e} an image"))
    say(f"memory      {peak_memory(accelerator.device) / 2**20:,.0f} MiB at most so far, of each process")
    verdict = "it learns" if losses[-1] < losses[0] else "WARNING: it does not fall; is the rate right?"
    say(f"one batch   {REPEATED} times: the loss went from {losses[0]:.4f} to {losses[-1]:.4f}: {verdict}")
    if accelerator.is_main_process:
        measured = {"seconds_per_image": step_seconds / config.batch_size, "flops_per_image": operations}
        sealed.write(folder / MEASURED, measured)
        say(saved_and_read(objective, optimizer, folder, config.keep))
    say(f"Nothing was trained. Pictures and this look at the data are in {folder}")
    return True


def saved_and_read(objective: Objective, optimizer: torch.optim.Optimizer, folder: Path, keep: int) -> str:
    tensors = training_tensors(objective, optimizer)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        began = time.perf_counter()
        path = checkpoint.save(Path(place), 0, tensors, {})
        took = time.perf_counter() - began
        size = sum(file.stat().st_size for file in path.iterdir())
        found = checkpoint.latest(Path(place))
    assert found is not None
    read = found.tensors
    same = read.keys() == tensors.keys() and all(torch.equal(read[n], t.cpu()) for n, t in tensors.items())
    room, needed = shutil.disk_usage(folder).free, (keep + 1) * size
    enough = (
        "" if room > 2 * needed else f"; WARNING: {room / 2**20:,.0f} MiB are free and {needed / 2**20:,.0f} needed"
    )
    back = "read back the same" if same else "WARNING: read back other than it was written"
    return f"checkpoint  {size / 2**20:,.1f} MiB in {took:.2f} s, {back}{enough}"
