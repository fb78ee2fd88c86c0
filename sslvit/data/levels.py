"""Images of more than eight bits per channel: which of their values becomes black and which white.

By default 0 and the largest that the file can hold. Cameras and scanners of 10 to 14 bits often store their values as
they are in files of 16: of 12 bits, 17 of 4,096 levels would remain. So images whose values all lie below an eighth of
what their files can hold are refused until --range sets the ends.
"""

from typing import NamedTuple

import numpy as np

from sslvit.errors import DataError

Span = tuple[float, float]  # the values that become 0 and 255
FULL_RANGE = (0.0, 65535.0)
DARK = 1 / 8  # of the largest value: below it fewer than 32 of 256 levels are left


class Levels(NamedTuple):
    """The stored values of images of more than eight bits."""

    low: int
    high: int
    full: int  # the largest that the files can hold
    grey: bool  # of colour, Pillow reads the upper eight bits alone

    def __str__(self) -> str:
        return f"{self.low:,} to {self.high:,} of {self.full:,}"

    def merged(self, other: "Levels | None") -> "Levels":
        """Of several images: the one that uses the larger share of its file's range decides."""
        if other is None:
            return self
        brighter = max(self, other, key=lambda one: one.high / one.full)
        return brighter._replace(low=min(self.low, other.low))


def to_bytes(values: np.ndarray, span: Span) -> np.ndarray:
    """The ends of the span to 0 and 255, linearly; values beyond are clipped."""
    low, high = span
    return np.rint((values.astype(np.float64) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)


def check_levels(seen: Levels | None, name: str) -> None:
    """Refuses images of which few levels would remain."""
    if seen is None or seen.high >= DARK * seen.full:
        return
    left = seen.high * 255 // seen.full + 1
    problem = f"{name}: images of more than 8 bits have values from {seen}, of which {left} of 256 levels would remain"
    if not seen.grey:
        raise DataError(f"{problem}. Of colour only the upper 8 bits are read: store them as 8 bits from 0 to 255")
    most = 2 ** max(1, seen.high.bit_length()) - 1
    raise DataError(f"{problem}: --range 0 {most} makes {most:,} white, --range 0 {seen.full} leaves them so dark")
