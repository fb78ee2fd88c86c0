"""What a user chooses about images and training: each option with its default, its bounds, its help, and whether a
run that is resumed may change it."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np

from sslvit import rng
from sslvit.data.image import MAX_PIXELS
from sslvit.data.source import Images, Source, room
from sslvit.data.spec import open_source
from sslvit.data.stream import Stream
from sslvit.data.subset import Subset
from sslvit.objectives import schedule
from sslvit.views.batching import Size
from sslvit.views.pretraining import EvalView, eval_view

LARGEST_SIDE = 1 << 14  # pixels of the images that a model sees
WORKERS_PER_CORE = 64

FREE = "free"  # decides nothing about what is computed
ROUNDING = "rounding"  # the run goes on, but no longer bit for bit
EVALUATION = "evaluation"  # later evaluations do not compare with earlier ones
LENGTH = "length"  # the schedules become those of the new length, see training/state.py


def option(
    default: Any,
    resume: str = "fixed",
    *,
    above: float | None = None,
    least: float | None = None,
    most: float = math.inf,
) -> Any:
    """A field of a configuration. resume: what a resumed run does with another value; "fixed" refuses it."""
    return field(default=default, metadata={"resume": resume, "above": above, "least": least, "most": most})


def rules(kind: type) -> dict[str, Mapping[str, Any]]:
    """What `option` said of each field. A recipe that gives an option another default leaves the rest as it was."""
    bases = [base for base in reversed(kind.__mro__) if is_dataclass(base)]
    return {one.name: one.metadata for base in bases for one in fields(base) if one.metadata}


def check_bounds(config: Any) -> None:
    """Each option against its own bounds, which every one of several values keeps, and all numbers for being finite."""
    for name, value in vars(config).items():
        if not all(math.isfinite(x) for x in np.atleast_1d(value) if isinstance(x, float)):
            raise ValueError(f"--{name} is {value}; it must be finite")
    several = {one.name for one in fields(config) if Ellipsis in get_args(one.type)}  # tuple[float, ...]
    for name, bounds in rules(type(config)).items():
        chosen = getattr(config, name)
        above, least, values = bounds["above"], bounds["least"], chosen if isinstance(chosen, tuple) else (chosen,)
        if name in several and (above, least) != (None, None) and not 0 < len(chosen) == len(set(chosen)):
            raise ValueError(f"--{name} {' '.join(map(str, chosen))}: give one value or more, and each once")
        for value in (value for value in values if isinstance(value, int | float)):
            if above is not None and not value > above:
                raise ValueError(f"--{name} is {value}; it must be above {above:g}")
            if least is not None and not value >= least:
                raise ValueError(f"--{name} is {value}; it must be at least {least:g}")
            if value > bounds["most"]:
                raise ValueError(f"--{name} is {value:g}; it must be at most {bounds['most']:g}")


def completes(step: int, every: float) -> bool:
    """Whether this step completes another `every` steps, which need not be whole; 0 never does."""
    return every > 0 and int(step / every) > int((step - 1) / every)


@dataclass(frozen=True)
class Options:
    """What all configurations share."""

    def __post_init__(self) -> None:
        for one in fields(self):
            is_path = one.type is Path or isinstance(one.default, Path)
            if is_path and isinstance(value := getattr(self, one.name), str):
                object.__setattr__(self, one.name, Path(value))  # from Python a text will do


@dataclass(frozen=True)
class ImagesConfig(Options):
    """Which images, and how they are read."""

    group: ClassVar[str] = "Images"
    data: str = option("shapes", FREE)  # where the images lie; what they are is compared separately
    """Images: folder:/dir, hf:name, shapes, ... Shapes are built in. Also list:/file, csv:/file, idx:/dir,
    npz:/file, disk:/dir, parquet:/files, webdataset:/files."""
    image_size: Size = 224
    """Side in pixels, or height and width: 224 320. Random crops have aspect ratios from 3:4 to 4:3, as in the papers,
    and are resized to this; evaluation keeps an image's own and crops to this, see --eval_crop."""
    image_column: str | None = None
    """Tables only: the image column, if there are several; in a CSV file its name, or its number counted from 1."""
    label_column: str | None = None
    """Tables only: the label column, if it cannot be inferred."""
    root: Path | None = option(None, FREE)
    """Lists, CSV files and tables that name files: the folder of those files; nothing outside it is read. By default
    the folder of the list or table itself."""
    canvas: int | None = None
    """Larger images are scaled down to this side when they are read, before views are cropped from them; by default
    2.25 times the image size. A larger canvas makes small crops of large photographs sharper, and reading slower."""
    eval_crop: float | None = option(None, EVALUATION)
    """Evaluation: the share of the shorter side that the centre crop keeps. By default 0.875 (224 of 256) above an
    image size of 96, and 1 up to it; 0 squeezes the whole image into the image size instead."""
    range: tuple[float, float] | None = None
    """Images of more than 8 bits: the values that become black and white, e.g. 0 4095 for 12 bits stored in 16. By
    default 0 and the largest value that such files can hold. 8-bit images are left as they are."""
    max_pixels: int = MAX_PIXELS
    """Image files with more pixels than this are not decoded; they count as unreadable."""
    only_classes: tuple[int, ...] = ()
    """Labelled images: use only these classes, by number."""
    follow_links: bool = False
    """Folders: also follow links that point outside, and linked folders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        size = tuple(np.atleast_1d(self.image_size).tolist())  # from JSON it is a list
        object.__setattr__(self, "image_size", size[0] if len(set(size)) == 1 else size)  # 224 224 is 224

    def reading(self, **chosen: Any) -> dict[str, Any]:
        """How images are read: arguments of open_source, of which others may be chosen."""
        given: dict[str, Any] = {
            "image_size": self.image_size,
            "image_column": self.image_column,
            "label_column": self.label_column,
            "root": self.root,
            "canvas": self.canvas,
            "max_pixels": self.max_pixels,
            "follow_links": self.follow_links,
            "span": self.span(),
        } | chosen
        for name in ("image_size", "canvas", "max_pixels"):
            shown = " ".join(map(str, np.atleast_1d(given[name])))
            if given[name] is not None and np.min(given[name]) < 1:
                raise ValueError(f"--{name} is {shown}; it must be above 0")
            if name != "max_pixels" and given[name] is not None and np.max(given[name]) > LARGEST_SIDE:
                raise ValueError(f"--{name} is {shown}; it must not be above {LARGEST_SIDE}")
        self.eval_view(given["image_size"])  # so that what it refuses is refused before anything is trained
        return given

    def span(self) -> tuple[float, float] | None:
        if self.range is None:
            return None
        low, high = map(float, self.range)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"--range is {low:g} {high:g}; the first must be below the second")
        return low, high

    def eval_view(self, size: Size) -> EvalView:
        """The view that images are evaluated by."""
        return eval_view(size, self.eval_crop)

    def source(self, split: str = "train", **chosen: Any) -> Source:
        """The images of a split, read by number."""
        found = open_source(self.data, split=split, **self.reading(**chosen))
        if not self.only_classes:
            return found
        labels = found.required_labels()
        if missing := sorted(set(self.only_classes) - set(labels.tolist())):
            flag = f"--only_classes {' '.join(map(str, missing))}"
            raise ValueError(f"{flag}: {found.name} has classes 0 to {labels.max()}, and no image of these")
        return Subset(found, np.flatnonzero(np.isin(labels, self.only_classes)))


@dataclass(frozen=True)
class LabelledConfig(ImagesConfig):
    """Labelled images to learn from and to test on."""

    test_data: str = option("", EVALUATION)
    """Labelled images to test on, in the form of --data: their test split, or all of them. By default the test split of
    --data; without one, a tenth of its images is held out."""


@dataclass(frozen=True)
class DataConfig(ImagesConfig):
    """Which images, and which initial weights, for every recipe that pretrains or trains from scratch."""

    group: ClassVar[str] = "Images"
    init_from: str = ""
    """Start from this model instead of at random. The folder of a model or of a run, finished or not; the run takes
    its weights and its architecture."""
    inflate: str = ""
    """Images of other channels than --init_from's: `mean`, or the old channel that each starts from, e.g. 0,1,2,1."""
    data: str = option("shapes", FREE)
    """Images: folder:/dir, hf:name, shapes, ... Shapes are built in. Also list:/file, csv:/file, idx:/dir,
    npz:/file, disk:/dir, parquet:/files, webdataset:/files; stream:hf:name, stream:parquet:/files,
    stream:webdataset:/files for datasets too large for the local disk."""
    images: int = option(0, least=0)
    """Use only this many training images, drawn at random; 0 uses all. A smaller draw is a subset of a larger one."""
    epoch_images: int = option(0, least=0)
    """Streams: how many images count as one pass, since a stream does not say how many it has."""
    eval_data: str = ""
    """Labelled images to evaluate on during training, in the form of --data; by default those of --data."""
    channels: Literal[1, 3] | None = None
    """Image files: 1 reads them as grey; by default 3. Arrays have their own."""

    def open(self) -> Images:
        if not self.data:  # a preset of a paper, whose images everybody has elsewhere
            raise ValueError("--data is missing; shapes are the built-in images, folder:/dir those of a folder")
        kind, _, spec = self.data.partition(":")
        if kind == "stream":
            given = self.reading(channels=self.channels or 3)
            size, _ = given.pop("image_size"), given.pop("follow_links")
            if self.only_classes or self.images:
                flag = f"--only_classes {self.only_classes}" if self.only_classes else f"--images {self.images}"
                raise ValueError(f"{flag} does not work with streams: what they contain is not known in advance")
            given["canvas"] = given["canvas"] or room(int(np.max(size)))
            return Stream(spec, epoch_images=self.epoch_images, **given)
        if self.epoch_images:
            raise ValueError(f"--epoch_images is for streams: a pass over {self.data} is all its images")
        return self.some_of(self.source(channels=self.channels))

    def some_of(self, found: Source) -> Source:
        if not self.images:
            return found
        if not 0 < self.images <= len(found):
            raise ValueError(f"--images {self.images:,}: {found.name} has {len(found):,}")
        order = rng.permutation(rng.key(0, "images"), len(found)).numpy()
        return Subset(found, np.sort(order[: self.images]))


@dataclass(frozen=True)
class TrainConfig(Options):
    """What every recipe lets its user choose about training. In Python each is an argument of `pretrain`.

    >>> import sslvit
    >>> sslvit.TrainConfig(base_lr=1e-3, batch_size=512).with_rate().lr
    0.002
    """

    group: ClassVar[str] = "Training"
    out: Path = option(Path("runs/run"), FREE)
    """The run's folder. Configuration, log, checkpoints, the model and its report are in it."""
    epochs: float = option(100, LENGTH, above=0, most=1e7)
    """Passes over the images. A resumed run may be made longer or shorter."""
    batch_size: int = option(256, above=0, most=1 << 24)
    """Images per step, over all processes."""
    accumulation: int = option(1, ROUNDING, above=0, most=1 << 16)
    """Compute each process's share of a batch in this many micro-batches, to save memory."""
    lr: float = option(0.0, above=0)
    """Peak learning rate, at this batch size; 0 takes --base_lr."""
    base_lr: float = option(0.0)
    """Peak learning rate per 256 images of a batch. Give this or --lr: either replaces the preset's other."""
    lr_rule: Literal["linear", "sqrt"] = "linear"
    """How --base_lr grows with the batch: in proportion, or with the root of it."""
    final_lr: float = option(0.0, least=0)
    """Learning rate at the end."""
    lr_drops: tuple[float, ...] = ()
    """Shares of training after which the learning rate falls to a tenth. Without any it falls along half a cosine."""
    warmup_epochs: float = option(1, least=0)
    """Passes over which the learning rate rises from 0; then it falls along half a cosine."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum (the first of --betas)."""
    layer_decay: float = option(1.0, above=0, most=1)
    """Multiply the learning rate by this from each block of the backbone to the one before it, for fine-tuning."""
    weight_decay: float = option(0.0, least=0)
    """AdamW's, multiplied by the learning rate. Which parameters are exempt depends on the method."""
    no_weight_decay: Literal["tokens_and_vectors", "vectors", "nothing"] = "tokens_and_vectors"
    """Exempt from weight decay: biases and norms (vectors), and by default positions and tokens as well."""
    final_weight_decay: float | None = None
    """Weight decay at the end, reached along half a cosine; by default it stays."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's; the first is SGD's momentum."""
    clip: float = option(0.0, least=0)
    """Clip gradients to this global norm; 0 disables clipping."""
    clip_each: float = option(0.0, least=0)
    """Clip each parameter's gradient to this norm, as DINO does; 0 disables it."""
    skip_spikes: float = option(0.0, least=0)
    """Skip steps whose gradient norm exceeds this many times the median of the last 64; 0 never skips."""
    precision: Literal["no", "bf16", "fp16"] | None = option(None, ROUNDING)
    """Mixed precision; by default what `accelerate launch` was told."""
    grad_checkpointing: bool = option(False, FREE)
    """Store only each block's input for the backward pass, which recomputes the rest: a fraction of the memory."""
    shard: bool = option(False, ROUNDING)
    """Split weights, gradients and moments among the processes (FSDP2), for models too large for one."""
    compile: bool = option(False, ROUNDING)
    """Compile the backbone's blocks; pays on a GPU."""
    seed: int = 0
    """Of all random numbers. Weights, order, views and masks are drawn by it."""
    workers: int = option(0, FREE, least=0)
    """Processes that read images. Each training process has so many; images in memory need none."""
    timeout: float = option(600, FREE, above=0, most=1e7)
    """Seconds that a process waits for images from a worker, or for another process, before the run stops."""
    max_bad: float = option(0.01, FREE, least=0, most=1)
    """Tolerated share of unreadable images; they are listed in bad_images.jsonl and replaced by others. Sets of fewer
    than 800 images may have as many as 800 would, up to one eighth. 0 stops at the first."""
    threads: int = option(0, ROUNDING, least=0)
    """CPU threads per process; 0 divides the cores evenly."""
    log_every: int = option(10, FREE, above=0)
    """Steps between lines of metrics.jsonl."""
    stop_on_collapse: bool = option(False, FREE)
    """Stop when the features have collapsed; by default the run warns and goes on."""
    evaluate_every: float = option(0, least=0)
    """Passes between evaluations; 0 evaluates before and after training only."""
    save_every: int = option(200, FREE, above=0)
    """Steps between checkpoints."""
    keep: int = option(2, FREE, above=0)
    """How many checkpoints to keep."""
    resume: bool = option(False, FREE)
    """Continue from the newest intact checkpoint in --out; start from step 0 if there is none."""
    allow_data_change: bool = option(False, FREE)
    """Resume even if the images differ from before in number, names, sizes or labels."""
    overwrite: bool = option(False, FREE)
    """Delete the run that is in --out."""
    show_views: Path | None = option(None, FREE)
    """Draw the first images and their views, and stop. A PNG, with the views that training would see."""
    dry_run: bool = option(False, FREE)
    """Try one step, estimate time and memory. Nothing is trained."""
    plan: tuple[str, ...] = option((), FREE)
    """With --dry_run: whether it fits GPUs that are not here, e.g. h100:80GB x 8."""
    log_with: tuple[str, ...] = option((), FREE)
    """Also log to these trackers, by Accelerate's names: tensorboard, wandb, trackio, ...; the extra `trackers`
    installs these."""
    start_is_evaluated: ClassVar[bool] = True
    backbone_apart: ClassVar[bool] = False  # whether the backbone has another learning rate than the heads
    chosen_by: ClassVar[str] = "preset"  # the option that names the defaults of the others
    before: ClassVar[dict[str, Any]] = {}  # what was done before an option existed, where that is not its default now

    def is_evaluated(self, step: int, steps: int, epoch_images: int) -> bool:
        """Whether numbers are due after this step of so many."""
        return step == steps or completes(step, self.evaluate_every * epoch_images / self.batch_size)

    def learning_rate(self, progress: float) -> float:
        warmup = min(self.warmup_epochs / self.epochs, 1.0)
        if self.lr_drops:
            return schedule.warmup_steps(progress, self.lr, warmup=warmup, drops=self.lr_drops)
        return schedule.warmup_cosine(progress, self.lr, warmup=warmup, end=self.final_lr)

    def backbone_rate(self, progress: float) -> float:
        """What the learning rate of the backbone is multiplied by, where it is apart."""
        return 1.0

    def with_rate(self) -> Self:
        """With the peak learning rate that --base_lr stands for, where --lr is not given."""
        factor = (self.batch_size / 256) ** (0.5 if self.lr_rule == "sqrt" else 1)
        return self if self.lr else replace(self, lr=self.base_lr * factor)

    def check(self) -> None:
        check_bounds(self)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--betas are {self.betas}; they must be in [0, 1)")
        if not all(0 < drop < 1 for drop in self.lr_drops) or len(set(self.lr_drops)) < len(self.lr_drops):
            raise ValueError(
                f"--lr_drops {' '.join(map(str, self.lr_drops))}: these are shares of training, between 0 and 1, each "
                "once; give 0.875 for the 700th of 800 epochs"
            )
        if self.lr_drops and self.final_lr:
            raise ValueError(f"--final_lr {self.final_lr:g} ends a cosine, and --lr_drops has none: leave one out")
        if self.workers > WORKERS_PER_CORE * (os.cpu_count() or 1):
            raise ValueError(
                f"--workers is {self.workers}; this machine has {os.cpu_count()} cores, and one or two workers "
                "per core are usual"
            )


@dataclass(frozen=True)
class PretrainConfig(TrainConfig, DataConfig):
    """What every recipe lets its user choose that trains a backbone, from random weights or from --init_from."""

    image_size: Size = 32
    model: str = "XS/4"
    """Width and patch size: XS/4, S/16, B/16, ... Widths are XS, mu, Ti, S, S-moco_v3 (12 heads), M, B, L, H
    and others, which an unknown one lists."""


def steps_of(config: TrainConfig, images: int) -> int:
    """images: those of an epoch."""
    return max(1, math.ceil(config.epochs * images / config.batch_size))
