"""What models answer when test images are corrupted, and when patches are missing or out of place: all models on the
same changed images, so that they compare image by image."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslvit import rng
from sslvit.data.readers import shapes
from sslvit.data.source import ShapesSource, Source
from sslvit.errors import DataError
from sslvit.evaluate.features import Features, evaluation_mode, unreadable
from sslvit.evaluate.knn import knn_votes
from sslvit.evaluate.logistic import standardized_probe
from sslvit.evaluate.robustness import patches
from sslvit.evaluate.robustness.corruptions import NAMES, STRENGTHS, corrupt
from sslvit.models.positions import Grid
from sslvit.models.readout import Classifier, logits, read
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.views.pretraining import EvalView

CLEAN, CONFLICT = "clean", "cue conflict"
SHARES = tuple(tenth / 10 for tenth in range(1, 10))  # of the patches that are dropped, as in the paper
DROPS = ("random", "salient", "non-salient")
AT_ONCE = 100  # images


class Subject(NamedTuple):
    """A model that is evaluated, and how its answers are read: a readout's features to probabilities of the classes."""

    name: str
    backbone: ViT | BiT
    readout: str
    head: Callable[[Tensor], Tensor]
    how: str  # the head, in words


def with_own_head(name: str, model: Classifier) -> Subject:
    def classify(features: Tensor) -> Tensor:
        return logits(model, features.to(model.head.weight.device)).softmax(-1).cpu()

    return Subject(name, model.backbone, model.readout, classify, "its own head")


def with_probe(name: str, backbone: ViT | BiT, readout: str, train: Features, kind: str) -> Subject:
    """kind: logistic or knn, on these features."""
    x, labels = train.by_readout[readout], train.y
    if kind == "knn":
        return Subject(name, backbone, readout, lambda y: knn_votes(x, labels, y), "20-nn")
    head, mean, deviation = standardized_probe(x, labels)
    return Subject(name, backbone, readout, lambda y: head.probabilities((y - mean) / deviation), "logistic regression")


class Answers(NamedTuple):
    predicted: Tensor  # n
    confidence: Tensor  # n: the probability of that class


class Measured(NamedTuple):
    ids: Tensor  # n: of the images that could be read
    labels: Tensor  # n
    answers: dict[str, dict[str, Answers]]  # by condition and model
    colors: Tensor | None  # n: of a cue conflict, the class whose colour the object has


class Shown(NamedTuple):
    """A batch: images in [0, 1], b c h w, keys, b, and what is dropped first, b p."""

    images: Tensor
    key: Tensor
    random: Tensor
    salient: Tensor | None  # by the model that is evaluated, if it has attention


Change = Callable[[Shown], Tensor | None]


def corrupted(name: str, strength: int) -> Change:
    return lambda shown: corrupt(shown.images, name, strength, shown.key)


def dropping(kind: str, share: float, grid: Grid) -> Change:
    def change(shown: Shown) -> Tensor | None:
        order = shown.random if kind == "random" else shown.salient
        if order is None:
            return None
        return patches.dropped(shown.images, order.flip(1) if kind == "non-salient" else order, share, grid)

    return change


def shuffling(k: int) -> Change:
    return lambda shown: patches.shuffled(shown.images, shown.key, (k, k))


def conditions(size: tuple[int, int], grid: Grid) -> dict[str, Change]:
    """By name: "clean", "fog 3", "random drop 0.5", "shuffle 4"."""
    found: dict[str, Change] = {CLEAN: lambda shown: shown.images}
    found |= {f"{name} {strength}": corrupted(name, strength) for name in NAMES for strength in STRENGTHS}
    found |= {f"{kind} drop {share:g}": dropping(kind, share, grid) for kind in DROPS for share in SHARES}
    return found | {f"shuffle {k}": shuffling(k) for k in patches.shuffles(size)[1:]}


@torch.no_grad()
def measure(
    subjects: Sequence[Subject],
    source: Source,
    ids: np.ndarray,
    view: EvalView,
    size: tuple[int, int],
    grid: Grid,
    device: torch.device,
    tell: Callable[[int], None] = lambda done: None,
) -> Measured:
    """The answers about these images in all conditions. tell: is called with the number of images after each batch."""
    changes, kept = conditions(size, grid), list[Tensor]()
    collected: dict[str, dict[str, list[Answers]]] = {}
    colors: list[Tensor] = []
    for some in np.array_split(ids, -(-len(ids) // AT_ONCE)):
        samples = source.read(some)
        good = ~unreadable(samples)
        (images,) = view(samples.pixels.to(device), rng.key(0, samples.ids.to(device)), samples.extents)
        tell(len(some))
        if not good.any():
            continue
        kept.append(samples.ids[good])
        images, key = images[good], rng.key(0, "robustness", samples.ids[good].to(device))
        shown = Shown(images, key, patches.random_order(key, grid), None)
        mine = [shown._replace(salient=salience(one, images, grid)) for one in subjects]
        if conflict := conflicting(source, samples.ids[good], size):
            colors.append(conflict[1])
            (scenes,) = view(conflict[0].to(device), key, samples.extents[good])
            changes[CONFLICT] = partial(lambda scenes, shown: scenes, scenes)
        for name, change in changes.items():
            same = change(shown)
            for subject, own in zip(subjects, mine, strict=True):
                pixels = change(own) if same is None else same
                if pixels is not None:
                    collected.setdefault(name, {}).setdefault(subject.name, []).append(answer(subject, pixels))
    if not kept:
        raise DataError(f"none of the {len(ids):,} images of {source.name} to be evaluated can be read")
    answers = {
        name: {one: Answers(*(torch.cat(part) for part in zip(*each, strict=True))) for one, each in by_model.items()}
        for name, by_model in collected.items()
    }
    seen = torch.cat(kept)
    labels = torch.from_numpy(source.required_labels())[seen]
    return Measured(seen, labels, answers, torch.cat(colors) if colors else None)


def salience(subject: Subject, images: Tensor, grid: Grid) -> Tensor | None:
    vit = subject.backbone
    return patches.salient_order(vit, images, grid, subject.readout) if isinstance(vit, ViT) else None


def answer(subject: Subject, images: Tensor) -> Answers:
    with evaluation_mode(subject.backbone, images.device.type):
        features = read(subject.backbone(images), subject.readout).float().cpu()
    confidence, predicted = subject.head(features).double().max(-1)
    return Answers(predicted, confidence)


def conflicting(source: Source, ids: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Of the built-in images labelled by shape, the same scenes with the object in the colour of another shape, and
    that shape; None of other images."""
    if not isinstance(source, ShapesSource) or source.classes != shapes.SHAPES or size != source.canvas:
        return None
    scenes = ids + source.first
    others = rng.integers(rng.key(0, "other colour", scenes), len(shapes.SHAPES) - 1)
    colors = (shapes.shape_label(scenes) + 1 + others) % len(shapes.SHAPES)
    return shapes.make(scenes, size[0], colors_of=colors), colors
