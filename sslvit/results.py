"""The results of a comparison: every number of its parts, what the differences support, a page about it."""

import json
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from sslvit import page
from sslvit.charts import Line, line_chart
from sslvit.evaluate.predictions import load_predictions
from sslvit.model_folder import described
from sslvit.records import duration
from sslvit.report import Run, curves, files, markdown_table, pictures
from sslvit.statistics import Difference, difference, sentence

SCRATCH = "scratch"


def collect(out: Path, methods: dict[str, str], seeds: list[int], models: dict[str, Path]) -> dict[str, Any]:
    """methods: names by folder. models: the model of a method and seed, by "method-seed". Accuracies are lists, one for
    each seed; differences are of which test images were right."""
    values: dict[str, dict[str, list[float]]] = {}
    right: dict[str, dict[str, list[Tensor]]] = {}
    for method, name in methods.items():
        for seed in seeds:
            readout = described(models[f"{method}-{seed}"])["readout"]
            for file in sorted((out / "probes" / f"{method}-{seed}").glob("*/numbers.json")):
                numbers = json.loads(file.read_text())[f"pretrained/{readout}"]
                where = "" if file.parent.name == "own" else f"{file.parent.name}: "
                for column, value in numbers.items():
                    if "-nn" in column or column.startswith("linear") or column.endswith("-shot"):
                        values.setdefault(where + column, {}).setdefault(name, []).append(value)
                linear = [column for column in numbers if column.startswith("linear")]
                if linear:  # of the last, which has the most labels, the predictions are there
                    hit = hits(file.with_name(f"pretrained-{readout}.parquet"))
                    right.setdefault(where + linear[-1], {}).setdefault(name, []).append(hit)
            for file in sorted((out / "finetuned" / f"{method}-{seed}").glob("*/test.json"), key=fraction_of):
                column = f"fine-tuned {100 * fraction_of(file):g} %"
                values.setdefault(column, {}).setdefault(name, []).append(json.loads(file.read_text())["top1"])
                right.setdefault(column, {}).setdefault(name, []).append(hits(file.with_name("predictions.parquet")))
    costs = {name: cost_of(out, method, seeds) for method, name in methods.items()}
    found = [
        {"column": column, "first": a, "second": b} | difference(by_method[a], by_method[b])._asdict()
        for column, by_method in right.items()
        for i, b in enumerate(by_method)
        for a in list(by_method)[i + 1 :]
    ]
    return {"methods": list(methods.values()), "seeds": seeds, "values": values, "costs": costs, "differences": found}


def hits(predictions: Path) -> Tensor:
    """Whether each image was right, in the order of their ids."""
    found = load_predictions(predictions)
    return (found.probabilities.argmax(-1) == found.labels)[found.ids.argsort()]


def fraction_of(file: Path) -> float:
    return float(file.parent.name)


def cost_of(out: Path, method: str, seeds: list[int]) -> list[dict[str, Any]]:
    files = [out / "runs" / f"{method}-{seed}" / "cost.json" for seed in seeds]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def sentences(results: dict[str, Any], column: str) -> list[str]:
    """What the differences of a column support, those to scratch first."""
    place, _, column_there = column.rpartition(": ")
    how, _, share = column_there.partition(" ")
    how = "when fine-tuned" if how == "fine-tuned" else "by a linear probe"
    where = f"{how} with {share} of the labels" + (f" of {place}" if place else "")
    mine = [one for one in results["differences"] if one["column"] == column]
    mine.sort(key=lambda one: SCRATCH not in (one["first"], one["second"]))
    return [
        sentence(one["first"], one["second"], Difference(one["mean"], one["low"], one["high"], one["seeds"]), where)
        + "."
        for one in mine
    ]


def cell(values: list[float]) -> str:
    """The mean, and the deviation over seeds if there are several."""
    tensor = 100 * torch.tensor(values, dtype=torch.float64)
    return f"{tensor.mean():.1f}" + (f" ± {tensor.std():.1f}" if len(values) > 1 else "")


def accuracy_table(
    results: dict[str, Any], columns: list[str]
) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    rows = [
        [name, *(cell(results["values"][column].get(name, [float("nan")])) for column in columns)]
        for name in results["methods"]
    ]
    best = set()
    for j, column in enumerate(columns):
        means = [sum(v) / len(v) for v in (results["values"][column].get(n, [0.0]) for n in results["methods"])]
        best.add((means.index(max(means)), j + 1))
    kinds = {name.rpartition(" ")[0].rpartition(" ")[0] for name in columns}
    kind = next(iter(kinds)) if len(kinds) == 1 else ""  # said once, a narrow screen has room for more columns
    return [f"{kind}, %" if kind else "accuracy, %", *(name.removeprefix(f"{kind} ") for name in columns)], rows, best


def cost_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, costs in results["costs"].items():
        if not costs:
            rows.append([name, "0", "-", "-", "-", "-", "-"])
            continue
        first, seconds = costs[0], [cost["seconds"] for cost in costs]
        mean = sum(seconds) / len(seconds)
        rows.append(
            [
                name,
                f"{first['images']:,}",
                duration(mean),
                f"{first['images'] / mean:,.0f}",
                "-" if first["flops"] is None else f"{first['flops']:.2e}",
                f"{first['peak_memory_bytes'] / 2**20:,.0f} MiB",
                first["device"],
            ]
        )
    return ["pretraining", "images", "time", "images/s", "operations", "peak memory", "device"], rows


def by_share(results: dict[str, Any], kind: str) -> str:
    """Accuracy over the share of the labels, with the deviation over seeds where there are several."""
    columns = [name for name in results["values"] if name.startswith(kind)]
    shares = [float(name.removeprefix(kind).removesuffix("%")) for name in columns]
    lines = []
    for name in results["methods"]:
        values = [results["values"][column][name] for column in columns]
        spread = [100 * stdev(v) for v in values] if all(len(v) > 1 for v in values) else None
        lines.append(Line(name, shares, [100 * sum(v) / len(v) for v in values], spread))
    if len(shares) < 2:
        return ""
    return line_chart(lines, x="% of the labels", y="accuracy, %", logarithmic=True, ticks=shares)


def notes(results: dict[str, Any]) -> list[str]:
    seeds = len(results["seeds"])
    texts = ["Every method started from scratch's weights and was read by the readout that its objective declares."]
    if seeds == 1:
        texts.append("One seed: what another seed would give was not measured; intervals are over test images alone.")
    else:
        texts.append(f"Mean ± deviation of {seeds} seeds; intervals are of 95 %, over test images and seeds.")
    return [*texts, "Intervals are not widened for the number of pairs that are compared."]


def one_run(name: str, run: Run) -> str:
    return page.folded(name, page.bullets(run.summary()), curves(run), *pictures(run).values(), *files(run))


def as_page(results: dict[str, Any], runs: dict[str, Path], commands: list[str]) -> str:
    """runs: of each method, the run of the first seed."""
    tuned = [name for name in results["values"] if name.startswith("fine-tuned")]
    own = [name for name in results["values"] if name not in tuned and ": " not in name]
    other = [name for name in results["values"] if ": " in name]
    lead = [*tuned[:1], *[name for name in own if name.startswith("linear")][-1:]]
    about = [one for name in lead for one in sentences(results, name) if SCRATCH in one]
    told = list(dict.fromkeys(one["column"] for one in results["differences"]))
    kinds = {"fine-tuned ": "All weights trained.", "linear ": "Logistic regression on frozen features."}
    return page.page(
        f"What pretraining bought: {results['data']}",
        [
            page.bullets(about),
            page.heading("Fine-tuned") if tuned else "",
            page.table(*accuracy_table(results, tuned)) if tuned else "",
            page.columns(*(page.chart(by_share(results, kind), caption) for kind, caption in kinds.items())),
            page.heading("Frozen features"),
            page.table(*accuracy_table(results, own)),
            *([page.heading("Other images"), page.table(*accuracy_table(results, other))] if other else []),
            page.bullets(notes(results)),
            page.heading("Cost"),
            page.table(*cost_table(results)),
            page.folded("What every difference supports", *(page.bullets(sentences(results, name)) for name in told)),
            page.heading("How each was trained") if runs else "",
            *(one_run(name, Run(folder)) for name, folder in runs.items()),
            page.folded("Settings", page.code(json.dumps(results["settings"], indent=1))),
            page.folded("Commands", page.code("\n".join(commands))),
        ],
    )


def as_markdown(results: dict[str, Any]) -> str:
    """Without times, so that it is the same for a comparison that was stopped and went on."""
    tuned = [name for name in results["values"] if name.startswith("fine-tuned")]
    others = [name for name in results["values"] if name not in tuned]
    parts = [f"# What pretraining bought: {results['data']}", ""]
    for columns in filter(None, (tuned, others)):
        parts += [*markdown_table(*accuracy_table(results, columns)[:2]), ""]
    told = dict.fromkeys(one["column"] for one in results["differences"])
    parts += [f"- {text}" for text in [*notes(results), *(s for name in told for s in sentences(results, name))]]
    return "\n".join([*parts, ""])
