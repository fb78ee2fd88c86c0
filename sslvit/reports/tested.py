"""A fine-tuned model's test: its numbers, and the files that hold them in the run's folder."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sslvit.data.source import Source
from sslvit.evaluate.metrics import confusion, metrics
from sslvit.evaluate.predictions import Predictions, save_predictions
from sslvit.finetuning import FinetuneConfig, predict, rate_of
from sslvit.models.partial import trained
from sslvit.objectives.supervised import Supervised
from sslvit.reports.figures import draw_confusion
from sslvit.reports.live import LEAST_PATIENCE, as_page
from sslvit.reports.progress import Progress
from sslvit.runs.ending import Status
from sslvit.runs.log import evaluations
from sslvit.storage import durable, sealed
from sslvit.views.batching import Size


def read_test(
    objective: Supervised,
    train: Source,
    test: Source,
    config: FinetuneConfig,
    accelerator: Accelerator,
    *,
    tried: dict[float, float],
    image_size: Size,
) -> tuple[Predictions, dict[str, Any]]:
    """Of `finetune`'s model and rates. Writes predictions.parquet, confusion.png, test.json and report.html."""
    rate = max(tried, key=tried.__getitem__) if tried else rate_of(config)
    about = {"model": str(config.model), "scratch": config.scratch, "data": test.name, "protocol": config.protocol}
    about |= {"readout": objective.readout, "lr": rate}
    predicted = predict(objective, test, config.eval_view(image_size), accelerator, about=about)
    probabilities, labels = predicted.probabilities, predicted.labels
    numbers = metrics(probabilities, labels)._asdict() | {"images": len(labels), "lr": rate, "held out": tried}
    numbers |= {"trained parameters": trained(objective)}
    if accelerator.is_main_process:
        if config.curve:
            name = f"eval/{objective.readout}/accuracy"
            numbers["curve"] = [[line["step"], line[name]] for line in evaluations(config.out) if name in line]
        save_predictions(config.out / "predictions.parquet", predicted)
        draw_confusion(confusion(probabilities, labels), train.classes, config.out / "confusion.png")
        sealed.write(config.out / "test.json", numbers)
        write_report(config.out)
    return predicted, numbers


def write_report(run: Path) -> None:
    """The page of a run that has been tested."""
    progress = Progress(run)
    progress.status = Status("finished")
    durable.replace_text(run / "report.html", as_page(progress, {}, LEAST_PATIENCE, last=True))
