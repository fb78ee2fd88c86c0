"""What did pretraining buy? Every method on the same images, from the same starting weights, at the same cost.

    python recipes/compare.py                                                        the built-in images
    python recipes/compare.py --data folder:/my/images --image_size 224 --model S/16 --methods mpp mae moco_v3 dino \
        --seeds 3 --epochs 100

Each method is trained from the weights that scratch has, on as many images, or --budget operations or seconds, as the
first one. All are read by the same protocols: nearest neighbours, few-shot and linear on frozen features, and
fine-tuning, with 1 %, 10 % and all of the labels. An objective declares what is read of its model, class token or mean
patch; scratch is read in both ways, and each method is held against scratch that is read as the method is. Beside them
stand the commonest class and raw pixels (recipes/baselines.py).

The report, with tables, curves and sentences about what the differences support, is in OUT/report.html and report.md,
its numbers in results.json. Stopped at any moment, the same command goes on; several machines can work in one OUT. A
method may carry flags of its recipe: mpp:target=pixels,corrupt=0.15.
"""

import os
from pathlib import Path

import torch

from sslvit.cli import parse, run_cli
from sslvit.experiments.compare import ComparisonConfig, check, passes, plan, room, starts
from sslvit.experiments.disk import check_room
from sslvit.experiments.gather import gather, write
from sslvit.experiments.jobs import check_settings, work_on
from sslvit.experiments.report import as_markdown
from sslvit.experiments.results import SCRATCH

HERE = Path(__file__).parent


def main() -> None:
    config = parse(ComparisonConfig)
    check(config, HERE)
    settings = check_settings(
        config,
        config.out / "compare.json",
        free=("out", "jobs"),
        grows=("methods", "seeds"),
        appended=("transfer",),
    )
    models = starts(config)
    gpus = torch.cuda.device_count()
    parts = plan(config, models, passes(config, models[f"{SCRATCH['mean']}-0"], HERE, gpus))
    jobs = config.jobs or gpus or len(os.sched_getaffinity(0))
    check_room(room(config, parts, models[f"{SCRATCH['mean']}-0"], jobs), config.out)
    work_on(parts, config.out, HERE, jobs=jobs, devices=gpus)
    results = gather(config, settings, [part.command() for part in parts])
    write(results, config.out)
    print(f"{as_markdown(results)}\nThe report is {config.out / 'report.html'}")


if __name__ == "__main__":
    run_cli(main)
