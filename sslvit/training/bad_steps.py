"""Records of steps whose loss or gradients were not finite, and their replay.

    out/bad_steps/step-00000012/weights.safetensors     the objective as it was: a bad step changes nothing
                                process-0.safetensors   its inputs on this process: views, keys, labels, sample ids
                                process-0.json          the step, its numbers, and which tensors were not finite

Only the first few bad steps of a run are saved: each is as large as a checkpoint, and they tend to be alike.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sslvit.objectives.objective import Batch, Objective
from sslvit.processes.collectives import all_mean, rank
from sslvit.storage import durable, sealed
from sslvit.training.sharding import whole

log = logging.getLogger(__name__)

MOST_SAVED = 3  # bad steps of a run
MOST_NAMED = 20  # tensors of each kind
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def save_bad_step(
    out: Path, objective: Objective, inputs: Sequence[tuple[Tensor, Batch]], *, step: int, progress: float, **facts: Any
) -> Path | None:
    """Called on every process, with the gradients in place. inputs: sample ids and batch of each micro-batch.
    facts: entries of the record, such as metrics and the precision. Returns the folder, if it was written."""
    folder = out / "bad_steps" / f"step-{step:08d}"
    others = [other for other in folder.parent.glob("step-*") if other != folder]
    room = torch.tensor(float(len(others) < MOST_SAVED), device=next(objective.parameters()).device)
    if all_mean(room).item() < 1:
        return None
    weights = whole(objective.state_dict())
    gradients = whole({name: p.grad for name, p in objective.named_parameters() if p.grad is not None})
    try:
        durable.make_folder(folder)
        if (folder / f"process-{rank()}.json").exists():  # a resumed run came to the same step
            return None
        if rank() == 0:
            durable.write(folder / "weights.safetensors", durable.tensor_pieces(weights))
        durable.write(folder / f"process-{rank()}.safetensors", durable.tensor_pieces(tensors_of(inputs)))
        record = {"step": step, "progress": progress} | facts | {"not_finite": not_finite(weights, gradients, inputs)}
        # JSON has no word for NaN.
        record = json.loads(json.dumps(record, default=str), parse_constant=str)
        durable.write(folder / f"process-{rank()}.json", [sealed.text(record)])
    except OSError as error:
        log.warning("step %d was not finite and could not be saved in %s: %s", step, folder, error)
        return None
    return folder


def tensors_of(inputs: Sequence[tuple[Tensor, Batch]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number, (ids, batch) in enumerate(inputs):
        tensors |= {f"{number}.ids": ids, f"{number}.key": batch.key}
        tensors |= {f"{number}.views.{i:03d}": view for i, view in enumerate(batch.views)}
        if batch.labels is not None:
            tensors[f"{number}.labels"] = batch.labels
    return tensors


def not_finite(
    weights: dict[str, Tensor], gradients: dict[str, Tensor], inputs: Sequence[tuple[Tensor, Batch]]
) -> dict[str, list[str]]:
    """Names of tensors that are not finite: pixels by sample and weights, before any computation; and gradients."""
    pixels = [
        f"view {i} of sample {sample}"
        for ids, batch in inputs
        for i, view in enumerate(batch.views)
        for sample in ids[(~view.isfinite().flatten(1).all(1)).to(ids.device)].tolist()
    ]
    return {"pixels": pixels[:MOST_NAMED], "weights": bad(weights), "gradients": bad(gradients)}


def bad(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()][:MOST_NAMED]


class Replayed(NamedTuple):
    loss: float
    first: str | None  # the first module whose output was not finite
    gradients: list[str]  # the parameters whose gradients are not


def replay(folder: Path, objective: Objective, process: int = 0) -> Replayed:
    """Computes the step of one process again, with an objective built as for the run; its weights are replaced.

    One process only: a loss that compares the images of all processes here compares those of this one.
    """
    file = folder / f"process-{process}.json"
    with sealed.readable(file):
        facts = sealed.read(file, progress=sealed.NUMBER)
    objective.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
    tensors = load_file(folder / f"process-{process}.safetensors")
    losses, odd, half = [], [], HALF.get(facts.get("precision", ""))

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not all(tensor.isfinite().all() for tensor in outputs):
            odd.append(name)

    with ExitStack() as hooks:
        for name, module in objective.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(look, name)))
        for number in range(sum(name.endswith(".ids") for name in tensors)):
            views = (tensors[name] for name in sorted(tensors) if name.startswith(f"{number}.views."))
            batch = Batch(tuple(views), tensors[f"{number}.key"], tensors.get(f"{number}.labels"))
            with torch.autocast("cpu", half, enabled=half is not None):
                loss, _ = objective(batch, facts["progress"])
            loss.backward()
            losses.append(loss.item())
    gradients = bad({name: p.grad for name, p in objective.named_parameters() if p.grad is not None})
    return Replayed(sum(losses) / len(losses), odd[0] if odd else None, gradients)
