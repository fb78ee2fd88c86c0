"""The runs below a folder, each as a row of a table, with its curves.

Each is read anew from its own folder, whatever its state and version. Its parts, such as the runs of a choice of a
rate, are not listed.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sslvit.reports.progress import SPEED, Progress, how_many, is_number
from sslvit.runs import files
from sslvit.runs.ending import held_locks, last_change
from sslvit.runs.files import CHECKPOINTS, LOCK, METRICS

MOST, FEWEST, NUMBERS = 300, 40, 500_000  # lines that are read of a log; numbers in a page, about
NOT_CURVES = ("step", "epoch", "seconds")


class RunRow(NamedTuple):
    """A run in the table. Of what is not known, nothing or None."""

    name: str  # its path below the folder
    folder: Path
    state: str
    note: str = ""
    objective: str = ""
    backbone: str = ""
    data: str = ""
    progress: str = ""
    share: float | None = None
    accuracies: dict[str, tuple[float, float]] = {}  # noqa: RUF012  by protocol: at the start and at last, in %
    tested: float | None = None  # in %
    loss: float | None = None
    images: int | None = None
    seconds: float | None = None
    speed: float | None = None
    flops: float | None = None
    changed: float = 0.0
    curves: dict[str, Any] = {}  # noqa: RUF012  for the page


def read(folder: Path) -> list[RunRow]:
    """The runs, the one that changed last first."""
    folders, locks = sorted(runs_below(folder)), held_locks()
    most = min(max(NUMBERS // (12 * (len(folders) or 1)), FEWEST), MOST)
    rows = [row_of(run, str(run.relative_to(folder)), most, locks) for run in folders]
    return sorted(rows, key=lambda row: row.changed, reverse=True)


def runs_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        here = Path(parent)
        if inside := is_run(here, names, folders):
            yield here
        # Not what a run keeps in folders of its own, and nothing hidden.
        folders[:] = [
            one for one in folders if not one.startswith(".") and not (inside and files.FOLDER.fullmatch(one))
        ]


def is_run(folder: Path, names: list[str] | None = None, folders: list[str] | None = None) -> bool:
    names = os.listdir(folder) if names is None else [*names, *(folders or [])]
    return LOCK in names or {METRICS, "config.json"} <= {*names} or {CHECKPOINTS, "config.json"} <= {*names}


def row_of(folder: Path, name: str, most: int, locks: set[tuple[int, int]]) -> RunRow:
    """A folder that cannot be read is a row that says so."""
    try:
        progress = Progress(folder, most, locks)
        return row(progress, name)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        return RunRow(name, folder, "broken", f"its files cannot be read ({why})")


def row(progress: Progress, name: str) -> RunRow:
    last = progress.lines[-1] if progress.lines else {}
    epochs, epoch = progress.config.get("epochs"), last.get("epoch")
    done = f"{how_many(epoch)} of {how_many(epochs)}" if is_number(epoch) and is_number(epochs) else ""
    cost, losses = progress.cost, [line["loss"] for line in progress.lines if is_number(line.get("loss"))]
    finished, flops = progress.status.state == "finished", cost.get("flops")
    top1 = progress.tested.get("top1")
    damaged = ""  # before its log opens a run has no config.json, and may be writing it just now
    if not progress.config and progress.status.state != "running" and (progress.folder / "config.json").exists():
        damaged = "its config.json is damaged"
    return RunRow(
        name,
        progress.folder,
        progress.status.state,
        progress.status.message or damaged or "; ".join(progress.verdicts[-1:]),
        progress.objective,
        progress.backbone,
        progress.data,
        done,
        progress.step / progress.steps if progress.steps else None,
        {
            one.protocol: (100 * one.start, 100 * one.end)
            for one in progress.rows()
            if one.readout == progress.readout and is_number(one.start) and is_number(one.end)
        },
        100 * top1 if isinstance(top1, float) else None,
        losses[-1] if losses else None,
        progress.images or None,
        progress.seconds or None,
        progress.speed() or None,
        flops if finished and is_number(flops) else None,
        last_change(progress.folder),
        curves(progress),
    )


def curves(progress: Progress) -> dict[str, Any]:
    """What the page draws: each metric's steps and values, and the seconds at some steps."""
    metrics: dict[str, tuple[list[int], list[float]]] = {}
    for line in progress.lines:
        for name, value in line.items():
            if name not in NOT_CURVES and is_number(value):
                steps, values = metrics.setdefault(readable(name, progress.readout), ([], []))
                steps.append(line["step"])
                values.append(short(100 * value if name.startswith("eval/") else value))
    if speeds := list(progress.speeds()):
        metrics[SPEED] = [step for step, _ in speeds], [short(speed) for _, speed in speeds]
    timed = [(line["step"], round(line["seconds"])) for line in progress.lines if is_number(line.get("seconds"))]
    return {"batch": progress.batch, "time": timed, "metrics": metrics}


def readable(name: str, declared: str) -> str:
    """eval/mean/20-nn as 20-nn, where mean is the readout that the objective declares."""
    if not name.startswith("eval/") or name.count("/") != 2:
        return name.replace("_", " ")
    _, readout, protocol = name.split("/")
    return f"{protocol}, %" if readout == declared else f"{protocol} of {readout}, %"


def short(value: float) -> float:
    return float(f"{value:.5g}")


def summary(rows: list[RunRow]) -> str:
    counts = Counter(one.state for one in rows)
    return f"{len(rows)} {'run' if len(rows) == 1 else 'runs'}: " + ", ".join(
        f"{n} {s}" for s, n in counts.most_common()
    )
