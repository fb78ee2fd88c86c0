"""What a run consists of between two steps: into a checkpoint, and back."""

import json
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from xxhash import xxh3_128

from sslvit import __version__
from sslvit.config import TrainConfig, as_now, check_unchanged, configuration, steps_of
from sslvit.data.levels import FULL_RANGE
from sslvit.data.source import Images
from sslvit.data.stream import Stream
from sslvit.errors import CannotWrite, DataError
from sslvit.objectives.objective import Objective
from sslvit.runs.folder import check_still_ours
from sslvit.storage import checkpoint, durable
from sslvit.training.cost import peak_memory
from sslvit.training.sharding import whole
from sslvit.training.watch import Watch
from sslvit.weights.folder import written_about

EARLIER_NAMES = {"owed": "pending_line", "places": "stream_positions"}  # of a RunState, in older checkpoints


@dataclass
class RunState:
    """Where a run is, and what it has summed up since the last line of its log. All of it is in a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    flops: float | None = None  # an image
    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    pending_line: dict[str, Any] | None = None  # the log's line of this step, which lacks its evaluation
    memory: int = 0  # bytes, at most
    lengths: list[str] = field(default_factory=list)  # sentences: how the run was made longer or shorter
    stream_positions: list[list[int]] = field(default_factory=list)  # of each process; a source needs none
    whole_batches: bool = False  # whether no batch reaches into another epoch, as the run began

    def record(self, step: int, values: dict[str, float], seconds: float) -> None:
        """step: how many are done. seconds: what this one took."""
        self.step = step
        self.seconds += seconds
        self.count += 1
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}

    def means(self) -> dict[str, float]:
        means, self.sums, self.count = {name: s / self.count for name, s in self.sums.items()}, {}, 0
        return means


class Stopwatch:
    """Seconds of training, which leave evaluations out."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def restart(self) -> float:
        """The seconds since the last time."""
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
    """Strictly: every weight is there, and nothing is left over."""
    weights = {name.removeprefix("objective."): t for name, t in tensors.items() if name.startswith("objective.")}
    try:
        objective.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise DataError(
            f"the checkpoint's weights do not fit this model: {' '.join(str(error).split())[:500]}"
        ) from error
    left = {name: t for name, t in tensors.items() if name.startswith("optimizer.")}
    for name, parameter in objective.named_parameters():
        prefix = f"optimizer.{name}."
        mine = {key.removeprefix(prefix): left.pop(key) for key in list(left) if key.startswith(prefix)}
        if mine:
            optimizer.state[parameter] = {moment: value.to(parameter.device) for moment, value in mine.items()}
    if left or len(weights) + sum(name.startswith("optimizer.") for name in tensors) != len(tensors):
        raise ValueError(f"the checkpoint holds tensors that this run does not know: {sorted(left or tensors)[:5]}")


def data_fingerprint(source: Images) -> dict[str, Any]:
    """What tells a set from another, wherever it lies. A stream has no fingerprint, because nobody can read all of it
    to make one: its name must do, and if its content changes nobody is told."""
    labels = None if source.labels is None else xxh3_128(source.labels.tobytes()).hexdigest()
    return {"images": len(source), "content": getattr(source, "fingerprint", source.name), "labels": labels}


def must_agree(objective: nn.Module, source: Images, config: TrainConfig) -> dict[str, str]:
    """What all processes of a run must agree on."""
    versions = [__version__, torch.__version__, accelerate.__version__]
    return {
        "settings": json.dumps(configuration(config)),
        "images": json.dumps(data_fingerprint(source)),
        "weights": durable.tensors_hash(objective.state_dict()),
        "versions": json.dumps(versions),
    }


def check_same_images(saved: dict[str, Any], source: Images, *, allowed: bool) -> str:
    """Refuses to go on with other images, or returns a sentence about it if that is allowed."""
    now = data_fingerprint(source)
    if saved == now:
        return ""
    parts = " and ".join(name for name in saved if saved[name] != now[name])
    what = f"the run began with {saved['images']:,} images, {source.name} has {now['images']:,}, with other {parts}"
    if allowed:
        return what
    raise DataError(f"--resume: {what}. Give the old images, or --allow_data_change to go on with these")


def epoch_images(images: int, config: TrainConfig, whole_batches: bool) -> int:
    """How many of a set's images an epoch shows; with whole batches, those after the last full one are left out."""
    return (whole_batches and images - images % config.batch_size) or images


def check_length(found: checkpoint.Checkpoint, config: TrainConfig, source: Images) -> str:
    """A sentence about a run that goes on for other epochs than it was to have, if it does. Every schedule is a
    function of the share of the steps that is done, so all jump to where a run of the new length would be."""
    epochs = found.state["config"].get("epochs", config.epochs)
    if epochs == config.epochs:
        return ""
    old, step = replace(config, epochs=epochs), found.step
    whole = found.state["progress"].get("whole_batches", False) and not isinstance(source, Stream)
    images = epoch_images(len(source), config, whole)
    before = steps_of(old, epoch_images(found.state["data"]["images"], config, whole))
    now = steps_of(config, images)
    if now <= step:
        raise ValueError(
            f"--epochs {config.epochs:g} is {now:,} steps, and the run in {config.out} has done {step:,} of its "
            f"{before:,} (--epochs {epochs:g}): give more than {step * config.batch_size / images:g}, or take its "
            "model as it is, for which other recipes need no more than its folder"
        )
    rates = old.learning_rate((step - 1) / before), config.learning_rate(step / now)
    return (
        f"--epochs was {epochs:g}, is now {config.epochs:g}: the run goes on at step {step:,} of {now:,} instead of "
        f"{before:,}, with the schedules of the new length: the learning rate goes from {rates[0]:.4g} to "
        f"{rates[1]:.4g} at once. It will not be the run that --epochs {config.epochs:g} from the start would have been"
    )


def restore(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Images,
    config: TrainConfig,
    accelerator: Accelerator,
) -> RunState:
    """Where to begin: at the newest checkpoint that verifies if the run goes on, else at step 0."""
    if not config.resume:
        return RunState()
    root = config.out / "checkpoints"
    # The lead sets aside what does not verify; then everybody reads the same newest one.
    found = checkpoint.restore(root) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        found = checkpoint.latest(root)
    if found is None:
        return RunState()
    # Options that were added since: what they do by default was done before, unless the recipe says otherwise.
    absent = configuration(type(config)()) | config.before
    if configuration(config).get("range") == list(FULL_RANGE):  # by another name what was always done
        absent["range"] = list(FULL_RANGE)
    saved = as_now(found.state["config"], objective.backbone.image_size if "eval_crop" in absent else 0)
    for warning in check_unchanged(absent | saved, config):
        accelerator.print(f"warning: {warning}")
    if warning := check_same_images(found.state["data"], source, allowed=config.allow_data_change):
        accelerator.print(f"warning: {warning}: the run goes on with these")
    progress = {EARLIER_NAMES.get(name, name): value for name, value in found.state["progress"].items()}
    if told := check_length(found, config, source):
        accelerator.print(f"warning: {told}")
        progress["lengths"] = [*progress.get("lengths", ()), told]
    restore_tensors(found.tensors, objective, optimizer)
    if accelerator.scaler is not None and found.state["scaler"] is not None:
        accelerator.scaler.load_state_dict(found.state["scaler"])
    try:
        return RunState(**progress | {"watch": Watch(**progress["watch"])})
    except TypeError as error:
        raise DataError(
            f"{root}: its checkpoint of step {found.step} is of another version of sslvit: {error}"
        ) from error


def about_model(objective: Objective, source: Images, steps: int) -> dict[str, Any]:
    """What is written about the model of a run of so many steps."""
    name = next(kind.__name__ for kind in type(objective).__mro__ if not kind.__name__.startswith("FSDP"))
    classes = list(source.classes or ()) if objective.head_state_dict() else None
    return {
        "objective": name,
        "readout": objective.readout,
        "steps": steps,
        "data": source.name,
        "classes": classes,
    }


def save_checkpoint(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: RunState,
    source: Images,
    config: TrainConfig,
    accelerator: Accelerator,
) -> bool:
    """Saves a checkpoint; if that fails, training can go on to the next one, and this says so."""
    saved, tensors = True, training_tensors(objective, optimizer)
    if accelerator.is_main_process:
        progress.memory = max(progress.memory, peak_memory(accelerator.device))
        scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        state = {"progress": asdict(progress), "config": configuration(config), "scaler": scaler}
        state |= {"data": data_fingerprint(source)}
        whole = progress.whole_batches and not isinstance(source, Stream)
        steps = steps_of(config, epoch_images(len(source), config, whole))
        head, about = sorted(objective.head_state_dict()), about_model(objective, source, steps)
        state |= {"model": written_about(objective.backbone, head, about)}
        try:
            check_still_ours(config.out)
            checkpoint.save(config.out / "checkpoints", progress.step, tensors, state, keep=config.keep)
        except CannotWrite as error:
            saved = False
            accelerator.print(f"warning: {error}. Training goes on; the next try is in {config.save_every} steps")
    return saved


def save_emergency_copy(
    objective: nn.Module, optimizer: torch.optim.Optimizer, progress: RunState, accelerator: Accelerator
) -> str:
    """A last try to keep the weights of a run whose folder takes nothing any more; says where they are."""
    tensors = training_tensors(objective, optimizer)
    if not accelerator.is_main_process:
        return ""
    try:
        place = Path(tempfile.mkdtemp(prefix="sslvit-"))
        durable.write(place / "tensors.safetensors", durable.tensor_pieces(tensors))
    except OSError as error:
        return f"Nor could its weights be kept elsewhere: {error.strerror or error}"
    return f"Its weights and moments at step {progress.step} are in {place}/tensors.safetensors"
