"""k nearest neighbours, exactly: cosine similarity, each neighbour's vote weighted by exp(similarity / temperature).

DINO's protocol (https://github.com/facebookresearch/dino, eval_knn.py): k 20 and temperature 0.07 there; lightly and
InstDisc take 200 and 0.1. Numbers with another k or temperature do not compare, so both belong beside a number.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_votes(
    train: Tensor, labels: Tensor, test: Tensor, *, k: int = 20, temperature: float = 0.07, chunk: int = 1024
) -> Tensor:
    """The votes for each class: train n d, labels n, test m d -> m classes. k is at most the number of train rows."""
    if k < 1 or temperature <= 0:
        raise ValueError(f"k {k} must be at least 1 and temperature {temperature} above 0")
    train, test = F.normalize(train, dim=-1), F.normalize(test, dim=-1)
    votes = torch.zeros(len(test), int(labels.max()) + 1, device=test.device)
    for start in range(0, len(test), chunk):
        rows = test[start : start + chunk]
        similarity, neighbours = (rows @ train.T).topk(min(k, len(train)), dim=-1)
        # Relative to the best, exp cannot overflow at small temperatures, and the winner is the same.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes[start : start + chunk].scatter_add_(1, labels[neighbours], weights)
    return votes


def knn(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy in [0, 1]."""
    votes = knn_votes(train, labels, test, k=k, temperature=temperature)
    return (votes.argmax(-1) == test_labels).float().mean().item()
