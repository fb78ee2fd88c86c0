"""What a run came to: a table in the terminal, a page for the eye, and a card for the model.

The page (report.html, and report.md for where no browser is) is made of the run's folder alone.
"""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sslvit.config import TrainConfig, configuration
from sslvit.data.loader import Views
from sslvit.data.source import Images
from sslvit.errors import CannotWrite, DataError
from sslvit.evaluate.monitor import table
from sslvit.objectives.objective import Objective
from sslvit.reports import page
from sslvit.reports.charts import Line, line_chart
from sslvit.reports.pictures import draw_pictures
from sslvit.runs.folder import check_no_links
from sslvit.runs.log import duration
from sslvit.runs.public import markdown
from sslvit.storage import durable
from sslvit.storage.jsonl import read_lines
from sslvit.storage.sealed import NUMBER, check, read, readable
from sslvit.training.cost import COST
from sslvit.views.batching import to_pair
from sslvit.weights.card import card
from sslvit.weights.folder import CONFIG, config_of, load_described

CAPTIONS = {
    "views.png": "The first images, each whole and in the views that it is trained on.",
    "reconstructions.png": "A view, what the objective was shown of it, and what it predicted.",
    "neighbours.png": "A few images, each with those whose features are nearest, the nearest first.",
    "attention.png": "What the class token attends to, through all layers (rollout) and in the last one.",
    "filters.png": "Principal components of the patch filters.",
    "positions.png": "How alike the positions' embeddings are: each tile is one patch against all.",
    "distances.svg": "Mean attention distance of each head, by layer.",
}
HARDWARE = {"process": "processes", "thread": "threads"}
INSIDE = ("attention.png", "filters.png", "positions.png", "distances.svg")


def finish(
    config: TrainConfig,
    objective: Objective,
    source: Images,
    views: Views,
    evaluations: list[dict[str, Any]],
    accelerator: Accelerator,
) -> None:
    """The end of a recipe that trains: what was learned, in the terminal and in the run's folder."""
    accelerator.print(table(evaluations, objective.readout, beginning(configuration(config))))
    if not accelerator.is_main_process:
        return
    if not (config.out / "model").exists():
        raise CannotWrite(f"{config.out / 'model'} was deleted or moved before the report was written")
    check_no_links(config.out)
    report = f"a report in {config.out / 'report.html'}"
    try:
        draw_pictures(config, objective, source, views, accelerator)
        write_report(config.out)
    except (OSError, DataError) as error:  # the model is there; a full disk must not make a failure of the run
        why = getattr(error, "strerror", None) or error
        report = f"and no report was written ({why}): the same command with --resume writes it"
    accelerator.print(f"The model is in {config.out / 'model'}, {report}")


def beginning(config: dict[str, Any]) -> str:
    return "given start" if config.get("init_from") or config.get("start") else "random start"


class Run:
    """What a run's folder holds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = self._read("config.json", image_size=int | list)
        self.environment = self._read("environment.json", packages=dict)
        self.cost = self._read("cost.json", **COST, images_per_second=NUMBER, processes=int, threads=int)
        self.lines = [line for line in read_lines(folder / "metrics.jsonl") if isinstance(line.get("step"), int)]
        self.evaluations = [line for line in self.lines if any(name.startswith("eval/") for name in line)]
        last = self.row(-1)
        self.accuracies = [name for name in last if name.startswith("eval/") and name in self.row(0)]
        backbone, self.model = load_described(folder)
        with readable(folder / "model" / CONFIG):
            check(self.model, objective=str, data=str)
        self.name, self.parameters = backbone.name, sum(p.numel() for p in backbone.parameters())

    def _read(self, name: str, **kinds: Any) -> dict[str, Any]:
        with readable(self.folder / name):
            return read(self.folder / name, **kinds)

    def summary(self) -> list[str]:
        cost, model = self.cost, self.model
        pixels = " x ".join(map(str, dict.fromkeys(to_pair(self.config["image_size"]))))
        sentences = [
            f"{model['objective']} trained {self.name}, {self.parameters / 1e6:.1f} million parameters, on "
            f"{model['data']}: {cost['images']:,} images of {pixels} px in "
            f"{duration(cost['seconds'])} on {cost['device']}."
        ]
        for name in self.accuracies:
            _, readout, protocol = name.split("/")
            if readout != model["readout"]:
                continue
            sentences.append(
                f"By {protocol} of the {readout} readout, which the objective declares, {self.row(-1)[name]:.1%} of "
                f"test images are told right; at the start it was {self.row(0)[name]:.1%}."
            )
        sentences += self.environment.get("lengths", [])
        verdicts = [line["health"] for line in self.lines if line.get("health")]
        return sentences + (verdicts or ["Its features did not collapse."])

    def row(self, which: int) -> dict[str, Any]:
        return self.evaluations[which] if self.evaluations else {}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Accuracies at the start and at the end."""
        first, last = self.row(0), self.row(-1)
        rows = []
        for name in self.accuracies:
            _, readout, protocol = name.split("/")
            mark = " *" if readout == self.model["readout"] else ""
            rows.append([f"{protocol} of {readout}{mark}", f"{100 * first[name]:.1f}", f"{100 * last[name]:.1f}"])
        return ["accuracy, %", beginning(self.config), "trained"], rows

    def costs(self) -> tuple[list[str], list[list[str]]]:
        cost = self.cost
        used = [f"1 {one}" if cost[many] == 1 else f"{cost[many]} {many}" for one, many in HARDWARE.items()]
        operations = "not counted" if cost["flops"] is None else f"{cost['flops']:.2e}"
        rows = [
            ["images seen", f"{cost['images']:,}"],
            ["time", duration(cost["seconds"])],
            ["images a second", f"{cost['images_per_second']:,.0f}"],
            ["operations", operations],
            ["peak memory", f"{cost['peak_memory_bytes'] / 2**20:,.0f} MiB"],
            ["device", ", ".join([cost["device"], *used])],
        ]
        return ["cost", ""], rows

    def curve(self, name: str) -> Line:
        chosen = [line for line in self.lines if name in line]
        return Line(name, [line["step"] for line in chosen], [line[name] for line in chosen])


def write_report(folder: Path) -> None:
    """report.html and report.md of a run, and its model's card."""
    check_no_links(folder)
    run = Run(folder)
    durable.replace_text(folder / "model" / "README.md", as_card(run))
    durable.replace_text(folder / "report.html", as_page(run))
    durable.replace_text(folder / "report.md", as_markdown(run))  # the last file of a run: a comparison waits for it


def curves(run: Run) -> str:
    evaluated = [run.curve(name)._replace(name=name.removeprefix("eval/")) for name in run.row(-1) if "eval/" in name]
    monitor = [line for line in evaluated if line.name.startswith(run.model["readout"]) and len(line.x) > 2]
    return page.columns(
        page.chart(line_chart([run.curve("loss")], x="step", y="loss"), "The loss that is trained on."),
        page.chart(line_chart(monitor, x="step", y="accuracy"), "Test accuracy while training."),
    )


def pictures(run: Run) -> dict[str, str]:
    folder, small = run.folder / "pictures", max(to_pair(run.config["image_size"])) < 100
    small_of = {name: small and not name.endswith(".svg") for name in CAPTIONS}
    return {name: page.picture(folder / name, text, small=small_of[name]) for name, text in CAPTIONS.items()}


def files(run: Run) -> list[str]:
    names = {"Configuration": "config.json", "Environment": "environment.json", "Data": "data.txt"}
    found = {name: run.folder / file for name, file in names.items() if (run.folder / file).exists()}
    return [page.folded(name, page.code(file.read_text("utf-8", "replace"))) for name, file in found.items()]


def as_page(run: Run) -> str:
    last = run.lines[-1] if run.lines else {}
    names = [name for name in last if isinstance(last[name], float) and not name.startswith("eval/")]
    others = [name for name in names if name not in ("loss", "epoch", "seconds")]
    shown = pictures(run)
    inside = [shown[name] for name in INSIDE if name in shown]
    return page.page(
        f"{run.model['objective']} on {run.model['data']}",
        [
            page.bullets(run.summary()),
            page.table(*run.table()) if run.evaluations else page.paragraph("Nothing was evaluated."),
            page.paragraph(f"* the readout that the objective declares ({run.model['readout']})", "faint"),
            page.heading("Training"),
            curves(run),
            page.heading("What it sees and makes of it"),
            *(picture for name, picture in shown.items() if name not in INSIDE),
            page.folded("Inside the model", *inside),
            page.heading("Cost"),
            page.table(*run.costs()),
            page.folded(
                "Other curves",
                page.columns(*(page.chart(line_chart([run.curve(n)], x="step", y=n), n) for n in others)),
            ),
            *files(run),
        ],
    )


def as_markdown(run: Run) -> str:
    title = markdown(f"{run.model['objective']} on {run.model['data']}")
    parts = [f"# {title}", *(f"- {markdown(text)}" for text in run.summary()), ""]
    parts += [
        *escaped_table(*run.table()),
        "",
        f"\\* the readout that the objective declares ({run.model['readout']})",
    ]
    parts += ["", *escaped_table(*run.costs()), ""]
    for name, caption in CAPTIONS.items():
        if (run.folder / "pictures" / name).exists():
            parts += [f"![{caption}](pictures/{name})", ""]
    return "\n".join(parts)


def escaped_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return markdown_table([markdown(cell) for cell in header], [[markdown(c) for c in row] for row in rows])


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def as_card(run: Run) -> str:
    tables = [*markdown_table(*run.table()), "", *markdown_table(*run.costs()), ""]
    architecture = config_of(run.folder / "model")["architecture"]
    return card(run.folder.name, run.summary(), run.model["readout"], architecture, tables)
