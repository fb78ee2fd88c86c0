"""Frozen patch features to classes of pixels: nearest neighbours, and logistic regression to the optimum.

Nearest neighbours: a patch's neighbours among the training images' patches vote for the classes of their own pixels,
in shares, weighted by exp(cosine / temperature): DINO's rule with soft labels. (CAPI's evaluation copies the pixels of
the neighbours, and chooses their number.)

Logistic regression: on standardised features, for the most frequent class of each patch; the penalty is chosen by mean
IoU over the patches of a held-out tenth of the images, as in CAPI's.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor

from sslvit.errors import DataError
from sslvit.evaluate.dense.bank import Bank
from sslvit.evaluate.dense.scores import PixelCounts, count, gathered
from sslvit.evaluate.dense.windows import Seen, stitched
from sslvit.evaluate.knn import Neighbors, nearest_first, neighbors
from sslvit.evaluate.logistic import fit

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 10  # one image of so many chooses the penalty
PART = 1 << 18  # patches of a bank that are searched at a time
ROWS = 1 << 14  # patches whose moments and scores are computed at a time
TOGETHER = 1 << 12  # patches of test images that are scored together

Scores = Callable[[Tensor], Tensor]  # features n d -> scores n c
MapScores = Callable[[Tensor], Tensor]  # features of windows k h w d -> scores k c h' w', at any resolution
Answers = Iterator[tuple[Seen, dict[str, Tensor]]]  # images with the classes of their pixels by head, H W


def nearest_patches(bank: Bank, *, k: int = 20, temperature: float = 0.07) -> Scores:
    def scores(features: Tensor) -> Tensor:
        parts = [neighbors_in(bank, part, features, k) for part in torch.arange(len(bank.features)).split(PART)]
        similarity, rows = (torch.cat(one, 1) for one in zip(*parts, strict=True))
        similarity, rows = nearest_first(similarity, rows, k)
        weights = (similarity / temperature).softmax(-1)
        return einsum(weights.float(), bank.shares[rows].float(), "n k, n k c -> n c")

    return scores


def neighbors_in(bank: Bank, part: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The nearest rows of a part of the bank: similarities and rows, n k each"""
    first, last = int(part[0]), int(part[-1]) + 1
    found: list[Neighbors] = list(neighbors(bank.features[first:last].float(), features, k=k))
    return torch.cat([one.similarity for one in found]), torch.cat([one.rows for one in found]) + first


class Regression(NamedTuple):
    weights: Tensor  # d c, for features as they are extracted
    bias: Tensor  # c
    c: float  # the chosen penalty
    held_out: dict[float, float]  # mean IoU over held-out patches by penalty

    def scores(self, features: Tensor) -> Tensor:
        return features @ self.weights + self.bias


def regression(bank: Bank, classes: int, *, penalties: tuple[float, ...] = PENALTIES) -> Regression:
    labels = bank.classes
    images = int(bank.images[-1]) + 1
    if images < 2:
        raise DataError("one training image leaves none to choose the penalty by: at least 2 are needed")
    mean, deviation = moments(bank.features)
    first = images - max(1, images // HELD_OUT)
    rest, held = bank.before(first), bank.since(first)
    fitted, tried, starts = None, {}, {}
    for c in sorted(penalties):
        fitted = starts[c] = fit(
            rest.features, rest.classes, c, classes=classes, start=fitted, tolerance=1e-4, standard=(mean, deviation)
        )
        head = unstandardized(fitted, mean, deviation)
        predicted = torch.cat([(rows.float() @ head[0] + head[1]).argmax(-1) for rows in held.features.split(ROWS)])
        tried[c] = gathered([count(predicted, held.classes, classes)]).mean_iou
    best = max(tried, key=tried.__getitem__)  # ties: the smallest
    fitted = fit(
        bank.features, labels, best, classes=classes, start=starts[best], tolerance=1e-5, standard=(mean, deviation)
    )
    return Regression(*unstandardized(fitted, mean, deviation), best, tried)


def unstandardized(head: tuple[Tensor, Tensor], mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """A head of standardised features as one of the features themselves: d c, c"""
    weights = head[0] / deviation[:, None]
    return weights, head[1] - mean @ weights


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, in pieces: n d -> d, d"""
    total, squares = features.new_zeros(2, features.shape[1], dtype=torch.float64)
    for part in features.split(ROWS):
        total += part.double().sum(0)
    mean = total / len(features)
    for part in features.split(ROWS):
        squares += (part.double() - mean).square().sum(0)
    return mean.float(), ((squares / max(1, len(features) - 1)).sqrt() + 1e-5).float()


def majority(bank: Bank) -> Scores:
    """The class that is most frequent in training, everywhere."""
    shares = bank.shares.float().mean(0)
    return lambda features: shares.expand(len(features), -1)


def heads_of(bank: Bank, classes: int, names: tuple[str, ...], k: int, temperature: float) -> dict[str, MapScores]:
    made: dict[str, Callable[[], Scores]] = {
        "knn": lambda: nearest_patches(bank, k=k, temperature=temperature),
        "logistic": lambda: regression(bank, classes).scores,
        "majority": lambda: majority(bank),
    }
    return {name: of_patches(made[name]()) for name in names}


def of_patches(scores: Scores) -> MapScores:
    """Each patch by itself."""

    def of_maps(maps: Tensor) -> Tensor:
        k, h, _, _ = maps.shape
        return rearrange(scores(rearrange(maps, "k h w d -> (k h w) d")), "(k h w) c -> k c h w", k=k, h=h)

    return of_maps


def predictions(seen: Iterator[Seen], heads: dict[str, MapScores]) -> Answers:
    """Each image with the classes of its pixels by every head, H W."""
    for some in together(seen, TOGETHER):
        maps, windows = torch.cat([one.features for one in some]), [len(one.features) for one in some]
        scores = {name: head(maps).split(windows) for name, head in heads.items()}
        for index, one in enumerate(some):
            yield one, {name: stitched(parts[index], one.windows) for name, parts in scores.items()}


def together(seen: Iterator[Seen], patches: int) -> Iterator[list[Seen]]:
    """Images in groups of at least so many patches: neighbours are found faster for many at a time."""
    waiting: list[Seen] = []
    for one in seen:
        waiting.append(one)
        if sum(held.features[..., 0].numel() for held in waiting) >= patches:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def scored(answers: Answers, classes: int, names: tuple[str, ...]) -> dict[str, PixelCounts]:
    counts: dict[str, list[Tensor]] = {name: [] for name in names}
    for one, answer in answers:
        for name, predicted in answer.items():
            counts[name].append(count(predicted, one.windows.mask, classes))
    found = {name: gathered(each) for name, each in counts.items()}
    if not all(one.true.sum() for one in found.values()):
        raise DataError("all pixels of the test masks are ignored: there is nothing to score")
    return found
