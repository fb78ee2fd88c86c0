"""The reports of a comparison: collected from the files of its jobs, saved in results.json, and written anew from it.

`sslvit report FOLDER` does the latter for a comparison, a study and a run.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from sslvit.errors import DataError, NoInput
from sslvit.experiments import study
from sslvit.experiments.compare import ComparisonConfig, names_of, places
from sslvit.experiments.records import Records
from sslvit.experiments.report import as_markdown, as_page, figure
from sslvit.experiments.results import SCRATCH, collect
from sslvit.reports import tested
from sslvit.reports.run import write_report
from sslvit.storage import durable, sealed

SETTINGS, RESULTS = "compare.json", "results.json"
LONGEST = 256 << 20  # bytes of results
SHOWN = ("config.json", "environment.json", "cost.json", "metrics.jsonl", "model")  # of a run


def models_of(config: ComparisonConfig) -> dict[str, Path]:
    """The model of each method and seed."""
    methods, seeds = names_of(config.methods), range(config.seeds)
    models = {f"{m}-{s}": config.out / "starts" / f"{m}-{s}" for m in SCRATCH.values() for s in seeds}
    return models | {f"{m}-{s}": config.out / "runs" / f"{m}-{s}" for m in methods for s in seeds}


def gather(
    config: ComparisonConfig, settings: dict[str, Any], commands: list[str], records: Records | None = None
) -> dict[str, Any]:
    """The results of a comparison whose jobs are all done, here or, by their records, elsewhere."""
    methods, seeds = names_of(config.methods), list(range(config.seeds))
    about = {"data": config.data, "settings": settings, "commands": commands}
    return about | collect(config.out, methods, seeds, places(config), models_of(config), records)


def write(results: dict[str, Any], out: Path) -> None:
    """results.json, report.html, report.md and, of fine-tuning, fine-tuning.svg, each whole or not at all."""
    runs = {name: out / "runs" / f"{folder}-0" for folder, name in names_of(results["settings"]["methods"]).items()}
    runs = {name: run for name, run in runs.items() if all((run / file).exists() for file in SHOWN)}
    texts = {RESULTS: sealed.text(results).decode()}
    texts |= {"report.html": as_page(results, runs, results.get("commands", [])), "report.md": as_markdown(results)}
    texts |= {"fine-tuning.svg": svg} if (svg := figure(results)) else {}
    for name, text in texts.items():
        durable.replace_text(out / name, text)


def report_again(folder: Path) -> Path:
    """Writes the report of a run, a study or a comparison from the files in its folder. Returns the file to read."""
    if (folder / "cost.json").exists():
        if (folder / "test.json").exists():
            tested.write_report(folder)
        else:
            write_report(folder)
        return folder / "report.html"
    if (folder / RESULTS).exists():
        try:
            results = sealed.read(folder / RESULTS, longest=LONGEST)
            if "study" in results:
                study.write(results, folder)
                return folder / "results.md"
            write(results, folder)
        except DataError:  # of a run whose report is part of this one
            raise
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"{folder / RESULTS} cannot be read ({error!r}): delete it, and the command that made it collects it "
                "again"
            ) from error
    elif (folder / SETTINGS).exists():
        write(gather_again(folder), folder)
    else:
        raise NoInput(f"{folder} contains no finished run, no comparison, and no finished study")
    return folder / "report.html"


def gather_again(folder: Path) -> dict[str, Any]:
    """The results of a comparison by its settings alone, without its command."""
    with sealed.readable(folder / SETTINGS, "run the command of the comparison again"):
        settings = sealed.read(folder / SETTINGS, methods=list, seeds=int)
    known = {one.name for one in fields(ComparisonConfig)}
    chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k in known}
    config = ComparisonConfig(**chosen | {"out": folder})
    runs = [folder / "runs" / f"{method}-{seed}" for method in names_of(config.methods) for seed in range(config.seeds)]
    if missing := [run for run in runs if not (run / "report.md").exists()]:
        raise NoInput(f"{folder} is an unfinished comparison: {missing[0]} is missing; its command continues it")
    return gather(config, settings, [])
