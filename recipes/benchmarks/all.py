"""The cost of sslvit and of its peers, in one run on this machine.

    python recipes/benchmarks/all.py          all below but the last, one after the other, into runs/benchmark
    python recipes/benchmarks/all.py --gpu    steps and runs on a GPU, with a verdict on each of verdicts.py's targets
    python recipes/benchmarks/backbone.py     forward and a training step, against timm and transformers
    python recipes/benchmarks/steps.py        a training step of each objective, against timm, transformers and lightly
    python recipes/benchmarks/views.py        views per second of one core, against torchvision, Pillow, kornia, lightly
    python recipes/benchmarks/loader.py       from files to views, against torchvision's ImageFolder; the loader alone
    python recipes/benchmarks/run.py          from the command to the first step; end to end, against lightly
    python recipes/benchmarks/evaluation.py   extraction, neighbours, linear probes, against scikit-learn and lightly
    python recipes/benchmarks/growth.py       what more images, classes, pixels, weights and processes cost
    python recipes/benchmarks/parts.py        fine-tuning all of a model or a part, --train: accuracy, memory and speed

With --out FOLDER a benchmark keeps its numbers there; all.py also leaves benchmark.json, benchmark.md and, of all
ratios, benchmark.svg. Contestants take turns, numbers are medians with the least and the most, and peers that are not
installed are named.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro
import verdicts
from timing import OURS, Result

from sslvit.cli import run_cli
from sslvit.reports import page
from sslvit.reports.charts import Dot, dot_chart
from sslvit.reports.run import markdown_table
from sslvit.storage import sealed

HERE = Path(__file__).parent
S, B = (f"--model {size}/16 --image_size 224 --heads paper" for size in "SB")
FAST = "--precision bf16 --compile"
CPU = {
    "backbone": "backbone",
    "steps at 32 px": "steps --model XS/8 --image_size 32 --batch_size 64 --threads 1 --heads small",
    "steps at 224 px": "steps --rounds 3",
    "views": "views --rounds 3",
    "photographs": "loader photos --images 512",
    "end to end at 32 px": "run",
    "end to end at 224 px": f"run {S} --objectives moco_v3 dino --batch_size 4 --steps 2 --rounds 3 --no-start_up",
    "evaluation": "evaluation",
    "growth": "growth --rounds 3",
}
GPU = {
    "backbone": "backbone --precision bf16",
    "steps at 224 px": f"steps {B} --objectives mpp mae moco_v3 --batch_size 128 --rounds 5 {FAST}",
    "end to end at 224 px": (
        f"run {B} --objectives mpp moco_v3 --batch_size 128 --workers 8 --threads 0 {FAST} --no-start_up"
    ),
    "evaluation": "evaluation --rounds 2",
    "growth": "growth --rounds 3",
}
ASKED = {title: words for title, words in GPU.items() if words.split()[0] in ("steps", "run")}  # in verdicts.py


def everything(out: Path = Path("runs/benchmark"), gpu: bool = False) -> None:
    """Every benchmark, each in a process of its own. --gpu: only what a GPU is asked for, with a verdict on each."""
    reports, began = [], time.perf_counter()
    if gpu and not torch.cuda.is_available():
        raise ValueError("--gpu: torch sees no GPU here. Without --gpu the benchmarks run on the CPU")
    chosen = ASKED if gpu else GPU if torch.cuda.is_available() else CPU
    for number, (title, words) in enumerate(chosen.items()):
        folder = out / f"{number}"
        print(f"\n{title}", flush=True)
        name, *rest = words.split()
        done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *rest, "--out", str(folder)])
        if done.returncode:
            print(f"{words} ended with exit code {done.returncode}, and is missing below")
            continue
        file = folder / f"{name}.json"
        with sealed.readable(file, "give the same command again"):
            reports.append({"title": title} | sealed.read(file, command=str, machine=dict, results=list))
    if not reports:
        raise ValueError("not one benchmark came to an end: see above")
    write(reports, out)
    if gpu:
        table = markdown_table(
            ["on this GPU", "measured", "verdict"], verdicts.rows(reports, time.perf_counter() - began)
        )
        (out / "verdicts.md").write_text("\n".join([json.dumps(reports[0]["machine"]), "", *table, ""]))
        print("\n".join(["", *table, "", f"Also in {out / 'verdicts.md'}. First of all: python -m pytest -m gpu"]))


def write(reports: list[dict], out: Path) -> None:
    lines, ratios = [f"{json.dumps(reports[0]['machine'])}", ""], []
    for report in reports:
        results = [Result(**one) for one in report["results"]]
        rows = []
        for one in results:
            beside = "" if one.ratio is None else f"{one.ratio:.2f} ({one.ratio_low:.2f} to {one.ratio_high:.2f})"
            rate = "" if one.images_per_second is None else f"{one.images_per_second:,.1f}"
            share = "" if one.share is None else f"{one.share:.0%}"
            memory = "" if one.mebibytes is None else f"{one.mebibytes:,.0f}"
            spread = f"{one.milliseconds:,.1f} ({one.low:,.1f} to {one.high:,.1f})"
            rows.append([one.case, one.who, spread, rate, share, memory, beside])
            if one.ratio is not None and one.who != OURS:
                ratios.append(Dot(f"{one.case}, {one.who}", one.ratio, one.ratio_low, one.ratio_high))
        header = ["", "who", "ms", "images/s", "of matrix rate", "MiB", "ours, in times theirs"]
        lines += [f"## {report['title']}", "", f"`{report['command']}`", "", *markdown_table(header, rows), ""]
    (out / "benchmark.json").write_text(json.dumps(reports, indent=1) + "\n")
    (out / "benchmark.md").write_text("\n".join(lines))
    (out / "benchmark.svg").write_text(page.alone(dot_chart(ratios, x="our time, in times theirs")))
    print(f"\nIn {out}: benchmark.json, benchmark.md, benchmark.svg")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(everything))
