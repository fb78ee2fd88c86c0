"""Whether an accuracy means anything: classes of unequal size, and classifiers that answer one class. Tensors in."""

import torch
from torch import Tensor

NEARLY_ALL = 0.95  # of the predictions, from which a classifier is said to answer one class
UNEQUAL = 1.5  # times the smallest class: the largest from which accuracy alone misleads


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The mean recall of the classes that occur among the labels, as scikit-learn's: n, n -> [0, 1]"""
    _check(predicted, labels)
    counts = labels.bincount()
    right = labels[predicted == labels].bincount(minlength=len(counts))
    return (right[counts > 0].double() / counts[counts > 0]).mean().item()


def most_predicted(predicted: Tensor) -> tuple[int, float]:
    """The class that is predicted most often, of equals the lowest, and its share of the predictions."""
    _check(predicted, predicted)
    counts = predicted.bincount()
    best = int(counts.argmax())
    return best, counts[best].item() / len(predicted)


def collapsed(predicted: Tensor, labels: Tensor) -> str | None:
    """A sentence if nearly all images are given one class, and fewer of them are of it."""
    _check(predicted, labels)
    answer, share = most_predicted(predicted)
    own = (labels == answer).double().mean().item()
    if share <= NEARLY_ALL or own >= NEARLY_ALL:
        return None
    return (
        f"{100 * share:.1f} % of {len(labels):,} images are predicted as class {answer}; {100 * own:.1f} % belong to it"
    )


def commonest(train_labels: Tensor, test_labels: Tensor) -> float:
    """The test accuracy of always answering the training set's commonest class."""
    answer, _ = most_predicted(train_labels)
    return (test_labels == answer).double().mean().item()


def unbalanced(labels: Tensor) -> bool:
    """Whether the largest class is more than 1.5 times the smallest, of those that occur."""
    counts = labels.bincount()
    return counts.max().item() > UNEQUAL * counts[counts > 0].min().item()


def remarks(name: str, predicted: Tensor, labels: Tensor) -> list[str]:
    """What must be said beside the accuracy of a classifier of this name: the balanced one where classes are unequal,
    and a warning where it answers one class."""
    lines, sizes = [], labels.bincount()
    if unbalanced(labels):
        spread = f"the test classes have {sizes[sizes > 0].min():,} to {sizes.max():,} images"
        lines.append(f"{name}: balanced accuracy {100 * balanced_accuracy(predicted, labels):.1f} % ({spread})")
    if sentence := collapsed(predicted, labels):
        lines.append(f"warning: {name}: {sentence}")
    return lines


def _check(predicted: Tensor, labels: Tensor) -> None:
    if predicted.dtype != torch.int64 or predicted.ndim != 1 or predicted.shape != labels.shape or not len(labels):
        raise ValueError(
            f"predictions {predicted.dtype} of shape {tuple(predicted.shape)} for labels of shape "
            f"{tuple(labels.shape)}: one class number per image is needed"
        )
