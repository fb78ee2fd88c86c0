"""The reports of a comparison: collected from what its parts left, kept in results.json, and written anew from there.

`python -m sslvit report FOLDER` does the latter for a comparison, a study and a run.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from sslvit import durable, sealed, study
from sslvit.compare import ComparisonConfig, called, places
from sslvit.errors import DataError, NoInput
from sslvit.report import write_report
from sslvit.results import SCRATCH, collect
from sslvit.results_page import as_markdown, as_page

SETTINGS, KEPT = "compare.json", "results.json"
LONGEST = 256 << 20  # bytes of results
SHOWN = ("config.json", "environment.json", "cost.json", "metrics.jsonl", "model")  # of a run, where they are kept


def gather(config: ComparisonConfig, settings: dict[str, Any], commands: list[str]) -> dict[str, Any]:
    """The results of a comparison whose parts are all done."""
    methods, seeds = called(config.methods), list(range(config.seeds))
    models = {f"{m}-{s}": config.out / "starts" / f"{m}-{s}" for m in SCRATCH.values() for s in seeds}
    models |= {f"{m}-{s}": config.out / "runs" / f"{m}-{s}" for m in methods for s in seeds}
    about = {"data": config.data, "settings": settings, "commands": commands}
    return about | collect(config.out, methods, seeds, places(config), models)


def write(results: dict[str, Any], out: Path) -> None:
    """results.json, report.html and report.md, each whole or not at all."""
    runs = {name: out / "runs" / f"{folder}-0" for folder, name in called(results["settings"]["methods"]).items()}
    runs = {name: run for name, run in runs.items() if all((run / file).exists() for file in SHOWN)}
    texts = {KEPT: sealed.text(results).decode()}
    texts |= {"report.html": as_page(results, runs, results.get("commands", [])), "report.md": as_markdown(results)}
    for name, text in texts.items():
        durable.replace_text(out / name, text)


def report_again(folder: Path) -> Path:
    """The report of a run, a study or a comparison, from what its folder keeps. Returns the file to look at."""
    if (folder / "cost.json").exists():
        write_report(folder)
        return folder / "report.html"
    if (folder / KEPT).exists():
        try:
            results = sealed.read(folder / KEPT, longest=LONGEST)
            if "study" in results:
                study.write(results, folder)
                return folder / "results.md"
            write(results, folder)
        except DataError:  # of a run, whose report is folded in
            raise
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"{folder / KEPT} cannot be read ({error!r}): delete it, and the command that made it collects it again"
            ) from error
    elif (folder / SETTINGS).exists():
        write(gather_again(folder), folder)
    else:
        raise NoInput(f"{folder} holds no run that has ended, no comparison, and no study that has ended")
    return folder / "report.html"


def gather_again(folder: Path) -> dict[str, Any]:
    """The results of a comparison by its settings, which are all that is left of its command."""
    with sealed.readable(folder / SETTINGS, "the command of the comparison says what it is to be"):
        settings = sealed.read(folder / SETTINGS, methods=list, seeds=int)
    known = {one.name for one in fields(ComparisonConfig)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k in known}
    config = ComparisonConfig(**given | {"out": folder})
    runs = [folder / "runs" / f"{method}-{seed}" for method in called(config.methods) for seed in range(config.seeds)]
    if missing := [run for run in runs if not (run / "report.md").exists()]:
        raise NoInput(f"{folder} is a comparison that has not ended: {missing[0]} is to be done; its command goes on")
    return gather(config, settings, [])
