"""Accuracies that mislead: classes of unequal size, and classifiers that predict one class. Tensors in."""

import torch
from torch import Tensor

NEARLY_ALL = 0.95  # a classifier with a larger share of its predictions in one class has collapsed
UNEQUAL = 1.5  # accuracy alone misleads if the largest class is larger than this many times the smallest


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The mean recall of the classes that occur among the labels, as scikit-learn's: n, n -> [0, 1]"""
    _check(predicted, labels)
    counts = labels.bincount()
    right = labels[predicted == labels].bincount(minlength=len(counts))
    return (right[counts > 0].double() / counts[counts > 0]).mean().item()


def most_predicted(predicted: Tensor) -> tuple[int, float]:
    """The most frequent class (the lowest if several are) and its share of the predictions."""
    _check(predicted, predicted)
    counts = predicted.bincount()
    best = int(counts.argmax())
    return best, counts[best].item() / len(predicted)


def collapsed(predicted: Tensor, labels: Tensor) -> str | None:
    """A sentence if nearly all predictions are one class, and fewer of the images belong to it."""
    _check(predicted, labels)
    answer, share = most_predicted(predicted)
    own = (labels == answer).double().mean().item()
    if share <= NEARLY_ALL or own >= NEARLY_ALL:
        return None
    return f"{share:.1%} of {len(labels):,} images are predicted as class {answer}; {own:.1%} belong to it"


def commonest(train_labels: Tensor, test_labels: Tensor) -> float:
    """The test accuracy of always answering the training set's commonest class."""
    answer, _ = most_predicted(train_labels)
    return (test_labels == answer).double().mean().item()


def unbalanced(labels: Tensor) -> bool:
    """The largest class is more than 1.5 times the smallest, of those that occur."""
    counts = labels.bincount()
    return counts.max().item() > UNEQUAL * counts[counts > 0].min().item()


def remarks(name: str, predicted: Tensor, labels: Tensor) -> list[str]:
    """Sentences beside a classifier's accuracy: the balanced one if classes are unequal, a warning if it collapsed."""
    lines, sizes = [], labels.bincount()
    if unbalanced(labels):
        spread = f"the test classes have {sizes[sizes > 0].min():,} to {sizes.max():,} images"
        lines.append(f"{name}: balanced accuracy {balanced_accuracy(predicted, labels):.1%} ({spread})")
    if sentence := collapsed(predicted, labels):
        lines.append(f"warning: {name}: {sentence}")
    return lines


def _check(predicted: Tensor, labels: Tensor) -> None:
    if predicted.dtype != torch.int64 or predicted.ndim != 1 or predicted.shape != labels.shape or not len(labels):
        raise ValueError(
            f"predictions {predicted.dtype} of shape {tuple(predicted.shape)} for labels of shape "
            f"{tuple(labels.shape)}: one class number per image is needed"
        )
