"""The report of a run that goes on: report.html from the first line of its log, in a page that refreshes itself.

It is made of the run's folder, and of pictures of the first images. The report of a finished run takes its place.
"""

import base64
import io
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from sslvit.config import TrainConfig
from sslvit.data.loader import Views
from sslvit.data.source import Images
from sslvit.errors import Preempted
from sslvit.evaluate.features import evaluation_mode
from sslvit.objectives.objective import Batch, Objective
from sslvit.processes.collectives import launched_to_shard
from sslvit.reports import page
from sslvit.reports.charts import line_chart
from sslvit.reports.pictures import first_views
from sslvit.reports.progress import SPEED, Progress
from sslvit.reports.run import beginning, records
from sslvit.reports.show_views import sheet
from sslvit.runs.ending import Status
from sslvit.runs.folder import still_held
from sslvit.storage import durable
from sslvit.views.batching import to_pair

log = logging.getLogger(__name__)

EVERY = 15  # seconds between two pages, and after which the browser reads again
SHARE = 100  # times as long as writing a page took, no other is written
LEAST_PATIENCE, GAPS = 120, 4  # seconds, or the longest times between two lines, after which a run may be dead
LARGE = 100  # pixels of an image's side: fewer and compressed ones are shown
STYLE = """
.chip { font-weight: 600; border: 1px solid; border-radius: 1rem; padding: .05rem .6rem; margin-right: .3rem; }
.running { color: #0969da; } .finished { color: #1a7f37; } .stopped { color: #8a5a00; }
.diverged, .failed, .broken { color: #cf222e; } .dead { color: #59636e; }
@media (prefers-color-scheme: dark) { .running { color: #58a6ff; } .finished { color: #3fb950; }
  .stopped { color: #d29922; } .diverged, .failed, .broken { color: #ff7b72; } .dead { color: #9198a1; } }
.bar { height: .4rem; border-radius: .2rem; background: var(--line); overflow: hidden; }
.bar div { height: 100%; background: #4477aa; }
#state p { margin: .6rem 0; }
#stale { border-left: .3rem solid #cf222e; background: var(--back); padding: .5rem .8rem; }
"""


class LiveReport:
    """Given to `pretrain`, which calls it after each line of the log. A page that cannot be written stops nothing.

    file: where the page is, if not in the run's folder. clock: seconds.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        source: Images,
        views: Views,
        accelerator: Accelerator,
        *,
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.config, self.objective, self.source, self.views = config, objective, source, views
        self.accelerator, self.file, self.clock = accelerator, file or config.out / "report.html", clock
        self.first: Batch | None = None  # the views of the first images, read once
        self.pictures: dict[int, bytes] = {}  # by the step after which they were made: the first and the latest
        # A sharded copy has the weights, and another size of batch would be compiled for.
        self.drawn = not (config.compile or config.shard or launched_to_shard())
        self.seen, self.due, self.gap, self.warned = clock(), 0.0, 0.0, False
        self.written = False

    def log(self, values: dict[str, Any], *, step: int) -> None:
        began = self.clock()
        self.gap, self.seen = max(self.gap, began - self.seen), began
        if step == 0 or (self.written and began < self.due):  # the start's line comes later, with the first step's
            return
        self._write(Status("running"), step)
        ended = self.clock()
        self.due = ended + max(EVERY, SHARE * (ended - began))

    def finish(self) -> None:
        if self.written:  # the report of a run that had finished before stays
            self._write(Status("finished"))

    def ended(self, status: Status) -> None:
        if self.written or not self.file.exists():  # not over the report of a run that could not be resumed
            self._write(status)

    def _write(self, status: Status, step: int | None = None) -> None:
        # A fine-tuning's page is of its folder, also after the run of one rate.
        held = still_held(self.config.out) or still_held(self.file.parent)
        if not (self.accelerator.is_main_process and held):
            return
        try:
            if step is not None and self.drawn:
                self._draw(step)
            progress = Progress(self.config.out)
            progress.status = status
            patience = max(LEAST_PATIENCE, GAPS * max(self.gap, self.due - self.seen))
            text = as_page(progress, self.pictures, patience, small=self._small())
            durable.replace(self.file, [text.encode("utf-8", "backslashreplace")], synced=False)
            self.written = True
        except Preempted:  # by a signal that came just now
            raise
        except Exception as error:  # nothing here is worth a run
            if not self.warned:
                log.warning("%s is not written (%s: %s); the run continues", self.file, type(error).__name__, error)
            self.warned = True

    def _draw(self, step: int) -> None:
        if self.first is None:
            shown = 8 if self._small() else 4
            key, _, seen = first_views(self.config, self.source, self.views, self.accelerator, shown)
            self.first = Batch(seen, key)
        with evaluation_mode(self.objective, self.accelerator.device.type):
            reconstructions = self.objective.reconstructed(self.first)
        self.drawn = bool(reconstructions)
        if reconstructions:
            picture = sheet(tuple(x.cpu() for x in (self.first.views[0], *reconstructions)), across=True)
            first = dict(list(self.pictures.items())[:1])
            self.pictures = first | {step: encoded(picture, small=self._small())}

    def _small(self) -> bool:
        return max(to_pair(self.objective.backbone.image_size)) < LARGE


def encoded(picture: Image.Image, *, small: bool) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG" if small else "JPEG", quality=85)
    return file.getvalue()


def as_page(
    progress: Progress, pictures: dict[int, bytes], patience: float, *, small: bool = False, last: bool = False
) -> str:
    """pictures: reconstructions by step. patience: seconds after which a page about a running run is too old.
    last: no other page takes its place, so that it need not be read again."""
    last = last or progress.status.state not in ("running", "finished")  # after finished, the report follows
    sections = [
        state(progress, patience, 0 if last else EVERY),
        page.heading("Training"),
        curves(progress),
        page.bullets(progress.verdicts) or page.paragraph("No sign of collapse so far." if progress.lines else ""),
        page.heading("Evaluation"),
        evaluation(progress),
        *([page.heading("Reconstructions"), reconstructions(pictures, small)] if pictures else []),
        page.heading("Records"),
        *records(progress.folder),
        f"<script>{page.REFRESH.read_text()}</script>",
    ]
    refresh = "" if last else f'<noscript><meta http-equiv="refresh" content="{EVERY}"></noscript>'
    return page.page(progress.title(), sections, head=f"<style>{STYLE}</style>{refresh}")


def state(progress: Progress, patience: float, every: float) -> str:
    status = progress.status
    share = min(progress.step / progress.steps, 1.0) if progress.steps else 0.0
    chip = f'<span class="chip {status.state}">{status.state}</span>'
    where = "" if progress.folder.parent.name != "choice" else f"{progress.folder.name} of the rates to choose from, "
    inside = (
        f'<p class="lead">{chip} {page.escape(where + progress.sentence())}</p>'
        f'<div class="bar"><div style="width:{share:.2%}"></div></div>'
    )
    inside += page.paragraph(capitalized(status.message)) if status.message else ""
    stale = (
        "Nothing was written for <b></b>, longer than this run usually needs: it may be dead. Look for its process, or "
        "whether the machine is up; --resume continues it."
    )
    return page.state(inside, stale, every=every, patience=patience if status.state == "running" else 0)


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def curves(progress: Progress) -> str:
    shown = {
        "loss": "The training loss.",
        "gradient_norm": "The gradients' norm, before clipping.",
        "lr": "The learning rate.",
        SPEED: "Images per second, of training alone.",
    }
    last = progress.lines[-1] if progress.lines else {}
    others = [name for name in last if name not in ("step", "epoch", "seconds", *shown) and "/" not in name]
    charts = [one_curve(progress, name, caption) for name, caption in shown.items()]
    more = page.folded("Other curves", page.columns(*(one_curve(progress, name, name) for name in others)))
    return page.columns(*charts) + more or page.paragraph("No step is logged yet.")


def one_curve(progress: Progress, name: str, caption: str) -> str:
    line = progress.curve(name)
    if len(line.x) < 2:
        return ""
    title, from_zero = name.replace("_", " "), name in ("gradient_norm", "lr", SPEED)
    return page.chart(line_chart([line._replace(name="")], x="step", y=title, from_zero=from_zero), caption)


def evaluation(progress: Progress) -> str:
    """The monitor's table and curves, and a fine-tuned model's test."""
    parts = []
    if tested := progress.tested:
        kinds = {
            "top-1": "top1",
            "top-5": "top5",
            "balanced": "mean_per_class",
            "calibration error": "calibration_error",
            "mean IoU": "mean iou",
            "pixel accuracy": "pixel accuracy",
        }
        rows = [[name, f"{100 * tested[key]:.1f}"] for name, key in kinds.items() if isinstance(tested.get(key), float)]
        parts.append(page.table([f"test, {tested.get('images', 0):,} images, %", ""], rows))
    if rows := [list(row.cells(progress.readout)) for row in progress.rows()]:
        step = progress.evaluations[-1]["step"]
        header = ["accuracy, %", beginning(progress.config), f"step {step:,}"][: 3 if step else 2]
        declared = page.paragraph(f"* the readout that the objective declares ({progress.readout})", "faint")
        parts.append(page.table(header, [row[: len(header)] for row in rows]) + declared)
    names = [name for name in (progress.evaluations or [{}])[-1] if name.startswith(f"eval/{progress.readout}/")]
    curves = [progress.curve(name)._replace(name=name.rpartition("/")[2]) for name in names]
    lines = [line._replace(y=[100 * y for y in line.y]) for line in curves if len(line.x) > 1]
    caption = f"Test accuracy of the {progress.readout} readout."
    parts.append(page.chart(line_chart(lines, x="step", y="accuracy, %"), caption))
    return page.columns(*parts) or page.paragraph("Nothing is evaluated yet.")


def reconstructions(pictures: dict[int, bytes], small: bool) -> str:
    kind, mime = (' class="small"', "png") if small else ("", "jpeg")
    figures = []
    for step, data in pictures.items():
        text = f"After step {step:,}: a view, what the objective saw of it, and what it predicted."
        source = f"data:image/{mime};base64,{base64.b64encode(data).decode()}"
        figures.append(f'<figure{kind}><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>')
    return page.columns(*figures)
