"""Fine-tuning: all weights of a pretrained model trained on labels, by the one loop, and read on a test set once.

Protocols by name, with the numbers of the papers:

vit (https://arxiv.org/abs/2010.11929, table 4): momentum SGD without weight decay, batch 512, clipped to 1, a cosine
after 500 steps of warm-up (a tenth of a short run: ours). The rate is chosen as in its appendix B.1.1: trained once
with each on all but some held-out training labels, and then with the best one on all of them. 10k steps are
CIFAR's; ImageNet had 20k and rates up to .06, Pets and Flowers 500.
modern (https://arxiv.org/abs/2111.06377, its released B): AdamW, layer decay, drop path, mixup, cutmix, RandAugment,
erasing, smoothing. The mean patch has a fresh norm in the place of the pretrained one. Its head starts at N(0, 2e-5),
ours at 0; mixup and cutmix draw once per pair, not once per batch.

Both are evaluated on the centre crop of every evaluation here (views/pretraining.py), as modern is in MAE at 224 px;
the ViT paper's code squeezes whole images into the size, which is --eval_crop 0.

Where ten times as many labels would be needed to hold out enough of them, --folds chooses by cross-validation.

--lr replaces the choice of a rate, and --epochs the number of steps. Nothing here that trains or chooses sees a test
set; --curve only watches it.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from sslvit.config import FREE, LabelledConfig, TrainConfig, option
from sslvit.data.spec import Source
from sslvit.data.subset import Subset, saved_ids
from sslvit.errors import Diverged
from sslvit.evaluate.features import extract, left_out
from sslvit.evaluate.metrics import top
from sslvit.evaluate.predictions import Predictions
from sslvit.evaluate.split import choose_fraction, choose_shots, folds, hold_out
from sslvit.models.partial import parse, train_only
from sslvit.models.positions import FIXED
from sslvit.models.readout import logits
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.objectives.supervised import Supervised
from sslvit.runs.ending import Status, Watcher, recorded
from sslvit.runs.folder import prepare_folder
from sslvit.train import pretrain
from sslvit.views.batching import Size
from sslvit.views.pretraining import EvalView
from sslvit.views.supervised import SupervisedView
from sslvit.weights.folder import load_strictly
from sslvit.weights.foreign.options import ModelConfig

ENOUGH = 500  # held-out images: a standard error of two points or less


@dataclass(frozen=True)
class FinetuneConfig(ModelConfig, TrainConfig, LabelledConfig):
    """Fine-tune a pretrained model on labelled images."""

    out: Path = Path("runs/finetune")
    protocol: Literal["vit", "modern"] = "vit"
    """Sets the defaults of the other options."""
    image_size: Size = 0
    """Side in pixels; 0 takes the model's own. At a larger size positions are interpolated."""
    inflate: str = ""
    """Images of other channels than the model's: `mean`, or the old channel that each starts from, e.g. 0,1,2,1."""
    scratch: bool = False
    """Start with random weights instead. Of the same architecture."""
    readout: Literal["declared", "cls", "mean"] = "declared"
    """What the head reads; by default what the model's objective declares."""
    train: str = "all"
    """all, head, norm, attention, last:N or lora:RANK. What is trained besides the head: all weights, none, the norms,
    attention, the last N blocks, or low-rank updates of the attention; of the MLPs too with lora:RANK+mlp. The saved
    model has the updates in its weights."""
    fraction: float = option(1.0, above=0, most=1)
    """Share of each class's training images."""
    shots: int = option(0, least=0)
    """Training images per class, instead of --fraction."""
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    """Learning rates to choose from on held-out labels; without any, --lr is the rate."""
    folds: int = option(1, least=0)
    """Cross-validation: hold out each of so many parts of the labels in turn. 1 holds out one part; 0 takes as many
    folds, up to 5, as it takes to hold out 500 images."""
    choice_steps: int = option(0, least=0)
    """Length of the runs that choose the rate; 0: as long as the run itself."""
    curve: bool = option(False, FREE)
    """Record the test accuracy as training goes on. After all steps, half of them, a quarter, and so on; nothing is
    chosen by it."""
    steps: int = option(10_000, least=0)
    """Length of the run, instead of epochs; 0 counts epochs."""
    smallest_crop: float = option(0.05, above=0, most=1)
    """The smallest crop, as a share of the image."""
    randaugment: bool = False
    """Augment by RandAugment, as DeiT does."""
    erase: float = option(0.0, least=0, most=1)
    """The probability that a rectangle of an image is replaced by noise."""
    drop_path: float = option(0.0, least=0, most=1)
    """The probability that a block is left out, in the last block; earlier ones have less."""
    label_smoothing: float = option(0.0, least=0, most=1)
    """The share of each label that is spread over all classes."""
    mixup: float = option(0.0, least=0, most=1)
    """Mix pairs of images: the parameter of the beta distribution; 0 does not."""
    cutmix: float = option(0.0, least=0, most=1)
    """Paste a piece of another image: the parameter of the beta distribution; 0 does not."""
    batch_size: int = 512
    lr: float = option(0.0, least=0)
    optimizer: Literal["adamw", "sgd"] = "sgd"
    clip: float = 1.0
    chosen_by: ClassVar[str] = "protocol"
    start_is_evaluated: ClassVar[bool] = False  # a head of zeros

    def is_evaluated(self, step: int, steps: int, epoch_images: int) -> bool:
        return step in halvings(steps) or super().is_evaluated(step, steps, epoch_images)

    def views(self, size: Size) -> SupervisedView:
        views = SupervisedView.deit(size) if self.randaugment else SupervisedView(size)
        return replace(views, scale=(self.smallest_crop, 1.0), erase=self.erase)


PROTOCOLS = {
    "vit": FinetuneConfig(),
    "modern": FinetuneConfig(
        protocol="modern", rates=(), steps=0, epochs=100, warmup_epochs=5, batch_size=1024,
        smallest_crop=0.08, randaugment=True, erase=0.25, drop_path=0.1, label_smoothing=0.1, mixup=0.8, cutmix=1.0,
        optimizer="adamw", lr=0.0, base_lr=5e-4, final_lr=1e-6, weight_decay=0.05, layer_decay=0.65, clip=0.0,
    ),
}  # fmt: skip


def settled(config: FinetuneConfig) -> FinetuneConfig:
    """Without the protocol's rates if there is a --lr, and without its steps if there are --epochs; an error where both
    were chosen."""
    protocol, config = PROTOCOLS[config.protocol], config.with_rate()
    parse(config.train)
    if config.rates and config.lr != replace(config, lr=protocol.lr, base_lr=protocol.base_lr).with_rate().lr:
        if config.rates != protocol.rates:
            raise ValueError(f"--lr {config.lr:g} and --rates {config.rates}: give one of them")
        config = replace(config, rates=())
    if not (config.rates or config.lr):
        raise ValueError("there is no learning rate: give --lr, or --rates to choose from")
    if len(config.rates) == 1:  # nothing to choose from, so nothing is held out
        config = replace(config, lr=config.rates[0], rates=())
    if config.steps and (config.epochs, config.warmup_epochs) != (protocol.epochs, protocol.warmup_epochs):
        if config.steps != protocol.steps or config.epochs == protocol.epochs:
            raise ValueError("--steps sets epochs and their warm-up itself: give --epochs, with --steps 0")
        config = replace(config, steps=0)
    return config


def rate_of(config: FinetuneConfig) -> float:
    """Where none is chosen: --lr, or of several candidates the middle one, or the lower of two."""
    return config.lr or config.rates[(len(config.rates) - 1) // 2]


def finetune(
    backbone: ViT | BiT,
    train: Source,
    config: FinetuneConfig,
    accelerator: Accelerator,
    *,
    readout: Literal["cls", "mean"],
    image_size: Size,
    test: Source | None = None,
    watch: Callable[..., Watcher] | None = None,
) -> tuple[Supervised, dict[float, float]]:
    """The trained classifier, and the held-out accuracy of each rate that was tried, of which it has the best.

    The choice's runs are in the folder's choice/lr-..., each a run's folder of its own; so with --resume a killed
    choice continues too, bit for bit. test: the images of --curve. watch: makes a watcher of each, such as
    sslvit.reports.live.LiveReport; the newest is told how the whole ended.
    """
    labels = torch.from_numpy(train.required_labels())
    classes = len(train.classes or ()) or int(labels.max()) + 1
    ids = chosen_ids(labels, config)
    folder = prepare_folder(config.out, resume=config.resume, overwrite=config.overwrite)

    watchers: list[Watcher] = []  # the newest run's

    def run(ids: Tensor, out: Path, lr: float) -> Supervised:
        final = out == config.out
        steps = config.steps if final else config.choice_steps or config.steps
        chosen = lengthened(replace(config, steps=steps), len(ids))
        chosen = replace(chosen, out=out, lr=lr, resume=True, overwrite=False)
        objective = classifier(backbone, classes, chosen, readout=readout, image_size=image_size)
        images, views = Subset(train, ids.numpy()), config.views(image_size)
        if watch:
            watchers[:] = [watch(chosen, objective, images, views, accelerator, file=config.out / "report.html")]
        told = watchers if final else [OfChoice(watcher) for watcher in watchers]
        accuracy = None
        if final and config.curve and test is not None:
            accuracy = partial(accuracy_on, objective, test, config.eval_view(image_size), accelerator)
        pretrain(objective, images, views, chosen, accelerator, accuracy, *told)
        accelerator.free_memory()
        return objective

    rate = rate_of(config)
    tried: dict[float, float] = {}
    several = labels[ids].bincount().max() > 1
    if config.rates and not several:
        accelerator.print(f"{len(ids)} images, one per class: none is left to choose a rate by, it is {rate:g}")
    # Opened before hours of choosing: then all that is in the folder is of this run.
    with recorded(folder, watchers) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        if config.rates and several:
            splits = held_out_parts(labels[ids], config)
            accuracy = partial(held_out_accuracy, run, train, ids, splits, config, accelerator, image_size)
            rate, tried = choose_rate(config.rates, accuracy)
        watchers.clear()
    return run(ids, config.out, rate), tried


class OfChoice(Watcher):
    """Tells a watcher the lines of one run of a choice, whose end is not that of the whole."""

    def __init__(self, watcher: Watcher):
        self.watcher = watcher

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self.watcher.log(values, step=step)

    def finish(self) -> None:
        pass

    def ended(self, status: Status) -> None:
        pass


def chosen_ids(labels: Tensor, config: FinetuneConfig) -> Tensor:
    """The labelled images that are trained on."""
    if config.shots and config.fraction != 1:
        raise ValueError(f"--shots {config.shots} and --fraction {config.fraction:g}: give one of them")
    if config.shots:
        return choose_shots(labels, config.shots, config.seed)
    return choose_fraction(labels, config.fraction, config.seed)


def classifier(
    backbone: ViT | BiT, classes: int, config: FinetuneConfig, *, readout: Literal["cls", "mean"], image_size: Size
) -> Supervised:
    changes = {"drop_path": config.drop_path} if config.drop_path else {}
    if config.protocol == "modern" and readout == "mean":
        changes["final_norm"] = False
    start = prepare(backbone, image_size, **changes)
    train_only(start, config.train, seed=config.seed)
    return Supervised(
        start,
        classes=classes,
        readout=readout,
        fresh_norm=isinstance(start, ViT) and not start.config.final_norm,
        label_smoothing=config.label_smoothing,
        mixup=config.mixup,
        cutmix=config.cutmix,
        seed=config.seed,
    )


def prepare(backbone: ViT | BiT, image_size: Size, **changes: Any) -> ViT | BiT:
    """A copy to fine-tune at this size, its positions resized and trained, also those that were fixed in pretraining.

    changes: of a ViT's configuration, such as drop_path; with final_norm=False the pretrained norm is left out.
    """
    if isinstance(backbone, BiT):
        if changes:
            raise ValueError(f"a BiT ResNet has no {', '.join(changes)}: fine-tune it with --protocol vit")
        copy = BiT(backbone.config)
        copy.load_state_dict(backbone.state_dict())
        return copy
    config = replace(backbone.config, **({"drop_path": 0.0, "dropout": 0.0} | changes))
    if config.position in FIXED:
        config = replace(config, position="learned_1d")  # the same table by the same name, but a parameter
    copy = ViT(config)
    left = () if config.final_norm else ("norm.", "cls_norm.")
    state = {n: t for n, t in backbone.state_dict().items() if not n.startswith(left)}
    load_strictly(copy, state, "the pretrained model")
    return copy.resized(image_size).train()


def lengthened(config: FinetuneConfig, images: int) -> FinetuneConfig:
    """With its steps as epochs of this number of images."""
    return replace(config, **in_epochs(config.steps, config.batch_size, images)) if config.steps else config


def in_epochs(steps: int, batch_size: int, images: int, warmup_steps: int = 500) -> dict[str, Any]:
    """A run of so many steps, of which at most a tenth warm up."""
    epochs = steps * batch_size / images
    while math.ceil(epochs * images / batch_size) > steps:  # the loop rounds up
        epochs = math.nextafter(epochs, 0)
    return {"epochs": epochs, "warmup_epochs": epochs * min(warmup_steps / steps, 0.1)}


def held_out_parts(labels: Tensor, config: FinetuneConfig) -> list[tuple[Tensor, Tensor]]:
    """The rows to train on and those to choose by, once or once per fold."""
    fifth, number = len(labels) / 5, config.folds
    if number == 0 and len(labels) >= 10 * ENOUGH:
        share = max(share_held_out(len(labels)), ENOUGH / len(labels))
        while len((parts := hold_out(labels, share, config.seed))[1]) < ENOUGH and share < 0.5:
            share *= 1.1  # each class rounds its own
        return [parts]
    if number == 0:  # each fold holds out a fifth; of the five as many as are needed
        return folds(labels, 5, config.seed)[: math.ceil(ENOUGH / fifth)]
    if number == 1:
        return [hold_out(labels, share_held_out(len(labels)), config.seed)]
    return folds(labels, number, config.seed)


def halvings(steps: int) -> list[int]:
    """All steps, half of them, a quarter, ..., down to about ten: evenly spaced on a logarithmic axis."""
    return [steps >> k for k in range(steps.bit_length()) if steps >> k >= min(8, steps)]


def accuracy_on(
    objective: Supervised, test: Source, view: EvalView, accelerator: Accelerator, _: Any
) -> dict[str, float]:
    """An evaluation of the loop, of the whole classifier."""
    predicted = predict(objective, test, view, accelerator)
    return {f"eval/{objective.readout}/accuracy": top(predicted.probabilities, predicted.labels)}


def held_out_accuracy(
    run: Callable[[Tensor, Path, float], Supervised],
    train: Source,
    ids: Tensor,
    splits: list[tuple[Tensor, Tensor]],
    config: FinetuneConfig,
    accelerator: Accelerator,
    image_size: Size,
    lr: float,
) -> float:
    """Of this rate, over all splits. run: trains on images by number, in a folder. splits: rows of ids."""
    right = images = 0.0
    for fold, (rows, held_out) in enumerate(splits):
        out = config.out / "choice" / (f"lr-{lr:g}" if len(splits) == 1 else f"lr-{lr:g}-fold-{fold}")
        objective, view = run(ids[rows], out, lr), config.eval_view(image_size)
        predicted = predict(objective, train, view, accelerator, ids=ids[held_out].numpy())
        right += top(predicted.probabilities, predicted.labels) * len(held_out)
        images += len(held_out)
    accelerator.print(f"lr {lr:g}: {right / images:.2%} of {images:,.0f} held-out training images")
    return right / images


def share_held_out(images: int) -> float:
    """The share of the training set that a rate is chosen by: the ViT paper's 10 % of Pets and Flowers, 2 % of CIFAR,
    1 % of ImageNet."""
    return 0.1 if images < 10_000 else 0.02 if images < 1_000_000 else 0.01


def choose_rate(rates: tuple[float, ...], accuracy: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The rate with the best held-out accuracy, of equals the first, and all accuracies: -1 where training diverged."""
    accuracies = {}
    for rate in rates:
        try:
            accuracies[rate] = accuracy(rate)
        except Diverged:
            accuracies[rate] = -1.0
    if max(accuracies.values()) < 0:
        raise Diverged(f"training diverged at every learning rate of {rates}: try smaller ones")
    return max(accuracies, key=accuracies.__getitem__), accuracies


@torch.no_grad()
def predict(
    objective: Supervised,
    source: Source,
    view: EvalView,
    accelerator: Accelerator,
    *,
    ids: np.ndarray | None = None,
    about: dict[str, Any] | None = None,
) -> Predictions:
    """Probabilities of the classes of these images, all by default, in float32."""
    objective.to(accelerator.device)
    readout = objective.readout
    features = extract(objective.backbone, source, view, accelerator, ids=ids, readouts=(readout,))
    if problem := left_out(features, source):
        accelerator.print(f"warning: {problem}")
    scores = [logits(objective, x.to(accelerator.device)).cpu() for x in features.by_readout[readout].split(4096)]
    probabilities = torch.cat(scores).float().softmax(-1)
    return Predictions(saved_ids(source, features.ids), features.labels, probabilities, about or {})
