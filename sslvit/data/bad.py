"""The bad images of a run: named in a log, counted, and a reason to stop when they are more than a few."""

import fcntl
import json
import os
from collections.abc import Iterable
from math import sqrt
from pathlib import Path
from typing import BinaryIO

from sslvit.data.samples import Bad
from sslvit.errors import DataError

ALWAYS_BORNE = 16  # bad images: a share of a small set says little


class BadImages:
    """bad_images.jsonl: one line for each bad image, {"id", "path", "reason", "substitute"}, however often it is met.

    Loader workers find them and send them along in Samples.bad; the training process adds them here. The processes
    of a run share the file, under a lock, so each counts all; a resumed run goes on with it.
    """

    def __init__(self, file: Path, *, size: float, max_bad: float = 0.01):
        """size: of the source, or infinite where nobody knows it. max_bad: the share of bad images that is borne; 0
        stops at the first."""
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad {max_bad} is a share of the images, from 0 to 1")
        self.file, self.size, self.max_bad = file, size, max_bad
        self._ids: set[int] = set()
        self._end = 0  # of what is known of the file
        self._last = ""

    def __len__(self) -> int:
        """How many the run has met, in all its processes."""
        if self.file.exists() and self.file.stat().st_size != self._end:
            with open(self.file, "r+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                self._catch_up(stream)
        return len(self._ids)

    def add(self, bad: Iterable[Bad]) -> None:
        new = {line.id: line for line in bad if line.id not in self._ids}
        if not new:
            return
        with open(self.file, "a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            self._catch_up(stream)
            lines = [line for line in new.values() if line.id not in self._ids]
            stream.write(b"".join(json.dumps(line._asdict()).encode() + b"\n" for line in lines))
            stream.flush()
            os.fsync(stream.fileno())
            self._catch_up(stream)

    def _catch_up(self, stream: BinaryIO) -> None:
        stream.seek(self._end)
        whole, newline, torn = stream.read().rpartition(b"\n")
        if torn:  # of a process killed while it wrote
            stream.truncate(self._end + len(whole) + len(newline))
        self._end += len(whole) + len(newline)
        for text in whole.splitlines():
            line = json.loads(text)
            self._ids.add(line["id"])
            self._last = f"{json.dumps(line['path'])}: {line['reason']}"

    def too_many(self, read: int) -> str:
        """Why the run should stop, after `read` images, or nothing. All its processes must act on it at one step.

        Before the first epoch's end the share is known from a sample: four standard deviations more are borne.
        """
        seen, count = min(read, self.size), len(self)
        margin = 4 * sqrt(self.max_bad * seen) if seen < self.size else 0.0
        borne = max(ALWAYS_BORNE, self.max_bad * seen + margin) if self.max_bad else 0
        if count <= borne:
            return ""
        return (
            f"{count:,} of {seen:,} images read cannot be used, more than max_bad {self.max_bad:g} allows: see "
            f"{self.file}, its last line is {self._last}. Repair or remove them, or raise --max_bad"
        )

    def check(self, read: int) -> None:
        """Stops a run of one process."""
        if problem := self.too_many(read):
            raise DataError(problem)
