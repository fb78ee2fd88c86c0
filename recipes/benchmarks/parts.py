"""What training less than all of a model costs and gives: `finetune` by each choice of --train.

    python recipes/benchmarks/parts.py --model runs/mpp --data folder:/my/labelled --out runs/parts
    python recipes/benchmarks/parts.py --model dinov2_vits14.pth --data hf:name --seeds 3 --options="--image_size 98"

Each choice and seed is a fine-tuning of its own, with its own choice of a learning rate, in OUT/PART-SEED and in a
process of its own, so that its peak memory (on a CPU with Python and torch in it) is that choice's alone. Prints a
Markdown table and writes it to OUT/parts.md: the mean over seeds, for accuracy with the standard deviation. The same
command goes on where it was stopped. Images per second are those of the last training, of an otherwise idle machine.
"""

import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tyro

from sslvit.cli import run_cli
from sslvit.errors import Error
from sslvit.reports.run import markdown_table
from sslvit.storage import durable, sealed

FINETUNE = Path(__file__).parents[1] / "finetune.py"
PARTS = ("head", "norm", "attention", "last:4", "lora:8", "all")
HEADER = ["trained", "accuracy, %", "trained parameters", "share, %", "peak memory, MiB", "images per second", "rate"]


def measured(part: str, seed: int, words: list[str], out: Path) -> dict[str, Any]:
    """What one fine-tuning leaves; one that has ended is only tested again."""
    folder = out / f"{part.replace(':', '-')}-{seed}"
    command = [sys.executable, str(FINETUNE), "--train", part, "--seed", str(seed), "--out", str(folder), "--resume"]
    done = subprocess.run([*command, *words])
    if done.returncode:
        raise Error(f"fine-tuning {part} ended with exit status {done.returncode}: see above")
    return sealed.read(folder / "test.json") | sealed.read(folder / "cost.json")


def row(part: str, runs: list[dict[str, Any]], all_parameters: int | None) -> list[str]:
    accuracies = [100 * run["top1"] for run in runs]
    spread = f" ± {stdev(accuracies):.1f}" if len(runs) > 1 else ""
    trained = runs[0]["trained parameters"]
    return [
        part,
        f"{mean(accuracies):.1f}{spread}",
        f"{trained:,}",
        f"{100 * trained / all_parameters:.3g}" if all_parameters else "",
        f"{mean(run['peak_memory_bytes'] for run in runs) / 2**20:,.0f}",
        f"{mean(run['images_per_second'] or 0 for run in runs):.4g}",
        ", ".join(sorted({f"{run['lr']:g}" for run in runs})),
    ]


def main(
    model: Path,
    data: str,
    out: Path = Path("runs/parts"),
    parts: tuple[str, ...] = PARTS,
    steps: int = 500,
    seeds: int = 1,
    options: str = "",
) -> None:
    """Fine-tune a model by each choice of --train and print a table. options: more of finetune's, as one text."""
    words = ["--model", str(model), "--data", data, "--steps", str(steps), *shlex.split(options)]
    runs = {part: [measured(part, seed, words, out) for seed in range(seeds)] for part in parts}
    whole = runs["all"][0]["trained parameters"] if "all" in runs else None
    table = markdown_table(HEADER, [row(part, runs[part], whole) for part in parts])
    durable.replace_text(out / "parts.md", "\n".join([*table, ""]))
    print("\n".join(table))


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
