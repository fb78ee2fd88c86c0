"""The ViT paper's studies at our scale, each by one command.

    python recipes/study.py --study amounts      numbers of training images: ViT, hybrid, BiT ResNet (figures 3, 4)
    python recipes/study.py --study costs        FLOPs: ViT, hybrid, BiT ResNet, each at two sizes (figure 5)
    python recipes/study.py --study positions    kinds of position embeddings, and where they are added (table 8)
    python recipes/study.py --study readouts     class token or mean patch, each at several rates (D.3)
    python recipes/study.py --study targets      targets of MPP, of 15 or 50% of the patches (B.1.2)

Each point is one run from its own random weights, all trained on the same number of images. It is read as the ViT paper
reads small models: few-shot, by ridge regression on frozen features, here 10 images per class, on the training set's
own labels, beside the commonest class and raw pixels. In OUT are results.json, results.md and a plot, study.svg. After
a stop the same command continues.
"""

from sslvit.cli import run_cli
from sslvit.experiments.jobs import at_a_time, check_settings
from sslvit.experiments.study import (
    STUDIES,
    StudyConfig,
    baseline_rows,
    baselines_of,
    check,
    results_of,
    runs_of,
    write,
)
from sslvit.experiments.work import work_on


def main(config: StudyConfig) -> None:
    check(config)
    out, points = config.out / config.study, list(STUDIES[config.study](config))
    settings = check_settings(config, out / "study.json", free=("out", "jobs"), grows=("seeds",))
    runs, baselines = runs_of(config, points, out), baselines_of(config, points, out)
    jobs = [*baselines.values(), *(job for of_point in runs for job in of_point)]
    work_on(jobs, out, at_a_time=at_a_time(config.jobs))
    of_points = results_of(points, runs, costly=config.study == "costs")
    rows = baseline_rows(baselines, list(of_points[0]["values"]))
    results = {"study": config.study, "data": config.data, "settings": settings}
    write(results | {"points": of_points, "baselines": rows}, out)


if __name__ == "__main__":
    run_cli(main, StudyConfig)
