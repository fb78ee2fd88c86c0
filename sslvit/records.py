"""What a run writes down of itself: config.json, environment.json, metrics.jsonl, and the trackers asked for."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sslvit import sealed
from sslvit.config import TrainConfig, configuration
from sslvit.jsonl import read_lines
from sslvit.public import without_secrets
from sslvit.run_folder import MetricsLog

PACKAGES = ("sslvit", "torch", "torchvision", "accelerate", "datasets", "safetensors", "numpy", "pillow")


class Log:
    """The run's records: config.json, environment.json, metrics.jsonl, and whatever trackers were asked for."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, step: int, facts: dict[str, Any], owed: bool):
        self.accelerator, self.trackers = accelerator, config.log_with
        if self.trackers:
            flat = {name: without_secrets(str(value)) for name, value in configuration(config).items()}
            accelerator.init_trackers("sslvit", flat)
        if accelerator.is_main_process:
            self.metrics = MetricsLog(config.out / "metrics.jsonl", step, owed=owed)
            describe(config, facts)

    def write(self, step: int, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.metrics.write(step, values)
        if self.trackers:
            self.accelerator.log(values, step=step)

    def sync(self) -> None:
        """The log on the disk, before a checkpoint that follows from it."""
        if self.accelerator.is_main_process:
            self.metrics.sync()

    def close(self) -> None:
        # Not accelerator.end_training(): that takes down the processes' group, which evaluation still needs.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.is_main_process:
            self.metrics.sync()
            self.metrics.close()


def describe(config: TrainConfig, facts: dict[str, Any]) -> None:
    facts = {name: without_secrets(fact) if isinstance(fact, str) else fact for name, fact in facts.items()}
    texts = {"config.json": configuration(config), "environment.json": environment() | facts}
    for name, content in texts.items():
        sealed.write(config.out / name, content)


def complete(config: TrainConfig, step: int, facts: dict[str, Any]) -> None:
    """What a run that has ended wrote of itself, where that is missing, damaged, or of a longer run that was begun."""
    MetricsLog(config.out / "metrics.jsonl", step).close()
    read = {name: sealed.intact(config.out / name) for name in ("config.json", "environment.json")}
    if read["config.json"].get("epochs") != config.epochs or not read["environment.json"]:
        describe(config, facts)


def evaluations(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a log that hold an evaluation."""
    return [line for line in read_lines(metrics) if any(name.startswith("eval/") for name in line)]


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
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
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
    folder = os.path.dirname(os.path.abspath(sys.argv[0])) or "."
    try:
        git = ["git", "-C", folder, "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
