"""The records of a run: config.json, environment.json, metrics.jsonl, the trackers, and the progress bar."""

import json
import logging
import math
import os
import platform
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from sslvit.config import TrainConfig
from sslvit.processes.progress import in_notebook, progress_bar
from sslvit.processes.system import cores
from sslvit.runs.ending import Watcher, begin_anew
from sslvit.runs.files import METRICS
from sslvit.runs.public import without_secrets
from sslvit.runs.settings import configuration
from sslvit.storage import durable, jsonl, sealed

log = logging.getLogger(__name__)

PACKAGES = ("sslvit", "torch", "torchvision", "accelerate", "datasets", "safetensors", "numpy", "pillow")


class Log:
    """`metrics.jsonl`: one JSON object per line, steps strictly increasing, across however many restarts; and the
    trackers. Only the main process writes.

    Opened with the step of the checkpoint that the run continues from: lines of later steps, which will come again,
    and a torn last line are dropped. Step 0 starts afresh. `sync` before a checkpoint makes the log as durable as it.
    pending: the line of this step will come again too.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        *,
        pending: bool = False,
        trackers: Sequence[GeneralTracker | Watcher] = (),
        is_main_process: bool = True,
    ):
        self.path, self.trackers, self.is_main_process = path, trackers, is_main_process
        if not is_main_process:
            return
        text = path.read_bytes() if path.exists() else b""
        last = step - 1 if pending else step
        lines = [line for line in jsonl.parse(path, text) if step > 0 and 0 <= _step_of(line.values) <= last]
        increasing = _longest_increasing([_step_of(line.values) for line in lines])
        for place, line in enumerate(lines):
            if place not in increasing:
                jsonl.warn_of_damage(path, line.number, line.text)
        lines = [lines[place] for place in sorted(increasing)]
        self.last = _step_of(lines[-1].values) if lines else -1
        intact = b"".join(line.text + b"\n" for line in lines)
        if dropped := len(text.splitlines()) - len(lines):
            log.warning("%s: %d lines after step %d or damaged were dropped", path, dropped, step)
        if intact != text:
            durable.replace(path, [intact])
        self.fd = durable.without_links(path, os.O_WRONLY | os.O_CREAT)
        self.size, self.unwritten = os.fstat(self.fd).st_size, b""

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Numbers that are not finite become null, which every JSON reader knows. A full disk only delays lines."""
        if not self.is_main_process:
            return
        if step <= self.last:
            raise ValueError(f"{self.path}: step {step} follows step {self.last}")
        self.last = step
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.unwritten += json.dumps({"step": step} | finite).encode() + b"\n"
        self._flush()
        for tracker in self.trackers:
            tracker.log(values, step=step)

    def sync(self) -> None:
        """The log on the disk, before a checkpoint that follows from it."""
        if self.is_main_process:
            self._flush(durably=True)

    def close(self) -> None:
        # Not accelerator.end_training(): that takes down the processes' group, which evaluation still needs.
        for tracker in self.trackers:
            if isinstance(tracker, GeneralTracker):  # watchers are told how the run ended: see `recorded`
                tracker.finish()
        self.sync()
        if self.is_main_process:
            os.close(self.fd)

    def _flush(self, durably: bool = False) -> None:
        try:
            done = 0
            while done < len(self.unwritten):
                done += os.pwrite(self.fd, self.unwritten[done:], self.size + done)
            if durably:
                os.fsync(self.fd)
        except OSError as error:
            os.ftruncate(self.fd, self.size)
            log.warning("%s: %s; the lines since the last good write wait for the next", self.path, error.strerror)
        else:
            self.size, self.unwritten = self.size + done, b""


def _step_of(values: dict[str, Any]) -> int:
    """-1 for a line that a run does not write."""
    step = values.get("step")
    return step if type(step) is int else -1


def _longest_increasing(steps: list[int]) -> set[int]:
    """The places of a longest strictly increasing subsequence: a damaged step costs its own line and no other."""
    ends: list[int] = []  # of a subsequence of each length, the place with the least last step
    before: list[int] = []  # the place that precedes each place
    for place, step in enumerate(steps):
        length = bisect_left(ends, step, key=steps.__getitem__)
        before.append(ends[length - 1] if length else -1)
        ends[length : length + 1] = [place]
    chosen, place = set(), ends[-1] if ends else -1
    while place >= 0:
        chosen.add(place)
        place = before[place]
    return chosen


def open_log(
    config: TrainConfig,
    accelerator: Accelerator,
    step: int,
    facts: dict[str, Any],
    pending: bool,
    watchers: Sequence[Watcher] = (),
) -> Log:
    """With the run's other records, config.json and environment.json, and the trackers that --log_with names."""
    if config.log_with:
        flat = {name: without_secrets(str(value)) for name, value in configuration(config).items()}
        accelerator.init_trackers("sslvit", flat)
    metrics = Log(
        config.out / METRICS,
        step,
        pending=pending,
        trackers=[*(accelerator.trackers if config.log_with else ()), *watchers],
        is_main_process=accelerator.is_main_process,
    )
    if accelerator.is_main_process:
        begin_anew(config.out)
        describe(config, facts)
    return metrics


def describe(config: TrainConfig, facts: dict[str, Any]) -> None:
    facts = {name: without_secrets(fact) if isinstance(fact, str) else fact for name, fact in facts.items()}
    sealed.write(config.out / "config.json", configuration(config))
    sealed.write(config.out / "environment.json", environment() | facts)


def complete(config: TrainConfig, step: int, facts: dict[str, Any]) -> None:
    """Writes the records of a run that has ended where they are missing, damaged, or of a longer run that was begun."""
    Log(config.out / METRICS, step).close()
    epochs = sealed.intact(config.out / "config.json").get("epochs")
    if epochs != config.epochs or not sealed.intact(config.out / "environment.json"):
        describe(config, facts)


def evaluations(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that hold an evaluation."""
    return [line for line in jsonl.read_lines(out / METRICS) if any(name.startswith("eval/") for name in line)]


class Bar:
    """Images done, images per second and time left; a line every 30 seconds if stderr is not a terminal."""

    def __init__(self, shown: bool, step: int, steps: int, batch_size: int):
        self.seen = in_notebook() or sys.stderr.isatty()
        seconds = 0.5 if self.seen else 30.0
        self.batch_size = batch_size
        self.drawn = progress_bar(
            total=steps * batch_size,
            initial=step * batch_size,
            desc="training",
            unit=" images",
            unit_scale=True,
            mininterval=seconds,
            maxinterval=seconds,
            miniters=1,
            dynamic_ncols=True,
            disable=not shown,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drawn.close()

    def show(self, loss: float, unreadable: int) -> None:
        bad = f", {unreadable} unreadable images" if unreadable else ""
        self.drawn.set_postfix_str(f"loss {loss:.4f}{bad}", refresh=False)
        self.drawn.update(self.batch_size)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Shows "evaluating" meanwhile, since the bar stands still."""
        self.drawn.set_description_str("evaluating", refresh=self.seen)
        yield
        self.drawn.set_description_str("training", refresh=self.seen)


def duration(seconds: float) -> str:
    """In words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def environment() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [os.path.basename(sys.argv[0]), *map(without_secrets, sys.argv[1:])],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": platform.platform(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the script that was started, with a + if its tree has changes."""
    folder = os.path.dirname(os.path.abspath(sys.argv[0]))
    git = ["git", "-C", folder, "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
