"""The state of a run between two steps: how it is saved, restored and compared."""

import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from xxhash import xxh3_128

from sslvit import __version__
from sslvit.config import TrainConfig, steps_of
from sslvit.data.levels import FULL_RANGE
from sslvit.data.source import Images
from sslvit.data.stream import Stream
from sslvit.errors import DataError
from sslvit.objectives.objective import Objective
from sslvit.runs.settings import as_now, check_unchanged, configuration
from sslvit.storage import checkpoint, durable
from sslvit.training.sharding import whole
from sslvit.training.watch import Watch

EARLIER_NAMES = {"owed": "pending_line", "places": "stream_positions"}  # of a RunState, in older checkpoints


@dataclass
class RunState:
    """Where a run is, and what it has summed up since the last line of its log. All of it is saved in checkpoints."""

    step: int = 0
    seconds: float = 0.0
    flops: float | None = None  # per image
    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    start_pending: str = ""  # the hash of the backbone as it began, until that is evaluated
    pending_line: dict[str, Any] | None = None  # the log's line of this step, which lacks its evaluation
    memory: int = 0  # bytes, at its peak
    lengths: list[str] = field(default_factory=list)  # sentences: how the run was made longer or shorter
    stream_positions: list[list[int]] = field(default_factory=list)  # of each process; only streams need them
    whole_batches: bool = False  # whether no batch reaches into another epoch, as the run began

    def record(self, step: int, values: dict[str, float], seconds: float) -> None:
        """step: the number of steps done. seconds: of the last one."""
        self.step = step
        self.seconds += seconds
        self.count += 1
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}

    def means(self) -> dict[str, float]:
        """Since the last call."""
        means = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


class Stopwatch:
    """Seconds of training, without evaluations."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def restart(self) -> float:
        """The seconds since the last call."""
        before, self.began = self.began, time.perf_counter()
        return self.began - before


def training_tensors(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and moments by name, whole: called by all processes."""
    tensors = {f"objective.{name}": value for name, value in objective.state_dict().items()}
    names = {parameter: name for name, parameter in objective.named_parameters()}
    for parameter, moments in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}.{moment}": value for moment, value in moments.items()}
    return whole(tensors)


def restore_tensors(tensors: dict[str, Tensor], objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Strictly: every weight is there, and no tensor is left over."""
    left = dict(tensors)
    try:
        objective.load_state_dict(_pop_prefixed(left, "objective."), strict=True)
    except RuntimeError as error:
        raise DataError(
            f"the checkpoint's weights do not fit this model: {' '.join(str(error).split())[:500]}"
        ) from error
    for name, parameter in objective.named_parameters():
        if moments := _pop_prefixed(left, f"optimizer.{name}."):
            optimizer.state[parameter] = {moment: value.to(parameter.device) for moment, value in moments.items()}
    if left:
        raise ValueError(f"the checkpoint holds tensors that this run does not have: {sorted(left)[:5]}")


def _pop_prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def data_fingerprint(source: Images) -> dict[str, Any]:
    """Identifies a dataset, wherever it lies. A stream has no fingerprint, because that would mean to read all of it:
    its name must do, and a change of its content goes unnoticed."""
    labels = None if source.labels is None else xxh3_128(source.labels.tobytes()).hexdigest()
    return {"images": len(source), "content": getattr(source, "fingerprint", source.name), "labels": labels}


def weights_hash(module: nn.Module) -> str:
    return durable.tensors_hash(module.state_dict())


def must_agree(objective: nn.Module, source: Images, config: TrainConfig) -> dict[str, str]:
    """What all processes of a run must agree on."""
    versions = [__version__, torch.__version__, accelerate.__version__]
    return {
        "settings": json.dumps(configuration(config)),
        "images": json.dumps(data_fingerprint(source)),
        "weights": weights_hash(objective),
        "versions": json.dumps(versions),
    }


def check_same_images(saved: dict[str, Any], source: Images, *, allowed: bool) -> str:
    """Refuses to continue with other images, or returns a sentence about it if that is allowed."""
    now = data_fingerprint(source)
    if saved == now:
        return ""
    names = " and ".join(name for name in saved if saved[name] != now[name])
    change = f"the run began with {saved['images']:,} images, {source.name} has {now['images']:,}, with other {names}"
    if allowed:
        return change
    raise DataError(f"--resume: {change}. Use the old images, or --allow_data_change to continue with these")


def epoch_images(images: int, config: TrainConfig, whole_batches: bool) -> int:
    """How many of a dataset's images an epoch shows; with whole batches, those after the last full one are left out."""
    return (whole_batches and images - images % config.batch_size) or images


def check_length(saved: checkpoint.Checkpoint, config: TrainConfig, source: Images) -> str:
    """A sentence about a run that continues with other --epochs, if it does. Every schedule is a function of the share
    of the steps that is done, so all jump to where a run of the new length would be."""
    epochs = saved.state["config"].get("epochs", config.epochs)
    if epochs == config.epochs:
        return ""
    old, step = replace(config, epochs=epochs), saved.step
    whole = saved.state["progress"].get("whole_batches", False) and not isinstance(source, Stream)
    images = epoch_images(len(source), config, whole)
    before = steps_of(old, epoch_images(saved.state["data"]["images"], config, whole))
    now = steps_of(config, images)
    if now <= step:
        raise ValueError(
            f"--epochs {config.epochs:g} is {now:,} steps, and the run in {config.out} has done {step:,} of its "
            f"{before:,} (--epochs {epochs:g}): give more than {step * config.batch_size / images:g}, or use its "
            "model as it is, for which other recipes need only its folder"
        )
    rates = old.learning_rate((step - 1) / before), config.learning_rate(step / now)
    return (
        f"--epochs was {epochs:g}, is now {config.epochs:g}: the run continues at step {step:,} of {now:,} instead of "
        f"{before:,}, with the schedules of the new length: the learning rate jumps from {rates[0]:.4g} to "
        f"{rates[1]:.4g}. It will not be the run that --epochs {config.epochs:g} from the start would have been"
    )


def restore(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    source: Images,
    config: TrainConfig,
    accelerator: Accelerator,
) -> RunState:
    """With --resume the newest checkpoint that verifies, if there is any; else step 0."""
    saved = _newest_checkpoint(config, accelerator) if config.resume else None
    if saved is None:
        return RunState(whole_batches=objective.couples_samples)
    # Options that were added since: what they do by default was done before, unless the recipe has it otherwise.
    absent = configuration(type(config)()) | config.before
    if configuration(config).get("range") == list(FULL_RANGE):  # a new name of what was always done
        absent["range"] = list(FULL_RANGE)
    before = as_now(saved.state["config"], objective.backbone.image_size if "eval_crop" in absent else 0)
    for warning in check_unchanged(absent | before, config):
        accelerator.print(f"warning: {warning}")
    if warning := check_same_images(saved.state["data"], source, allowed=config.allow_data_change):
        accelerator.print(f"warning: {warning}: the run continues with these")
    progress = {EARLIER_NAMES.get(name, name): value for name, value in saved.state["progress"].items()}
    if warning := check_length(saved, config, source):
        accelerator.print(f"warning: {warning}")
        progress["lengths"] = [*progress.get("lengths", ()), warning]
    restore_tensors(saved.tensors, objective, optimizer)
    if accelerator.scaler is not None and saved.state["scaler"] is not None:
        accelerator.scaler.load_state_dict(saved.state["scaler"])
    try:
        return RunState(**progress | {"watch": Watch(**progress["watch"])})
    except TypeError as error:
        raise DataError(
            f"{config.out}: its checkpoint of step {saved.step} is of another version of sslvit: {error}"
        ) from error


def _newest_checkpoint(config: TrainConfig, accelerator: Accelerator) -> checkpoint.Checkpoint | None:
    """The main process sets aside what does not verify; then all read the same one."""
    root = config.out / "checkpoints"
    saved = checkpoint.restore(root) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    return saved if accelerator.is_main_process else checkpoint.latest(root)


def about_model(objective: Objective, source: Images, steps: int) -> dict[str, Any]:
    """The facts that are written with the model of a run of so many steps."""
    classes = list(source.classes or ()) if objective.head_state_dict() else None
    return {
        "objective": name_of(objective),
        "readout": objective.readout,
        "steps": steps,
        "data": source.name,
        "classes": classes,
    }


def described(objective: Objective) -> dict[str, Any]:
    """What is trained, for a run's records."""
    return {"objective": name_of(objective), "backbone": objective.backbone.name, "readout": objective.readout}


def name_of(objective: Objective) -> str:
    return next(kind.__name__ for kind in type(objective).__mro__ if not kind.__name__.startswith("FSDP"))
