"""A run's results: a table in the terminal, a page (report.html, and report.md for Markdown), and the model's card.

The page is made of the run's folder alone.
"""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sslvit.config import TrainConfig
from sslvit.data.loader import Views
from sslvit.data.source import Images
from sslvit.errors import CannotWrite, DataError
from sslvit.evaluate.monitor import rows_of, table
from sslvit.objectives.objective import Objective
from sslvit.reports import page
from sslvit.reports.charts import Line, line_chart
from sslvit.reports.pictures import draw_pictures
from sslvit.runs.folder import check_no_links
from sslvit.runs.log import duration
from sslvit.runs.public import markdown
from sslvit.runs.settings import configuration
from sslvit.storage import durable
from sslvit.storage.jsonl import read_lines
from sslvit.storage.sealed import NUMBER, check, read, readable
from sslvit.training.cost import COST
from sslvit.views.batching import to_pair
from sslvit.weights.card import card
from sslvit.weights.folder import CONFIG, config_of, load_described

CAPTIONS = {
    "views.png": "The first images, each whole and in the views that it is trained on.",
    "reconstructions.png": "A view, what the objective saw of it, and what it predicted.",
    "neighbours.png": "A few images, each with its nearest neighbours by features, the nearest first.",
    "patches.png": "Images, and their patches in the colors of three principal components: patches of one color are "
    "alike to the model. First of all patches; then of the foreground alone, where the first component is above 0.",
    "heads.png": "What each head of the last block attends to, from dark, nothing, to its most.",
    "attention.png": "What the class token attends to, through all layers (rollout) and in the last one.",
    "filters.png": "Principal components of the patch filters.",
    "positions.png": "Similarity of the positions' embeddings: each tile is one patch against all.",
    "distances.svg": "Mean attention distance of each head, by layer.",
}
SEEN = ("patches.png", "heads.png")
INSIDE = ("attention.png", "filters.png", "positions.png", "distances.svg")


def finish(
    config: TrainConfig,
    objective: Objective,
    source: Images,
    views: Views,
    evaluations: list[dict[str, Any]],
    accelerator: Accelerator,
) -> None:
    """The end of a recipe that trains: the table in the terminal, and the report in the run's folder."""
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
    except (OSError, DataError) as error:  # the model is saved: a full disk must not turn the run into a failure
        why = getattr(error, "strerror", None) or error
        report = f"and no report was written ({why}): the same command with --resume writes it"
    accelerator.print(f"The model is in {config.out / 'model'}, {report}")


def beginning(config: dict[str, Any]) -> str:
    return "initial model" if config.get("init_from") or config.get("start") else "random start"


class RunFolder:
    """The contents of a run's folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = self._read("config.json", image_size=int | list)
        with readable(folder / "config.json"):
            self.small = max(to_pair(self.config["image_size"])) < 100
        self.environment = self._read("environment.json", packages=dict)
        with readable(folder / "environment.json"):
            check({"lengths": []} | self.environment, lengths=list)
        self.lengths = [str(sentence) for sentence in self.environment.get("lengths", [])]
        self.cost = self._read("cost.json", **COST, images_per_second=NUMBER, processes=int, threads=int)
        self.lines = [line for line in read_lines(folder / "metrics.jsonl") if isinstance(line.get("step"), int)]
        self.evaluations = [line for line in self.lines if any(name.startswith("eval/") for name in line)]
        backbone, self.model = load_described(folder)
        with readable(folder / "model" / CONFIG):
            check(self.model, objective=str, data=str)
        self.name, self.parameters = backbone.name, sum(p.numel() for p in backbone.parameters())

    def _read(self, name: str, **kinds: Any) -> dict[str, Any]:
        with readable(self.folder / name):
            return read(self.folder / name, **kinds)

    def title(self) -> str:
        return f"{self.model['objective']} on {self.model['data']}"

    def summary(self) -> list[str]:
        cost, model = self.cost, self.model
        pixels = " x ".join(map(str, dict.fromkeys(to_pair(self.config["image_size"]))))
        sentences = [
            f"{model['objective']} trained {self.name}, {self.parameters / 1e6:.1f} million parameters, on "
            f"{model['data']}: {cost['images']:,} images of {pixels} px in "
            f"{duration(cost['seconds'])} on {cost['device']}."
        ]
        sentences += [
            f"By {row.protocol} of the {row.readout} readout, which the objective declares, {row.end:.1%} of test "
            f"images are classified correctly; at the start it was {row.start:.1%}."
            for row in rows_of(self.evaluations)
            if row.readout == model["readout"]
        ]
        sentences += self.lengths
        verdicts = [line["health"] for line in self.lines if line.get("health")]
        return sentences + (verdicts or ["Its features did not collapse."])

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Accuracies at the start and at the end."""
        rows = [list(row.cells(self.model["readout"])) for row in rows_of(self.evaluations)]
        return ["accuracy, %", beginning(self.config), "trained"], rows

    def declared(self) -> str:
        return f"* the readout that the objective declares ({self.model['readout']})"

    def costs(self) -> tuple[list[str], list[list[str]]]:
        cost = self.cost
        processes = "1 process" if cost["processes"] == 1 else f"{cost['processes']} processes"
        threads = "1 thread" if cost["threads"] == 1 else f"{cost['threads']} threads"
        rows = [
            ["images seen", f"{cost['images']:,}"],
            ["time", duration(cost["seconds"])],
            ["images per second", f"{cost['images_per_second']:,.0f}"],
            ["FLOPs", "not counted" if cost["flops"] is None else f"{cost['flops']:.2e}"],
            ["peak memory", f"{cost['peak_memory_bytes'] / 2**20:,.0f} MiB"],
            ["device", f"{cost['device']}, {processes}, {threads}"],
        ]
        return ["cost", ""], rows

    def curve(self, name: str) -> Line:
        chosen = [line for line in self.lines if name in line]
        return Line(name, [line["step"] for line in chosen], [line[name] for line in chosen])


def write_report(folder: Path) -> None:
    """report.html and report.md of a run, and its model's card."""
    check_no_links(folder)
    run = RunFolder(folder)
    durable.replace_text(folder / "model" / "README.md", as_card(run))
    durable.replace_text(folder / "report.html", as_page(run))
    durable.replace_text(folder / "report.md", as_markdown(run))  # the last file of a run: a comparison waits for it


def curves(run: RunFolder) -> str:
    prefix = f"eval/{run.model['readout']}"
    names = [name for name in (run.evaluations or [{}])[-1] if name.startswith(prefix)]
    evaluated = [run.curve(name)._replace(name=name.removeprefix("eval/")) for name in names]
    monitor = [line for line in evaluated if len(line.x) > 2]
    return page.columns(
        page.chart(line_chart([run.curve("loss")._replace(name="")], x="step", y="loss"), "The training loss."),
        page.chart(line_chart(monitor, x="step", y="accuracy"), "Test accuracy during training."),
    )


def pictures(run: RunFolder) -> dict[str, str]:
    folder = run.folder / "pictures"
    return {
        name: page.picture(folder / name, caption, small=run.small and name not in (*SEEN, *INSIDE))
        for name, caption in CAPTIONS.items()
    }


def records(folder: Path) -> list[str]:
    names = {"Configuration": "config.json", "Environment": "environment.json", "Data": "data.txt"}
    present = {title: folder / name for title, name in names.items() if (folder / name).exists()}
    return [page.folded(title, page.code(file.read_text("utf-8", "replace"))) for title, file in present.items()]


def as_page(run: RunFolder) -> str:
    last = run.lines[-1] if run.lines else {}
    names = [name for name in last if isinstance(last[name], float) and not name.startswith("eval/")]
    others = [run.curve(name) for name in names if name not in ("loss", "epoch", "seconds")]
    shown = pictures(run)
    sections = [
        page.bullets(run.summary()),
        page.table(*run.table()) if run.evaluations else page.paragraph("Nothing was evaluated."),
        page.paragraph(run.declared(), "faint"),
        page.heading("Training"),
        curves(run),
        page.heading("Views and features"),
        *(picture for name, picture in shown.items() if name not in (*SEEN, *INSIDE)),
        page.heading("What it sees") if any(shown[name] for name in SEEN) else "",
        page.columns(*(shown[name] for name in SEEN)),
        page.folded("Inside the model", *(shown[name] for name in INSIDE)),
        page.heading("Cost"),
        page.table(*run.costs()),
        page.folded(
            "Other curves",
            page.columns(
                *(page.chart(line_chart([one._replace(name="")], x="step", y=one.name), one.name) for one in others)
            ),
        ),
        *records(run.folder),
    ]
    return page.page(run.title(), sections)


def as_markdown(run: RunFolder) -> str:
    lines = [f"# {markdown(run.title())}", *(f"- {markdown(text)}" for text in run.summary()), "", *both_tables(run)]
    for name, caption in CAPTIONS.items():
        if (run.folder / "pictures" / name).exists():
            lines += [f"![{caption}](pictures/{name})", ""]
    return "\n".join(lines)


def both_tables(run: RunFolder) -> list[str]:
    """Accuracies and costs, in Markdown."""
    return [*escaped_table(*run.table()), "", "\\" + run.declared(), "", *escaped_table(*run.costs()), ""]


def escaped_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return markdown_table([markdown(cell) for cell in header], [[markdown(cell) for cell in row] for row in rows])


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def as_card(run: RunFolder) -> str:
    architecture = config_of(run.folder / "model")["architecture"]
    return card(run.folder.name, run.summary(), run.model["readout"], architecture, both_tables(run))
