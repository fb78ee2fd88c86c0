"""What a user chooses about images and training, and which of it may change when a run goes on."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from sslvit import rng, schedule
from sslvit.data.image import MAX_PIXELS
from sslvit.data.pieces import Size, both
from sslvit.data.samples import Images, Source
from sslvit.data.source import open_source, room
from sslvit.data.stream import Stream
from sslvit.data.subset import Subset
from sslvit.data.views import THUMBNAIL, Plain, evaluation

MOST = {"epochs": 1e7, "batch_size": 1 << 24, "accumulation": 1 << 16, "timeout": 1e7}  # beyond it are only mistakes
LARGEST_SIDE = 1 << 14  # of the images that a model sees
WORKERS_A_CORE = 64


@dataclass(frozen=True)
class ImagesConfig:
    """Which images, and how they are read."""

    data: str = "shapes"
    """Images: shapes (built in), folder:/dir, list:/file, csv:/file, idx:/dir, npz:/file, hf:name, disk:/dir,
    parquet:/files, webdataset:/files."""
    image_size: Size = 224
    """Pixels of a side, or height and width: 224 320. Random crops keep their range of aspect ratios, 3:4 to 4:3 as in
    the papers, and are resized to this; images that are evaluated keep theirs and are cut to this, see --eval_crop."""
    image_column: str | None = None
    """Of a table: the column of images, where there are several; of a CSV file by name, or counted from 1."""
    label_column: str | None = None
    """Of a table: the column of labels, where it is not plain which."""
    root: Path | None = None
    """Of a list, CSV file or table whose lines or rows name files: the folder that these lie in; nothing outside it is
    read. By default that of the list or table itself."""
    canvas: int | None = None
    """The side of the square that larger images are scaled down to when they are read, before views are cut from it;
    by default 2.25 times the image size. Small crops of large photographs are sharper with more, and reading is
    slower."""
    eval_crop: float | None = None
    """Where images are evaluated: the share of the shorter side that the centre crop keeps. By default 0.875 (224 of
    256) above an image size of 96, 1 up to it; 0 squeezes the whole image into the image size instead."""
    range: tuple[float, float] | None = None
    """Of images of more than 8 bits: the values that become black and white, e.g. 0 4095 for 12 bits stored in 16. By
    default 0 and the largest that such files can hold. Images of 8 bits are left as they are."""
    max_pixels: int = MAX_PIXELS
    """An image file that says it has more is not decoded: it counts as unreadable."""
    only: tuple[int, ...] = ()
    """Of labelled images: only those of these classes, by number."""
    follow_links: bool = False
    """Of a folder: also read what links in it point to outside of it, and linked folders."""

    def __post_init__(self) -> None:
        size = tuple(np.atleast_1d(self.image_size).tolist())  # from JSON it is a list
        object.__setattr__(self, "image_size", size[0] if len(set(size)) == 1 else size)  # 224 224 is 224

    def reading(self, **chosen: Any) -> dict[str, Any]:
        """How images are read: arguments of open_source, of which others may be chosen."""
        names = ("image_size", "image_column", "label_column", "root", "canvas", "max_pixels", "follow_links")
        given = {name: getattr(self, name) for name in names} | {"span": self.span()} | chosen
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

    def eval_view(self, size: Size) -> Plain:
        """The view that images are evaluated by."""
        return evaluation(size, self.eval_crop)

    def source(self, split: str = "train", **chosen: Any) -> Source:
        """The images of a split, read by number."""
        found = open_source(self.data, split=split, **self.reading(**chosen))
        if not self.only:
            return found
        labels = found.required_labels()
        if missing := sorted(set(self.only) - set(labels.tolist())):
            raise ValueError(f"--only {missing}: {found.name} has classes 0 to {labels.max()}, and no image of these")
        return Subset(found, np.flatnonzero(np.isin(labels, self.only)))


@dataclass(frozen=True)
class DataConfig(ImagesConfig):
    """Which images, and which start, for every recipe that pretrains or trains from scratch."""

    start: str = ""
    """A model's folder, or its run's, also of one that has not ended, to start from instead of at random: its weights
    and its architecture."""
    data: str = "shapes"
    """Images: shapes (built in), folder:/dir, list:/file, csv:/file, idx:/dir, npz:/file, hf:name, disk:/dir,
    parquet:/files, webdataset:/files; stream:hf:name, stream:parquet:/files, stream:webdataset:/files for sets too
    large to keep."""
    images: int = 0
    """Only so many random ones of the training images; the smaller of two such parts is within the larger."""
    epoch_images: int = 0
    """Of a stream: how many images count as one pass, because nobody knows how many there are."""
    eval_data: str = ""
    """Labelled images to evaluate on while training, in the same words; by default those of --data."""
    channels: Literal[1, 3] | None = None
    """Of image files: 1 reads them as grey; by default 3. Arrays have their own."""

    def open(self) -> Images:
        kind, _, spec = self.data.partition(":")
        if kind == "stream":
            given = self.reading(channels=self.channels or 3)
            size, _ = given.pop("image_size"), given.pop("follow_links")
            if self.only or self.images:
                given = f"--only {self.only}" if self.only else f"--images {self.images}"
                raise ValueError(f"{given} is not for streams: what is in them is not known beforehand")
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
class TrainConfig:
    """What every recipe lets its user choose about training."""

    out: Path = Path("runs/run")
    """The run's folder: configuration, log, checkpoints, and the model."""
    epochs: float = 100
    """Passes over the images. With --resume a run may be made longer, or shorter than it was to be."""
    batch_size: int = 256
    """Images a step, over all processes."""
    accumulation: int = 1
    """Parts that a process's share of a batch is computed in, one after another, to save memory."""
    lr: float = 0.0
    """Peak learning rate, at this batch size; 0 takes --base_lr."""
    base_lr: float = 0.0
    """Peak learning rate for each 256 images of a batch. Give this or --lr: either replaces the preset's other."""
    final_lr: float = 0.0
    """Where the learning rate ends."""
    warmup_epochs: float = 1
    """Passes over which the learning rate rises from 0; then it falls by half a cosine."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    layer_decay: float = 1.0
    """The factor of the learning rate from each block of the backbone to the one before it, for fine-tuning."""
    weight_decay: float = 0.0
    """AdamW's, multiplied by the learning rate; what is spared is the objective's custom."""
    spares: Literal["tokens_and_vectors", "vectors", "nothing"] = "tokens_and_vectors"
    """What weight decay spares: biases and norms, and with the default positions and tokens as well."""
    final_weight_decay: float | None = None
    """Where the weight decay ends, by half a cosine; by default it stays."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's; the first is SGD's momentum."""
    clip: float = 0.0
    """The global gradient norm above which gradients are scaled down to it; 0 never does."""
    clip_each: float = 0.0
    """The same for each parameter by itself, as DINO does; 0 never does."""
    skip_spikes: float = 0.0
    """Leave out steps whose gradient norm is more than so many times the median of the last 64; 0 never does."""
    precision: Literal["no", "bf16", "fp16"] | None = None
    """Mixed precision; by default what `accelerate launch` was told."""
    grad_checkpointing: bool = False
    """Keep only what goes into each block for the backward pass, which computes it again: a fraction of the memory."""
    shard: bool = False
    """Split weights, gradients and moments among the processes (FSDP2), for models that are too large for one."""
    compile: bool = False
    """Compile the backbone's blocks; pays on a GPU."""
    seed: int = 0
    workers: int = 0
    """Processes that read images, for each training process. Images held in memory need none."""
    timeout: float = 600
    """Seconds that a process waits for images from a worker, or for another process, before the run stops."""
    max_bad: float = 0.01
    """The share of images that may be unreadable: they are named in bad_images.jsonl and replaced by others. In a set
    of fewer than 800 as many as in 800, but at most an eighth of it. 0 stops at the first."""
    threads: int = 0
    """Threads of each process on a CPU; 0 shares out the cores."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    stop_on_collapse: bool = False
    """Stop when the features have collapsed; by default the run warns and goes on."""
    evaluate_every: float = 0
    """Passes between evaluations; 0 evaluates before and after only."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    resume: bool = False
    """Go on from the folder's newest checkpoint that verifies; start if there is none."""
    allow_data_change: bool = False
    """Go on with --resume also where the images, by number, names, sizes or labels, are not those of before."""
    overwrite: bool = False
    """Delete the run that is in the folder."""
    show_views: Path | None = None
    """A PNG to write instead of training: the first images beside the views that training would see of them."""
    dry_run: bool = False
    """Go through everything once, say what the run will take, and train nothing."""
    log_with: tuple[str, ...] = ()
    """Trackers to log to as well, by Accelerate's names: tensorboard, wandb, trackio, ...; the extra `trackers` has
    these."""
    before: ClassVar[dict[str, Any]] = {}  # what was done before an option was there, if that is not its default now

    def learning_rate(self, progress: float) -> float:
        warmup = min(self.warmup_epochs / self.epochs, 1.0)
        return schedule.warmup_cosine(progress, self.lr, warmup=warmup, end=self.final_lr)

    def check(self) -> None:
        for name, value in asdict(self).items():
            if not all(math.isfinite(x) for x in np.atleast_1d(value) if isinstance(x, float)):
                raise ValueError(f"--{name} is {value}; it must be finite")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay is {self.layer_decay}; it must be in (0, 1]")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"--max_bad is {self.max_bad}; it is a share, from 0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--betas are {self.betas}; they must be in [0, 1)")
        if self.workers > WORKERS_A_CORE * (os.cpu_count() or 1):
            raise ValueError(
                f"--workers is {self.workers}; this machine has {os.cpu_count()} cores, and a worker or two a core is "
                "usual"
            )
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"--{name} is {getattr(self, name):g}; it must not be above {most:g}")
        for name in ("epochs", "batch_size", "accumulation", "lr", "log_every", "save_every", "keep", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be above 0")
        for name in (
            "final_lr",
            "warmup_epochs",
            "weight_decay",
            "clip",
            "clip_each",
            "skip_spikes",
            "workers",
            "threads",
            "evaluate_every",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must not be negative")


# Everything decides what is computed unless it is listed here.
FREE = frozenset(
    [
        "out",
        "data",  # where the images lie; what they are is compared by itself
        "root",
        "allow_data_change",
        "max_bad",
        "workers",
        "timeout",
        "log_every",
        "save_every",
        "keep",
        "resume",
        "overwrite",
        "show_views",
        "dry_run",
        "log_with",
        "stop_on_collapse",
        "grad_checkpointing",
    ]
)
ROUNDED = frozenset(["threads", "compile", "precision", "shard"])  # so the run goes on, but not bit for bit
MEASURED = frozenset(["eval_crop"])
WARNED = ROUNDED | MEASURED
LENGTH = frozenset(["epochs"])  # the run goes on by the schedules of its new length, see sslvit.resume.check_length


def plain(value: Any) -> Any:
    """JSON's view of a configuration, so that a saved one and a new one compare."""
    return json.loads(json.dumps(value, default=str))


def configuration(config: Any) -> dict[str, Any]:
    return plain(asdict(config))


def with_old_crop(saved: dict[str, Any], image_size: Size) -> dict[str, Any]:
    """Settings that were saved before there was --eval_crop, with what was done then: whole images were squeezed. Of
    square thumbnails that is what is done now."""
    return ({"eval_crop": 0.0} if max(both(image_size)) > THUMBNAIL else {}) | saved


def steps_of(config: TrainConfig, images: int) -> int:
    """images: those of an epoch."""
    return max(1, math.ceil(config.epochs * images / config.batch_size))


def check_unchanged(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Refuses a restart that would compute something else; returns warnings for what changes rounding or evaluation
    only."""
    keys = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
    changed = {}
    for key in (key for key in keys if key not in FREE | LENGTH):
        today = f"is now {now[key]!r}" if key in now else "and this version has no such option"
        changed[key] = f"{key} was {saved.get(key)!r}, {today}"
    refused = [text for key, text in changed.items() if key not in WARNED]
    if refused:
        raise ValueError(
            f"--resume would go on with another run: {'; '.join(refused)}. Give the old values, or start anew with "
            f"another --out or --overwrite"
        )
    less = "the run goes on, but rounds differently from here"
    other = "the run goes on, but evaluations from here do not compare with those before"
    return [f"{text}: {other if key in MEASURED else less}" for key, text in changed.items()]
