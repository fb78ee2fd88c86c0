"""The bad images of a run: logged, counted, and a reason to stop when there are too many."""

import json
import logging
import os
from collections.abc import Iterable
from math import sqrt
from pathlib import Path
from typing import BinaryIO

from sslvit.data.source import Unreadable
from sslvit.processes.system import fcntl
from sslvit.storage import durable, jsonl

log = logging.getLogger(__name__)
SMALL_SET = 800  # images: smaller sets may have as many bad images as one of this size


class UnreadableImages:
    """bad_images.jsonl: one line for each bad image, {"id", "path", "reason", "substitute"}, however often it is met.

    Loader workers send them along in Samples.bad; the training process adds them here. The processes of a run share the
    file, under a lock, so each counts all; a resumed run appends to it.
    """

    def __init__(self, file: Path, *, size: float, max_bad: float = 0.01, before: int = 0):
        """size: of the source, infinite if unknown. max_bad: the tolerated share of bad images; 0 stops at the first.
        before: images read before this resumed run, whose bad ones are in the file, with those of steps that are lost.
        Small sets (fewer than 800 images) may have as many as one of 800, at most an eighth: one bad image in 20 need
        not stop anything, but 16 in 20 must."""
        if not 0 <= max_bad <= 1:
            raise ValueError(f"--max_bad must be a share of the images, from 0 to 1, got {max_bad}")
        self.file, self.size, self.max_bad = file, size, max_bad
        self.share = max(max_bad, min(max_bad * SMALL_SET, size / 8) / size)
        self._ids: set[int] = set()
        self._waiting: dict[int, Unreadable] = {}  # to be written when the disk allows it
        self._end = self._lines = 0  # bytes and lines of the file that are read
        self._last = ""
        self.before, self.known = before, len(self)

    def __len__(self) -> int:
        """How many the run has met, in all its processes."""
        if self.file.exists() and self.file.stat().st_size != self._end:
            with open(self.file, "r+b", opener=durable.without_links) as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                self._catch_up(stream)
        return len(self._ids | self._waiting.keys())

    def add(self, bad: Iterable[Unreadable]) -> None:
        new = self._waiting | {line.id: line for line in bad if line.id not in self._ids}
        if not new:
            return
        try:
            with open(self.file, "a+b", opener=durable.without_links) as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                self._catch_up(stream)
                lines = [line for line in new.values() if line.id not in self._ids]
                stream.write(b"".join(json.dumps(line._asdict()).encode() + b"\n" for line in lines))
                stream.flush()
                os.fsync(stream.fileno())
                self._catch_up(stream)
        except OSError as error:  # a full disk does not end a run
            self._waiting = new
            self._last = f"not written, {error.strerror}"
            log.warning("%s: %s; the bad images since then wait to be written", self.file, error.strerror)
        else:
            self._waiting = {}

    def _catch_up(self, stream: BinaryIO) -> None:
        stream.seek(self._end)
        whole, newline, torn = stream.read().rpartition(b"\n")
        if torn:  # by a process killed while it wrote
            stream.truncate(self._end + len(whole) + len(newline))
        self._end += len(whole) + len(newline)
        for line in jsonl.parse(self.file, whole + newline, first=self._lines + 1):
            if type(id := line.values.get("id")) is int:
                self._ids.add(id)
                self._last = f"{json.dumps(line.values.get('path'))}: {line.values.get('reason')}"
            else:
                jsonl.warn_of_damage(self.file, line.number, line.text)
        self._lines += whole.count(b"\n") + len(newline)

    def tolerated(self, read: float) -> float:
        """How many bad images may be among the first `read` images. Before the first epoch's end, which is a sample,
        four standard deviations more are tolerated, and four images more, because small counts spread wider than a
        normal distribution."""
        seen = min(read, self.size)
        expected = self.share * seen if self.share else 0.0
        return expected + (4 * (sqrt(expected) + 1) if expected and seen < self.size else 0.0)

    def too_many(self, read: int) -> str:
        """Why the run should stop after `read` images, or "". All processes must act on it at the same step."""
        count, of = len(self), self.size if self.known else min(read, self.size)
        since, seen = count - self.known, min(read - self.before, self.size)
        if self.known and since > self.tolerated(seen):
            count, of = since, seen
        elif count <= self.tolerated(of):
            return ""
        return (
            f"{count:,} of {of:,} images read cannot be used, more than --max_bad {self.max_bad:g} allows: see "
            f"{self.file}, its last line is {self._last}. Repair or remove them, and delete {self.file.name}, or raise "
            "--max_bad"
        )
