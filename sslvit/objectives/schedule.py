"""Schedules as pure functions of progress, which runs from 0 to 1 over the whole of training.

Nothing to save, nothing to restore, and nothing that the number of processes can multiply.
"""

from math import cos, pi


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` at 0 to `end` at 1."""
    return end + 0.5 * (start - end) * (1 + cos(pi * min(max(progress, 0.0), 1.0)))


def linear(progress: float, start: float, end: float) -> float:
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def warmup_cosine(progress: float, peak: float, *, warmup: float, start: float = 0.0, end: float = 0.0) -> float:
    """Linear from `start` to `peak` over the first `warmup` (a share of training), then half a cosine to `end`."""
    if progress < warmup:
        return linear(progress / warmup, start, peak)
    return cosine((progress - warmup) / max(1 - warmup, 1e-12), peak, end)


def warmup_steps(progress: float, peak: float, *, warmup: float, drops: tuple[float, ...]) -> float:
    """Linear from 0 to `peak` over the first `warmup`, then `peak`, a tenth of it from the first of `drops` on, ..."""
    if progress < warmup:
        return linear(progress / warmup, 0.0, peak)
    return peak * 0.1 ** sum(progress >= drop for drop in drops)
