"""What adapting a model does to it: on the new images, on others that it should not forget, and to its features.

Accuracies are those of the monitor: nearest neighbours and few-shot on the new images if they have labels, and on a
labelled set that is kept apart. Without labels three numbers tell something, of the same few images each time:

    drift           1 - cosine of an image's features now and at the start, the mean over images
    alignment       cosine of the features of two crops of an image, minus that of crops of different images
    effective_rank  in how many directions images differ, as in objectives/spread.py

A verdict is in words, against the start. Accuracies of n images differ if they do by more than two standard errors of
their difference; the images are the same, so that this is cautious.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sslvit.config import ImagesConfig, LabelledConfig
from sslvit.data.source import Source
from sslvit.errors import Diverged, Error
from sslvit.evaluate.features import extract
from sslvit.evaluate.labelled import open_labelled
from sslvit.evaluate.monitor import Monitor, draw_ids
from sslvit.models.partial import merged
from sslvit.models.readout import Readout
from sslvit.objectives.spread import effective_rank
from sslvit.runs.files import METRICS
from sslvit.storage import durable, sealed
from sslvit.storage.jsonl import read_lines
from sslvit.views.batching import Size
from sslvit.views.pretraining import CropFlip, EvalView
from sslvit.weights.folder import save_backbone

KEPT = " (kept)"  # the end of names of numbers on the kept set
LOOKED_AT = 512  # images, for what needs no labels
START = "start_features.safetensors"  # a file of the run
MOST = 2_000  # images to look among, and to ask about, of the kept set
BEST = "best"  # a folder of the run: the model of its best evaluation
FAR, LITTLE = 0.25, 1 / 3  # a fall by this share of an accuracy, and what is left of a rank, are a collapse
EARLY = 100  # steps of the backbone, after which it is looked at first
BUILT_IN = "shapes"  # the kept set if no other is chosen
LEAST = 0.01  # smaller differences are none, however many images there are


class Verdict(NamedTuple):
    word: str  # better, better but forgetting, no different, forgetting, collapsed, unknown
    sentence: str

    def __str__(self) -> str:
        return f"{self.word}: {self.sentence}"


class Change(NamedTuple):
    """Of an accuracy of so many test images."""

    start: float
    now: float
    images: int

    @property
    def error(self) -> float:
        """Of the difference."""
        return (sum(p * (1 - p) for p in (self.start, self.now)) / self.images) ** 0.5

    @property
    def direction(self) -> int:
        """1 for better, -1 for worse, 0 for no difference."""
        gap = self.now - self.start
        return 0 if abs(gap) <= max(2 * self.error, LEAST) else 1 if gap > 0 else -1

    def __str__(self) -> str:
        return f"{100 * self.start:.1f}% at the start, {100 * self.now:.1f}% now"


def judged(own: Change | None, kept: Change | None, rank: tuple[float, float]) -> Verdict:
    """own: on the new images, if they have labels. rank: at the start, and now."""
    fell = own is not None and own.direction < 0 and own.now < (1 - FAR) * own.start
    flat = rank[1] < LITTLE * rank[0]
    told = f"new images: {own}" if own else f"effective rank {rank[0]:.1f} at the start, {rank[1]:.1f} now"
    told += f"; kept images: {kept}" if kept else ""
    if fell or (flat and (own is None or own.direction < 0)):
        remedy = "Start again with a third of --lr, more --head_epochs, and a lower --backbone_lr"
        return Verdict("collapsed", f"{told}. {remedy}")
    forgetting = kept is not None and kept.direction < 0
    if own is None:
        if forgetting:
            return Verdict("forgetting", f"{told}. A lower --backbone_lr or --train last:4 keeps more")
        return Verdict("unknown", f"{told}. The new images have no labels, so whether it is better there is not known")
    if own.direction > 0:
        price = ". A lower --backbone_lr or --train last:4 keeps more of it" if forgetting else ""
        return Verdict("better but forgetting" if forgetting else "better", told + price)
    if forgetting:
        return Verdict("forgetting", f"{told}. A lower --backbone_lr or --train last:4 keeps more")
    return Verdict(
        "no different" if own.direction == 0 else "worse", f"{told}. More --epochs or a higher --lr may help"
    )


class Adaptation:
    """An evaluation of the loop, which judges after each, keeps the best model, and ends a run that forgets."""

    def __init__(
        self,
        own: Monitor | None,
        kept: Monitor | None,
        images: Source,
        size: Size,
        accelerator: Accelerator,
        *,
        out: Path,
        readout: Readout,
        view: EvalView,
        most_forgotten: float,
        about: Callable[[int], dict[str, Any]],
    ):
        """own, kept: monitors of the new images and of the kept set. most_forgotten: by how much accuracy on the kept
        set may fall. about: what a model of so many steps says of itself."""
        self.own, self.kept, self.images, self.accelerator = own, kept, images, accelerator
        self.out, self.readout, self.view, self.most_forgotten, self.about = out, readout, view, most_forgotten, about
        self.crops, self.ids = CropFlip(size, scale=(0.25, 1.0)), draw_ids(images, LOOKED_AT)
        self.start: Tensor | None = None

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        numbers = self.own(backbone) if self.own else {}
        if self.kept:
            numbers |= {f"{name}{KEPT}": value for name, value in self.kept(backbone).items()}
        return numbers | self.without_labels(backbone)

    def without_labels(self, backbone: nn.Module) -> dict[str, float]:
        features = self.features(backbone, self.view)
        first, second = (F.normalize(self.features(backbone, self.crops, version), dim=-1) for version in (0, 1))
        cosines = first @ second.T
        same = cosines.diagonal().mean()
        others = (cosines.sum() - cosines.diagonal().sum()) / max(cosines.numel() - len(cosines), 1)
        return {
            "drift": self.drift(features),
            "alignment": (same - others).item(),
            "effective_rank_of_features": effective_rank(features).item(),
        }

    def features(self, backbone: nn.Module, view: Any, version: int = 0) -> Tensor:
        found = extract(
            backbone, self.images, view, self.accelerator, ids=self.ids, readouts=(self.readout,), version=version
        )
        return found.by_readout[self.readout].float()

    def drift(self, features: Tensor) -> float:
        """From those at the start, which stay in the run's folder for a resumed run."""
        file = self.out / START
        if self.start is None and file.exists():
            self.start = load_file(file)["features"]
        if self.start is None:
            self.start = features
            if self.accelerator.is_main_process:
                durable.replace(file, [save({"features": features})])
        return (1 - F.cosine_similarity(features, self.start, dim=-1)).mean().item()

    def verdict(self, start: dict[str, float], now: dict[str, float]) -> Verdict:
        name, rank = self.judged_by, "effective_rank_of_features"
        own, kept = (
            Change(start[name + end], now[name + end], len(monitor.ids[1])) if monitor else None
            for monitor, end in ((self.own, ""), (self.kept, KEPT))
        )
        return judged(own, kept, (start[rank], now[rank]))

    def judge(self, backbone: Any, step: int, numbers: dict[str, float], *, last: bool) -> None:
        """Keeps the model if it is the best so far, and prints the verdict; raises Diverged if it has collapsed or
        forgotten too much, except after the last step: that run is complete, and `conclude` follows."""
        if "drift" not in numbers:  # a line of the log without an evaluation
            return
        start = next(self.logged())
        why = self.unacceptable(start, numbers)
        if self.own and not why and self.accelerator.is_main_process:
            name = self.judged_by
            before = sealed.intact(self.out / BEST / "best.json").get("accuracy", start[name])
            if numbers[name] > before:
                save_backbone(merged(backbone), self.out / BEST, self.about(step))
                sealed.write(self.out / BEST / "best.json", {"accuracy": numbers[name], "step": step})
        verdict = f"step {step:,}: {self.verdict(start, numbers)}"
        if why and not last:
            raise Diverged(f"{verdict}. It {why}, so the run ends here, without {self.out / 'model'}. {self.best()}")
        self.accelerator.print(verdict)

    def conclude(self) -> None:
        """The last words of a complete run, new or read again."""
        lines = list(self.logged())
        if lines and (why := self.unacceptable(lines[0], lines[-1])):
            verdict = self.verdict(lines[0], lines[-1])
            raise Diverged(f"All steps are done, and the model in {self.out / 'model'} {why}: {verdict}. {self.best()}")
        self.accelerator.print(self.best())

    def logged(self) -> Iterator[dict[str, Any]]:
        """The evaluations of the run so far, the start's first."""
        for line in read_lines(self.out / METRICS):
            if "drift" in line:
                yield {name: math.nan if value is None else value for name, value in line.items()}

    def unacceptable(self, start: dict[str, float], now: dict[str, float]) -> str:
        """What ends a run, or an empty text."""
        if self.verdict(start, now).word == "collapsed":
            return "has collapsed"
        name = self.judged_by + KEPT
        if start.get(name, 0.0) - now.get(name, 0.0) > self.most_forgotten:
            return f"has forgotten more than --most_forgotten {self.most_forgotten:g}"
        return ""

    @property
    def judged_by(self) -> str:
        return f"eval/{self.readout}/20-nn"

    def best(self) -> str:
        """In words."""
        best = sealed.intact(self.out / BEST / "best.json")
        if not best and not self.own:
            return "The new images have no labels, so no model is called the best"
        if not best:
            return f"No evaluation was better than the start, so there is no {self.out / BEST}"
        return f"The best model, {100 * best['accuracy']:.1f}% after {best['step']:,} steps, is in {self.out / BEST}"


def is_early(learnt: int) -> bool:
    """Whether to look after so many steps of the backbone, whatever a pass is: after 100, 200, 400, 800, ... Of a
    million images, the end of the first pass would show a fall too late."""
    hundreds, beyond = divmod(learnt, EARLY)
    return beyond == 0 and hundreds > 0 and hundreds.bit_count() == 1


def kept_monitor(data: str, config: ImagesConfig, channels: int, accelerator: Accelerator) -> Monitor | None:
    """Of the labelled images that should not be forgotten; None where there are none. config: of the new images, whose
    size and crop they have."""
    if not data:
        return None
    if data == BUILT_IN and channels != 3:
        accelerator.print(
            f"No set is kept: the built-in images have 3 channels, not {channels}; --keep_data names another"
        )
        return None
    size = config.image_size
    own = {"data": data, "image_column": None, "label_column": None, "root": None, "only_classes": ()}
    labelled = LabelledConfig(**{one.name: getattr(config, one.name) for one in fields(ImagesConfig)} | own)
    try:
        train, test, note = open_labelled(labelled, size, channels)
    except Error as error:
        raise type(error)(str(error).replace("--data", "--keep_data")) from error
    if note:
        accelerator.print(note)
    return Monitor(train, test, size, accelerator, eval_crop=config.eval_crop, limit_train=MOST, limit_test=MOST)
