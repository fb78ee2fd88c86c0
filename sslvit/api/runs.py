"""Pretraining and fine-tuning as one call each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sslvit import finetuning, train
from sslvit.api.calls import check_names, public
from sslvit.api.images import READING, labelled_pair, opened
from sslvit.api.models import Model, backbone_of, load_model
from sslvit.config import FREE, TrainConfig, option
from sslvit.data.source import Images, Source
from sslvit.errors import DataError
from sslvit.evaluate.metrics import Metrics
from sslvit.evaluate.monitor import Monitor
from sslvit.evaluate.predictions import Predictions
from sslvit.finetuning import PROTOCOLS, FinetuneConfig
from sslvit.models.readout import Classifier
from sslvit.objectives import OBJECTIVES
from sslvit.objectives.objective import Objective
from sslvit.processes import signals
from sslvit.processes.collectives import start_run
from sslvit.processes.traces import without_trace
from sslvit.reports.live import LiveReport
from sslvit.reports.run import finish
from sslvit.reports.tested import read_test
from sslvit.runs.log import METRICS, evaluations
from sslvit.storage import jsonl, sealed
from sslvit.views.batching import Size
from sslvit.views.pretraining import is_thumbnail
from sslvit.weights.backbone import with_random_weights
from sslvit.weights.channels import with_channels

COMMANDS = {"show_views", "dry_run"}  # options of TrainConfig that train nothing
OWN = {"lr": 5e-4, "weight_decay": 0.05, "clip": 1.0}  # of an objective that is not one of ours


@dataclass(frozen=True)
class Settings(TrainConfig):
    """The settings of a run that was begun from Python, as they are recorded and compared when it is resumed."""

    objective: str = ""
    objective_options: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    model_options: dict[str, Any] = field(default_factory=dict)
    image_size: Size = 224
    views: str = ""
    data: str = option("", FREE)  # what the images are is compared separately


@dataclass(frozen=True)
class Run:
    """A run's folder, of a run that has ended or that is going on.

    >>> import sslvit
    >>> objective = sslvit.MPP(sslvit.ViT.variant("mu/8", image_size=16))
    >>> run = sslvit.pretrain(
    ...     objective, "shapes:n=64", out="runs/tiny", epochs=2, evaluate=False
    ... )  # doctest: +ELLIPSIS
    shapes (64 labelled by shape)...
    >>> sslvit.Run("runs/tiny").metrics[-1]["step"], run.model.name
    (2, 'mu/8')
    """

    out: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of its log: the step, the loss, the learning rate, ..."""
        return list(jsonl.read_lines(self.out / METRICS))

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Those lines that hold an evaluation, the first of the model as it began."""
        return evaluations(self.out)

    @property
    def model(self) -> Any:
        """The backbone, in evaluation mode; of a run that has not ended, that of its newest checkpoint."""
        return load_model(self.out)

    @property
    def report(self) -> Path:
        """The page with its curves and pictures."""
        return self.out / "report.html"

    def __repr__(self) -> str:
        if not (self.out / METRICS).exists():
            return f"Run({str(self.out)!r}): nothing is logged there"
        last, evaluated = (self.metrics or [{}])[-1], (self.evaluations or [{}])[-1]
        numbers = [f"step {last.get('step', 0):,}"]
        numbers += [f"loss {last['loss']:.4g}"] if isinstance(last.get("loss"), float) else []
        numbers += [f"{name[5:]} {value:.1%}" for name, value in evaluated.items() if name.startswith("eval/")]
        return f"Run({str(self.out)!r}): {', '.join(numbers)}"


@public
def pretrain(
    objective: Objective,
    images: Any,
    *,
    out: str | Path,
    epochs: float | None = None,
    batch_size: int | None = None,
    views: Any = None,
    test_images: Any = None,
    evaluate: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Run:
    """Trains the backbone of an objective, in place, and leaves in the folder `out` what a recipe leaves: the model,
    the log, checkpoints and a report. The random start and the result are evaluated by nearest neighbours and few-shot.

    images: what `open_images` takes, or gives. test_images: labelled ones to evaluate on; by default the test split of
    images that are named by a text, else a tenth that is held out of labelled images (not for Supervised, which trains
    on their labels). Without labels, and with evaluate=False, nothing is evaluated.
    epochs, batch_size, options: by default those of the objective's recipe. Up to images of 96 px they are those of its
    preset small; above, those of the paper with a batch of 256 and 100 epochs. Each option of `TrainConfig` is an
    argument: lr, base_lr, weight_decay, warmup_epochs, precision, workers, seed, evaluate_every, log_with, ...
    views: by default objective.default_views(image_size, channels).
    resume: continue the run in `out`, bit for bit, with the same arguments. overwrite: delete it.

    Ctrl-C ends the run after its step, saved, by errors.Preempted. The objective stays on the device that trained it;
    nothing else in the process is changed.

    >>> import sslvit
    >>> objective = sslvit.MAE(sslvit.ViT.variant("mu/8", image_size=16), decoder_width=16, decoder_heads=2)
    >>> run = sslvit.pretrain(objective, "shapes:n=64", out="runs/mae", epochs=1, evaluate=False)  # doctest: +ELLIPSIS
    shapes (64 labelled by shape)...
    >>> len(run.metrics), run.report.exists()
    (1, True)
    """
    known = {one.name for one in fields(TrainConfig)} - COMMANDS
    check_names(options, known, "pretrain")
    chosen = {"epochs": epochs, "batch_size": batch_size}
    options |= {name: value for name, value in chosen.items() if value is not None}
    options |= {"out": Path(out), "resume": resume, "overwrite": overwrite}
    backbone = objective.backbone
    size, channels = backbone.image_size, backbone.channels
    views = views or objective.default_views(side_of(size), channels)
    settings = configured(objective, views, options)
    with without_trace(), signals.listening(), as_it_was(objective):
        accelerator = start_run(settings)
        source = opened(images, image_size=size, channels=channels)
        settings = replace(settings, data=source.name)
        monitor = monitor_of(objective, images, source, test_images, accelerator) if evaluate else None
        live = LiveReport(settings, objective, source, views, accelerator)
        evaluated = train.pretrain(objective, source, views, settings, accelerator, monitor, live)
        finish(settings, objective, source, views, evaluated, accelerator)
    backbone.declared = objective.readout
    return Run(settings.out)


def side_of(size: tuple[int, int]) -> Size:
    """One number for a square."""
    return size[0] if size[0] == size[1] else size


def configured(objective: Objective, views: Any, options: dict[str, Any]) -> Settings:
    """The objective's defaults, with the options on top."""
    if options.get("lr") and options.get("base_lr"):
        raise ValueError("lr and base_lr both set the learning rate: give one of them")
    values = defaults(objective) | options
    if options.get("base_lr"):
        values["lr"] = 0.0
    if "warmup_epochs" not in options and "epochs" in options:
        shorter = min(values["warmup_epochs"], values["epochs"] / 10)
        before = sealed.intact(options["out"] / "config.json") if options.get("resume") else {}
        values["warmup_epochs"] = before.get("warmup_epochs", shorter)  # a run may be made longer
    backbone = objective.backbone
    settings = Settings(
        objective=type(objective).__name__,
        objective_options=options_of(objective),
        model=backbone.name,
        model_options=asdict(backbone.config),
        image_size=side_of(backbone.image_size),
        views=repr(views) if is_dataclass(views) else getattr(views, "__qualname__", type(views).__qualname__),
        **values,
    ).with_rate()
    settings.check()
    return settings


def options_of(objective: Objective) -> dict[str, Any]:
    """The numbers and texts that it was made with, so that another one does not continue its run."""
    values = {name: value for name, value in vars(objective).items() if name[0] != "_" and name != "training"}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str | tuple)}


def defaults(objective: Objective) -> dict[str, Any]:
    """How an objective is trained: as its recipe does, or one of the user's own by AdamW."""
    modules = [kind.__module__ for kind in type(objective).__mro__]
    recipe = next((name for name in OBJECTIVES if f"sslvit.objectives.{name}" in modules), None)
    small = is_thumbnail(objective.backbone.image_size)
    if recipe is None:
        preset: TrainConfig = TrainConfig(**OWN, epochs=20, batch_size=64, warmup_epochs=2)  # type: ignore[arg-type]
    else:
        preset = list(import_module(f"sslvit.recipes.{recipe}").PRESETS.values())[0 if small else 1]
    if not small:
        preset = replace(preset, epochs=100, batch_size=256, warmup_epochs=min(preset.warmup_epochs, 10))
    return {one.name: getattr(preset, one.name) for one in fields(TrainConfig) if one.name not in COMMANDS}


@contextmanager
def as_it_was(module: nn.Module) -> Iterator[None]:
    """After its `with` block a module computes in its own precision again and keeps what it kept for the backward pass:
    Accelerate wraps its forward, and --grad_checkpointing stays with its blocks."""
    forward = {name: vars(module)[name] for name in ("forward", "_original_forward") if name in vars(module)}
    flags = {child: child.grad_checkpointing for child in module.modules() if "grad_checkpointing" in vars(child)}
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            vars(module).pop(name, None)
        vars(module).update(forward)
        for child, flag in flags.items():
            child.grad_checkpointing = flag


def monitor_of(objective: Objective, images: Any, source: Images, test_images: Any, accelerator: Any) -> Monitor | None:
    """The recipes' monitor; where there is nothing to evaluate on, None, and the reason is printed."""
    if source.labels is None:
        if test_images is not None:
            raise DataError(f"test_images are compared with labelled training images: {source.unlabelled}")
        accelerator.print(f"Accuracy is not measured: {source.name} has no labels ({source.unlabelled})")
        return None
    assert isinstance(source, Source), "streams have no labels"
    size = side_of(objective.backbone.image_size)
    trains_on_labels = objective.uses_labels or bool(objective.head_state_dict())
    try:
        pair = labelled_pair(images, source, test_images, size, hold_out=not trains_on_labels)
    except DataError as error:
        if test_images is not None:
            raise
        pair = str(error)
    if isinstance(pair, str):
        accelerator.print(f"Accuracy is not measured: {pair}")
        return None
    return Monitor(*pair, size, accelerator)


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model, and what it scored on the test images."""

    out: Path
    accuracy: float  # in [0, 1]
    metrics: dict[str, float]  # top1, top5, mean_per_class, calibration_error
    predictions: Predictions
    rates: dict[float, float]  # the held-out accuracy of each learning rate that was tried

    @property
    def classifier(self) -> Classifier:
        """In evaluation mode: images in [0, 1] to scores of the classes."""
        return load_model(self.out, head=True)

    def __repr__(self) -> str:
        return f"Finetuned({str(self.out)!r}): {self.accuracy:.1%} of {len(self.predictions.labels):,} test images"


@public
def finetune(
    model: Model | Objective | str | Path,
    images: Any,
    test_images: Any = None,
    *,
    out: str | Path,
    protocol: str = "vit",
    image_size: Size | None = None,
    readout: Literal["cls", "mean"] | None = None,
    **options: Any,
) -> Finetuned:
    """Trains all weights of a copy of a model on labelled images, and reads it on the test images once.

    model: as of `load_model`, or its path. images, test_images: what `open_images` takes; without test images the test
    split of images that are named by a text, else a tenth of the images, which is not trained on.
    protocol: vit takes 10,000 steps at a learning rate of four that is chosen on held-out labels; modern is MAE's, of
    100 epochs. options: steps, lr, rates, batch_size, fraction, shots, resume, ... of finetuning.FinetuneConfig.

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=16)
    >>> tuned = sslvit.finetune(
    ...     vit, "shapes:n=64", out="runs/tuned", steps=2, lr=0.1, batch_size=16
    ... )  # doctest: +ELLIPSIS
    shapes (64 labelled by shape)...
    >>> 0 <= tuned.accuracy <= 1, tuned.classifier.head.weight.shape
    (True, torch.Size([12, 32]))
    """
    known = {one.name for one in fields(FinetuneConfig)} - COMMANDS - {"data", "test_data", "model", "foreign"}
    check_names(options, known, "finetune")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    backbone, declared = backbone_of(load_model(model) if isinstance(model, str | Path) else model)
    read: Any = readout or declared
    if read not in ("cls", "mean"):
        raise ValueError(f"readout must be cls or mean, got {read!r}")
    size = image_size or side_of(backbone.image_size)
    named = Path(str(model)) if isinstance(model, str | Path) else Path(backbone.name)
    config = replace(PROTOCOLS[protocol], **options, out=Path(out), model=named, image_size=size)
    config = finetuning.settled(config)
    config.check()
    with without_trace(), signals.listening():
        accelerator = start_run(config)
        reading = {name: value for name, value in options.items() if name in READING}
        channels = None if config.inflate else backbone.channels
        source = opened(images, image_size=size, channels=channels, **reading)
        source.required_labels()
        backbone = with_channels(backbone, source.channels, config.inflate, "the model")
        start = with_random_weights(backbone, seed=config.seed) if config.scratch else backbone
        assert isinstance(source, Source), "streams have no labels"
        pair = labelled_pair(images, source, test_images, size, hold_out=True, **reading)
        if isinstance(pair, str):
            raise DataError(f"there is nothing to test on: {pair}")
        config = replace(config, data=pair[0].name)
        objective, rates = finetuning.finetune(
            start, pair[0], config, accelerator, readout=read, image_size=size, test=pair[1], watch=LiveReport
        )
        predicted, numbers = read_test(objective, *pair, config, accelerator, tried=rates, image_size=size)
    return Finetuned(config.out, numbers["top1"], {key: numbers[key] for key in Metrics._fields}, predicted, rates)
