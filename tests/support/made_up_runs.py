"""Folders as runs leave them, written without a run: of any length, state and name."""

import json
import math
import time
from pathlib import Path
from typing import Any

from sslvit.storage import sealed


def made_up_run(
    folder: Path,
    *,
    state: str = "finished",
    lines: int = 40,
    steps: int = 400,
    objective: str = "MAE",
    data: str = "shapes (1,000 labelled by shape)",
    batch: int = 64,
    evaluated: int = 5,
    speed: float = 2000.0,
    pace: float = 1.0,
    message: str = "",
) -> Path:
    """lines: of its log, up to the last step if it has finished, else to a half. evaluated: how often."""
    folder.mkdir(parents=True)
    last = steps if state == "finished" else steps // 2
    sealed.write(folder / "config.json", {"batch_size": batch, "epochs": steps * batch / 1000, "model": "S/16"})
    facts: dict[str, Any] = {"objective": objective, "backbone": "S/16", "readout": "cls", "source": data}
    sealed.write(folder / "environment.json", facts | {"steps": steps, "command": [f"{objective.lower()}.py"]})
    owner = {"sslvit": "a run", "pid": 2**22 + 1, "host": "elsewhere", "start": "2026-01-01T00:00:00+00:00", "run": "x"}
    (folder / "run.lock").write_text(json.dumps(owner))
    with (folder / "metrics.jsonl").open("w") as log:
        log.write(json.dumps({"step": 0, **accuracies(0, pace)}) + "\n")
        for i in range(1, lines + 1):
            step = i * last // lines
            line: dict[str, Any] = {"step": step, "epoch": step * batch / 1000, "lr": 1e-3 * (1 - step / steps)}
            line |= {"loss": 0.4 + 2 * math.exp(-5 * pace * step / steps) + 0.02 * math.sin(i), "feature_std": 0.7}
            line |= {"gradient_norm": 1 + math.exp(-8 * step / steps), "seconds": step * batch / speed}
            if evaluated and i % max(lines // evaluated, 1) == 0:
                line |= accuracies(step / steps, pace)
            log.write(json.dumps(line) + "\n")
    if state == "finished":
        seconds, images = last * batch / speed, last * batch
        cost = {"images": images, "seconds": seconds, "images_per_second": speed, "flops": 1e9 * images}
        sealed.write(folder / "cost.json", cost)
        (folder / "model").mkdir()
        about = {"objective": objective, "readout": "cls", "steps": steps, "data": data}
        sealed.write(folder / "model" / "config.json", {"sslvit": about})
        (folder / "report.html").write_text("<title>a report</title>")
    elif state in ("stopped", "diverged", "failed"):
        sealed.write(folder / "ended.json", {"state": state, "message": message, "time": time.time()})
    return folder


def accuracies(share: float, pace: float) -> dict[str, float]:
    knn = 0.15 + 0.5 * (1 - math.exp(-4 * pace * share))
    return {"eval/cls/10-shot": 0.9 * knn, "eval/cls/20-nn": knn, "eval/mean/20-nn": 0.95 * knn}
