"""What the folder of a run tells while the run goes on, or however it ended. Nothing in it is required."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from sslvit.evaluate.monitor import Row, rows_of
from sslvit.reports.charts import Line
from sslvit.runs.ending import status_of
from sslvit.runs.files import METRICS
from sslvit.runs.log import duration
from sslvit.storage import sealed

POINTS = 500  # of a curve, at most
RECENT = 10  # lines from which the speed of now is taken


class Progress:
    def __init__(self, folder: Path, most: int | None = None, locks: set[tuple[int, int]] | None = None):
        """most: lines of a long log that are read. locks: of `held_locks`, for many runs."""
        self.folder, self.status = folder, status_of(folder, locks)
        self.config, self.environment, self.cost = (
            sealed.intact(folder / f"{name}.json") for name in ("config", "environment", "cost")
        )
        self.tested = sealed.intact(folder / "test.json")
        facts = sealed.intact(folder / "model" / "config.json").get("sslvit")
        self.model: dict[str, Any] = facts if isinstance(facts, dict) else {}
        self.lines = read_log(folder / METRICS, most)
        self.evaluations = [line for line in self.lines if any(name.startswith("eval/") for name in line)]
        self.verdicts = [str(line["health"]) for line in self.lines if line.get("health")]
        last = self.lines[-1] if self.lines else {}
        self.step: int = last.get("step", 0)
        self.batch: int = self.config.get("batch_size", 0)
        self.seconds: float = max((line["seconds"] for line in self.lines if is_number(line.get("seconds"))), default=0)

    @property
    def steps(self) -> int:
        """Of the whole run; 0 if unknown."""
        return self.environment.get("steps") or self.model.get("steps") or 0

    @property
    def objective(self) -> str:
        """Its name; of a run of an earlier version that has no model yet, its recipe's."""
        script = (self.environment.get("command") or [""])[0]
        return self.environment.get("objective") or self.model.get("objective") or script.removesuffix(".py")

    @property
    def backbone(self) -> str:
        return str(self.environment.get("backbone") or self.config.get("model") or "")

    @property
    def data(self) -> str:
        return str(self.environment.get("source") or self.model.get("data") or self.config.get("data") or "")

    @property
    def readout(self) -> str:
        return self.environment.get("readout") or self.model.get("readout") or "mean"

    @property
    def images(self) -> int:
        return self.step * self.batch

    def title(self) -> str:
        return f"{self.objective or self.folder.name} on {self.data}" if self.data else self.folder.name

    def rows(self) -> list[Row]:
        """Without an evaluation of the start there is nothing to compare the end with."""
        return rows_of(self.evaluations) if self.evaluations and self.evaluations[0].get("step") == 0 else []

    def speeds(self) -> Iterator[tuple[int, float]]:
        """Images per second between the lines of the log, at the later one's step."""
        timed = [line for line in self.lines if is_number(line.get("seconds"))]
        for before, after in pairwise(timed):
            if (seconds := after["seconds"] - before["seconds"]) > 0:
                yield after["step"], (after["step"] - before["step"]) * self.batch / seconds

    def speed(self) -> float:
        """Images per second: of a run that goes on of the last lines, else of all; 0 if unknown."""
        timed = [line for line in self.lines if is_number(line.get("seconds"))]
        if self.status.state == "running" and len(timed) > 1:
            first = timed[max(len(timed) - 1 - RECENT, 0)]
            seconds, steps = timed[-1]["seconds"] - first["seconds"], timed[-1]["step"] - first["step"]
        else:
            seconds, steps = self.seconds, self.step
        return steps * self.batch / seconds if seconds > 0 else 0.0

    def sentence(self) -> str:
        """How far it is, in one line."""
        parts = [f"step {self.step:,} of {self.steps:,}" if self.steps else f"step {self.step:,}"]
        epoch, epochs = (self.lines[-1].get("epoch") if self.lines else None), self.config.get("epochs")
        if is_number(epoch):
            parts.append(f"epoch {how_many(epoch)}" + (f" of {how_many(epochs)}" if is_number(epochs) else ""))
        if speed := self.speed():
            parts.append(f"{speed:,.0f} images per second")
        if self.status.state == "running" and speed and self.steps:
            parts.append(f"about {duration((self.steps - self.step) * self.batch / speed)} of training left")
        elif self.seconds:
            parts.append(f"{duration(self.seconds)} of training")
        return ", ".join(parts)

    def curve(self, name: str) -> Line:
        """Of a metric over the steps, thinned; images per second too."""
        if name == SPEED:
            points = list(self.speeds())
        else:
            points = [(line["step"], line[name]) for line in self.lines if is_number(line.get(name))]
        points = thinned(points)
        return Line(name, [float(x) for x, _ in points], [y for _, y in points])


SPEED = "images per second"


def how_many(epochs: float) -> str:
    return f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_log(file: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The lines of a log, without damaged ones. most: of a longer one about so many, evenly spaced with the first and
    the last, and besides them those with evaluations and verdicts, up to two thirds as many."""
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return []
    text = text[: text.rfind(b"\n") + 1]
    if not most or text.count(b"\n") <= most:
        return [line for line in map(parsed, text.splitlines()) if line]
    spaced = {text.rfind(b"\n", 0, i * (len(text) - 1) // (most - 1)) + 1 for i in range(most)}
    special = sorted({begin for mark in (b'"eval/', b'"health"') for begin in lines_with(mark, text)})
    few = special[:: -(-len(special) // (2 * most // 3)) or 1]
    begins = sorted(spaced.union(few, special[-1:]))
    return [line for begin in begins if (line := parsed(text[begin : text.find(b"\n", begin)]))]


def lines_with(mark: bytes, text: bytes) -> Iterator[int]:
    """Where they begin."""
    place = text.find(mark)
    while place >= 0:
        yield text.rfind(b"\n", 0, place) + 1
        place = text.find(mark, text.find(b"\n", place))


def parsed(text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else {}


def thinned(points: list[tuple[int, float]], most: int = POINTS) -> list[tuple[int, float]]:
    """The least and the greatest of each stretch, so that no spike is lost, and the ends."""
    if len(points) <= most:
        return points
    stretches = most // 2 - 1
    kept = {0, len(points) - 1}
    for i in range(stretches):
        places = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        kept |= {min(places, key=lambda place: points[place][1]), max(places, key=lambda place: points[place][1])}
    return [points[place] for place in sorted(kept)]
