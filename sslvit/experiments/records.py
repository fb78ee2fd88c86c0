"""What is known of one method and seed when its jobs are done: every number, and which test images were right.

A record is a small file that needs no model, log or prediction. A comparison with --records keeps one of each finished
method and seed in a folder, which can lie in version control; where a record is there already, with the same settings,
its jobs are not done again. So a comparison of many days outlives the machines that it runs on.
"""

import base64
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslvit.errors import DataError
from sslvit.evaluate.balance import balanced_accuracy, collapsed, unbalanced
from sslvit.evaluate.predictions import load_predictions
from sslvit.experiments.jobs import Job, made_again
from sslvit.storage import durable, sealed
from sslvit.storage.sealed import NUMBER
from sslvit.training.cost import COST
from sslvit.weights.folder import described

TUNED = "fine-tuned"  # the beginning of such columns' names
LINEAR = re.compile(r"linear \S+ %")
NEAREST = re.compile(r"\d+-nn")
COLUMN = re.compile(rf"{NEAREST.pattern}|\d+-shot|{LINEAR.pattern}")
GROWS = ("methods", "seeds")  # settings that may differ between the records of a folder
LONGEST = 64 << 20  # bytes of a record


class Judged(NamedTuple):
    """A classifier's predictions of the test images: which are right, in the order of ids, and what they are worth."""

    right: Tensor
    balanced: float  # accuracy
    one_class: bool  # predicted for nearly all images
    unbalanced: bool  # the test images
    classes: int  # of the test images

    def as_json(self) -> dict[str, Any]:
        packed = base64.b85encode(np.packbits(self.right.numpy()).tobytes()).decode()
        return self._asdict() | {"right": packed, "images": len(self.right)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Judged":
        bits = np.unpackbits(np.frombuffer(base64.b85decode(values["right"]), np.uint8), count=values["images"])
        return cls(torch.from_numpy(bits.astype(bool)), *(values[name] for name in cls._fields[1:]))


def judge(file: Path) -> Judged:
    with made_again(file):
        predictions = load_predictions(file)
    predicted, labels = predictions.probabilities.argmax(-1), predictions.labels
    return Judged(
        right=(predicted == labels)[predictions.ids.argsort()],
        balanced=balanced_accuracy(predicted, labels),
        one_class=collapsed(predicted, labels) is not None,
        unbalanced=unbalanced(labels),
        classes=len(labels.unique()),
    )


def record(out: Path, name: str, places: list[str], model: Path, *, trained: bool) -> dict[str, Any]:
    """name: a method and seed. trained: whether it was pretrained, at some cost."""
    readout, cost = described(model)["readout"], None
    if trained:
        with made_again(model / "cost.json"):
            cost = sealed.read(model / "cost.json", **COST)
    columns = {
        place: frozen(out / "probes" / name / place, readout) | tuned(out / "finetuned" / name / place)
        for place in places
    }
    return {"readout": readout, "cost": cost, "places": columns}


def frozen(folder: Path, readout: str) -> dict[str, dict[str, Any]]:
    """By column the accuracy, the judgement of a linear probe, and the balanced accuracy of nearest neighbours."""
    file, columns = folder / "numbers.json", dict[str, dict[str, Any]]()
    with made_again(file):
        probe = sealed.read(file)
        sealed.check(probe, **{f"pretrained/{readout}": dict})
        numbers = probe[f"pretrained/{readout}"]
        for column, accuracy in accuracies(numbers).items():
            columns[column] = {"accuracy": accuracy}
            if column in numbers.get("balanced accuracy", {}) and NEAREST.fullmatch(column):
                columns[column]["balanced"] = numbers["balanced accuracy"][column]
    for column in filter(LINEAR.fullmatch, columns):
        predictions = folder / f"pretrained-{readout}-{share_of(column):g}.parquet"
        columns[column]["judged"] = judge(predictions).as_json()
    return columns


def tuned(folder: Path) -> dict[str, dict[str, Any]]:
    """By column the accuracy, its judgement, the learning rate if it was chosen, and the curve if there is one."""
    columns = {}
    for file in sorted(folder.glob("*/test.json"), key=lambda file: float(file.parent.name)):
        with made_again(file):
            tested = sealed.read(file, top1=NUMBER)
            entry = {"accuracy": tested["top1"], "curve": tested.get("curve")}
            entry |= {"rate": tested["lr"]} if tested.get("held out") else {}
        entry["judged"] = judge(file.with_name("predictions.parquet")).as_json()
        columns[f"{TUNED} {100 * float(file.parent.name):g} %"] = {k: v for k, v in entry.items() if v is not None}
    return columns


def accuracies(numbers: dict[str, Any]) -> dict[str, float]:
    """The columns of a table, of a probe's numbers."""
    columns = {name: value for name, value in numbers.items() if COLUMN.fullmatch(name)}
    sealed.check(columns, **dict.fromkeys(columns, NUMBER))
    return columns


def share_of(column: str) -> float:
    """0.1 of linear 10 %."""
    return float(column.split()[1]) / 100


class Records:
    """Those of a folder; none without one."""

    def __init__(self, folder: Path | None, settings: dict[str, Any], facts: dict[str, Any]):
        """facts: what must be the same beside the settings, in records that have it."""
        self.folder, self.settings = folder, {k: v for k, v in settings.items() if k not in GROWS}
        self.facts = facts

    def read(self, name: str) -> dict[str, Any] | None:
        if self.folder is None or not (file := self.folder / f"{name}.json").exists():
            return None
        with sealed.readable(file, "restore it, or delete it, and the comparison makes it again"):
            kept = sealed.read(file, longest=LONGEST, settings=dict, readout=str, places=dict)
        if changed := [k for k in {**kept["settings"], **self.settings} if self.differs(kept["settings"], k)]:
            was = "; ".join(f"{k} was {kept['settings'].get(k)!r}, is now {self.settings.get(k)!r}" for k in changed)
            raise DataError(f"{file} is of a comparison with other settings: {was}. Give them, or another --records")
        facts = kept.get("facts", {})
        if changed := [k for k in facts.keys() & self.facts.keys() if facts[k] != self.facts[k]]:
            was = "; ".join(f"{k} was {facts[k]!r}, is now {self.facts[k]!r}" for k in sorted(changed))
            raise DataError(f"{file} is of another comparison: {was}. Give the same, or another --records")
        return kept

    def differs(self, before: dict[str, Any], name: str) -> bool:
        return sealed.plain(before.get(name)) != sealed.plain(self.settings.get(name))

    def keep(self, jobs: list[Job], out: Path, places: list[str], models: dict[str, Path]) -> None:
        """Writes a record of each method and seed whose jobs are done and that has none yet."""
        if self.folder is None:
            return
        for name, model in models.items():
            mine = [job for job in jobs if name in job.name.split("/")]
            file = self.folder / f"{name}.json"
            if mine and all(job.done for job in mine) and not file.exists():
                durable.make_folder(self.folder)
                trained = any(job.name == f"pretrain/{name}" for job in mine)
                about = {"settings": self.settings, "facts": self.facts}
                sealed.write(file, about | record(out, name, places, model, trained=trained))
