"""The ViT paper's studies at our scale, each by one command.

    python recipes/study.py --study amounts      how much there is to learn from: ViT, hybrid, BiT ResNet (figures 3, 4)
    python recipes/study.py --study positions    kinds of position embeddings, and where they are added (table 8)
    python recipes/study.py --study readouts     class token or mean patch, each at several rates (D.3)
    python recipes/study.py --study targets      what MPP predicts, of 15 or 50 % of the patches (B.1.2)

Each point is a run from its own random start, as many images long as all others of the study. It is read as the ViT
paper reads small models: few-shot, by ridge regression on frozen features, here 10 images of each class, on the
training set's own labels, beside the commonest class and raw pixels. In OUT are results.json, results.md and a plot,
study.svg. Stopped, the same command goes on.
"""

import os
from pathlib import Path

import torch

from sslvit.cli import parse, run_cli
from sslvit.experiments.jobs import check_settings, work_on
from sslvit.experiments.study import (
    STUDIES,
    StudyConfig,
    baseline_rows,
    baselines_of,
    check,
    parts_of,
    results_of,
    write,
)

HERE = Path(__file__).parent


def main() -> None:
    config = parse(StudyConfig)
    check(config, HERE)
    out, points = config.out / config.study, list(STUDIES[config.study](config))
    settings = check_settings(config, out / "study.json", free=("out", "jobs"), grows=("seeds",))
    parts, without = parts_of(config, points, out), baselines_of(config, points, out)
    gpus = torch.cuda.device_count()
    jobs = config.jobs or gpus or len(os.sched_getaffinity(0))
    work_on([*without.values(), *(part for runs in parts for part in runs)], out, HERE, jobs=jobs, devices=gpus)
    results = {"study": config.study, "data": config.data, "settings": settings, "points": results_of(points, parts)}
    write(results | {"baselines": baseline_rows(without, list(results["points"][0]["values"]))}, out)


if __name__ == "__main__":
    run_cli(main)
