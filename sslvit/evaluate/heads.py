"""Linear probes by name, and what the recipe linear_probe.py writes of them: numbers, heads, predictions, a log."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor

from sslvit import __version__
from sslvit.errors import CannotWrite
from sslvit.evaluate.attentive import Settings, attentive_probe
from sslvit.evaluate.balance import balanced_accuracy, remarks
from sslvit.evaluate.features import Features
from sslvit.evaluate.linear import probe
from sslvit.evaluate.logistic import standardized_probe
from sslvit.evaluate.metrics import top
from sslvit.evaluate.predictions import Predictions, save_predictions
from sslvit.evaluate.protocols import PROTOCOLS
from sslvit.storage import durable


class ProbeResult(NamedTuple):
    probabilities: Tensor  # of the test images' classes
    weights: dict[str, Tensor]  # torch's Linear's, for features as they are extracted; or an AttentiveHead's
    settings: dict[str, float]  # the chosen ones
    held_out: list[tuple[dict[str, float], float]]  # accuracies that they were chosen by; empty without a choice


def run_probe(
    protocol: str, train: Tensor, labels: Tensor, test: Tensor, *, augmented: Tensor | None = None
) -> ProbeResult:
    """protocol: logistic, attentive, or a name of PROTOCOLS. Features n d and m d, of attentive n p d and m p d."""
    if protocol == "attentive":
        attentive, accuracies = attentive_probe(train, labels, Settings())
        held_out = [({"rate": rate}, accuracy) for rate, accuracy in accuracies.items()]
        settings, _ = max(held_out, key=lambda one: one[1])
        return ProbeResult(attentive.probabilities(test), attentive.state_dict(), settings, held_out)
    if protocol == "logistic":
        head, mean, deviation = standardized_probe(train, labels)
        probabilities, weights = head.probabilities((test - mean) / deviation), head.weights / deviation[:, None]
        bias = head.bias - mean @ weights
    else:
        head = probe(train, labels, PROTOCOLS[protocol], augmented=augmented)
        probabilities, weights, bias = head.probabilities(test), head.weights, head.bias
    return ProbeResult(probabilities, {"weight": weights.T.contiguous(), "bias": bias}, head.settings, head.held_out)


class ProbeLog:
    """The folder of linear_probe.py, and the table that it prints."""

    def __init__(self, folder: Path, settings: dict[str, Any], accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator
        self.lines: list[str] = []
        self.numbers: dict[str, dict[str, Any]] = {}
        self._write("config.json", json.dumps(settings | {"version": __version__}, indent=1))  # before hours of work

    def say(self, line: str) -> None:
        self.accelerator.print(line)
        self.lines.append(line)

    def add(self, head: ProbeResult, test: Features, about: dict[str, Any]) -> None:
        """A row of the table. about: metadata, with start and readout."""
        start, readout, predicted = about["start"], about["readout"], head.probabilities.argmax(-1)
        name = f"{start.split()[0]}-{readout.replace(':', '-')}"
        accuracy = top(head.probabilities, test.labels)
        text = f"{100 * accuracy:>10.1f}   "
        text += ", ".join(f"{setting} {value:g}" for setting, value in head.settings.items())
        text += f" (held out {100 * max(a for _, a in head.held_out):.1f})" if head.held_out else ""
        self.say(f"{f'{start}, {readout}':<24}{text}")
        for line in remarks(f"{start}, {readout}", predicted, test.labels):
            self.say(line)
        self.numbers[f"{start}/{readout}"] = {
            "accuracy": accuracy,
            "balanced accuracy": balanced_accuracy(predicted, test.labels),
            "settings": head.settings,
            "held out": head.held_out,
            "images": len(predicted),
        }
        if self.accelerator.is_main_process:
            predictions = Predictions(test.ids, test.labels, head.probabilities.float(), about)
            save_predictions(self.folder / f"{name}.parquet", predictions)
            durable.replace(self.folder / f"{name}.safetensors", durable.tensor_pieces(head.weights))

    def finish(self) -> None:
        self.say(f"All digits, heads and predictions are in {self.folder}")
        self._write("numbers.json", json.dumps(self.numbers, indent=1))
        self._write("log.txt", "\n".join([*self.lines, ""]))

    def _write(self, name: str, text: str) -> None:
        if not self.accelerator.is_main_process:
            return
        try:
            durable.replace(self.folder / name, [text.encode()])
        except OSError as error:
            raise CannotWrite(f"--out {self.folder} cannot be written: {error.strerror or error}") from error
