"""All runs below a folder: a table in the terminal, and one page with their curves over each other.

    sslvit runs                             of ./runs
    sslvit runs /data/runs --watch 30       rewritten every 30 seconds

The page can be left open while runs go on.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sslvit.cli.run import shown
from sslvit.errors import CannotWrite, Error, NoInput
from sslvit.reports.run_rows import RunRow, is_run, read, summary
from sslvit.reports.runs_page import as_page
from sslvit.runs.log import duration
from sslvit.storage import durable

COLUMNS = ("run", "state", "objective", "epochs", "accuracy, %", "time", "images/s", "last line")


@dataclass(frozen=True)
class Config:
    """Show all runs below a folder: a table here, and a page with their curves."""

    group: ClassVar[str] = "Run"
    positional: ClassVar[tuple[str, ...]] = ("folder",)
    folder: Path = Path("runs")
    """The folder. Runs may lie at any depth."""
    out: Path | None = None
    """Where the page is written; by default FOLDER/runs.html."""
    watch: float = 0.0
    """Rewrite it every so many seconds, at least 1, until Ctrl-C; 0 writes it once."""


def main(config: Config) -> None:
    if config.watch != 0 and not 1 <= config.watch < float("inf"):
        raise ValueError(
            f"--watch {config.watch:g}: the seconds between two pages must be 1 or more; 0 writes one page"
        )
    write(config.folder, config.out, watch=config.watch)
    try:
        while config.watch:
            time.sleep(config.watch)
            try:
                write(config.folder, config.out, watch=config.watch, quiet=True)
            except (Error, OSError) as error:  # a server or a disk may be back at the next
                print(f"No page was written: {error}", flush=True)
    except KeyboardInterrupt:
        print()


def write(folder: Path, out: Path | None = None, *, watch: float = 0.0, quiet: bool = False) -> Path:
    """The page; and, unless quiet, the table in the terminal."""
    if not folder.is_dir():
        raise NoInput(f"there is no folder {folder}: name one that contains runs, sslvit runs FOLDER")
    if out is None and is_run(folder):
        raise ValueError(
            f"{folder} is one run, whose page is {folder / 'report.html'}: name the folder above, or --out"
        )
    rows = read(folder)
    if not rows:
        raise NoInput(f"no run is below {folder}: name a folder that contains some, sslvit runs FOLDER")
    file = out or folder / "runs.html"
    if not quiet:
        print("\n".join(table(rows)), flush=True)
    try:
        durable.replace(
            file, [as_page(folder, rows, file.absolute().parent, watch).encode("utf-8", "backslashreplace")]
        )
    except OSError as error:
        raise CannotWrite(f"{file} cannot be written: {error.strerror or error}; choose another --out") from error
    if not quiet:
        print(f"The page is {file}" + (f", rewritten every {watch:g} seconds until Ctrl-C" if watch else ""))
    return file


def table(rows: list[RunRow]) -> list[str]:
    """For a terminal, with a summary."""
    cells = [COLUMNS]
    for one in rows:
        accuracy = "" if one.tested is None else f"{one.tested:.1f} test"
        for protocol, (start, last) in list(one.accuracies.items())[-1:]:
            accuracy = f"{start:.1f} > {last:.1f} {protocol}"
        when = time.strftime("%m-%d %H:%M", time.localtime(one.changed)) if one.changed else ""
        seconds = duration(one.seconds) if one.seconds else ""
        speed = f"{one.speed:,.0f}" if one.speed else ""
        cells.append((shown(one.name), one.state, shown(one.objective), one.progress, accuracy, seconds, speed, when))
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    right = [name in ("time", "images/s") for name in COLUMNS]
    lines = [
        "  ".join(text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return [*lines, summary(rows)]
