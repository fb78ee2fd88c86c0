"""A subset of a source as a source of its own: the training images when some are held out, or labels are few."""

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128

from sslvit.data.source import Samples, Source, Unreadable, check_ids, substitutes
from sslvit.errors import DataError


class Subset(Source):
    """The images of these rows, renumbered from 0. An unreadable image is replaced from within the subset, so that a
    held-out one is never a substitute."""

    def __init__(self, inner: Source, rows: np.ndarray):
        self.inner, self.rows = inner, check_ids(rows, len(inner))
        if len(self.rows) == 0:
            raise DataError(f"a subset of {inner.name} without images")
        self.name = f"{inner.name} ({len(rows):,} of its {len(inner):,})"
        self.channels, self.canvas, self.unlabelled = inner.channels, inner.canvas, inner.unlabelled
        self.labels, self.classes = None if inner.labels is None else inner.labels[self.rows], inner.classes
        self._rows_hash = xxh3_128(self.rows.tobytes()).hexdigest()
        self.fingerprint = f"{inner.fingerprint}[{self._rows_hash}]"

    @property
    def version(self) -> str:
        return f"{self.inner.version}[{self._rows_hash}]"

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, ids: np.ndarray) -> Samples:
        ids = check_ids(ids, len(self))
        samples = self.inner.read(self.rows[ids])
        shown, bad = self.rows[ids], []
        reasons = {line.id: line for line in samples.bad}
        for position in [i for i, row in enumerate(shown.tolist()) if row in reasons]:
            id, line = int(ids[position]), reasons[int(shown[position])]
            other = next((s for s in substitutes(id, len(self)) if not self.inner.read(self.rows[[s]]).bad), None)
            if other is None:
                raise DataError(f"{self.name}: none of them can be used, the first because: {line.reason}")
            bad.append(Unreadable(id, line.path, line.reason, other))
            shown[position] = self.rows[other]
        if bad:
            samples = self.inner.read(shown)
        return samples._replace(ids=samples.ids.new_tensor(ids), bad=tuple(bad))


class HeldOut(Subset):
    """Test images of a set that has no test split of its own."""

    def __init__(self, inner: Source, rows: np.ndarray):
        super().__init__(inner, rows)
        self.name = f"{inner.name} ({len(rows):,} held out)"


def saved_ids(source: Source, ids: Tensor) -> Tensor:
    """The ids that predictions are saved by: those of the whole set for images held out of it."""
    return torch.from_numpy(source.rows)[ids] if isinstance(source, HeldOut) else ids
