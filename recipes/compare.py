"""A comparison of ways to pretrain: on the same images, from the same random weights, at the same cost.

    python recipes/compare.py                                                        the built-in images
    python recipes/compare.py --data folder:/my/images --image_size 224 --model S/16 --methods mpp mae moco_v3 dino \
        --seeds 3 --epochs 100

Each method is trained from the weights that scratch has, on as many images, or with --budget flops or seconds, as the
first one. All are read by the same protocols: nearest neighbours, few-shot and linear on frozen features, and
fine-tuning, with 1%, 10% and all of the labels. An objective declares what is read of its model, class token or mean
patch; scratch is read in both ways, and each method is compared with scratch that is read as the method is. Beside
them stand the commonest class and raw pixels (recipes/baselines.py).

The report, with tables, curves and sentences about what the differences support, is in OUT/report.html and report.md,
its numbers in results.json, its figure in fine-tuning.svg. After a stop the same command continues; several machines
can work in one OUT. A method may have flags of its recipe: mpp:target=pixels,corrupt=0.15.
"""

from functools import partial

from sslvit.cli import run_cli
from sslvit.experiments.compare import (
    ComparisonConfig,
    check,
    check_first,
    facts_of,
    passes,
    places,
    plan,
    room,
    starts,
)
from sslvit.experiments.disk import check_room
from sslvit.experiments.gather import gather, models_of, write
from sslvit.experiments.jobs import at_a_time, check_settings, settings_of
from sslvit.experiments.records import Records
from sslvit.experiments.report import as_markdown
from sslvit.experiments.results import SCRATCH
from sslvit.experiments.work import work_on

SETTINGS, FREE = "compare.json", ("out", "jobs", "records", "robustness")


def main(config: ComparisonConfig) -> None:
    check(config)
    records, every = Records(config.records, settings_of(config, FREE), facts_of(config)), models_of(config)
    kept = [name for name in every if records.read(name)]  # before anything is written
    check_first(config, config.out / SETTINGS)
    settings = check_settings(
        config, config.out / SETTINGS, free=FREE, grows=("methods", "seeds"), appended=("transfer",)
    )
    models, together = starts(config), at_a_time(config.jobs)
    start = models[f"{SCRATCH['mean']}-0"]
    jobs = plan(config, models, passes(config, start), kept=kept)
    check_room(room(config, jobs, start, together), config.out)
    keep = partial(records.keep, jobs, config.out, places(config), every)
    keep()
    work_on(jobs, config.out, at_a_time=together, after_each=keep)
    results = gather(config, settings, [job.command() for job in jobs], records)
    write(results, config.out)
    print(f"{as_markdown(results)}\nThe report is {config.out / 'report.html'}")


if __name__ == "__main__":
    run_cli(main, ComparisonConfig)
