"""Cost as work grows: what should be linear is no worse, and what should be constant does not grow.

    python recipes/benchmarks/growth.py

A training step of MPP, by batch, resolution and model: milliseconds per image, and the FLOPs per second that are
reached, which should not fall as work grows. Paths, 1 thousand to 1 million: opening a list of files, an epoch's order,
and a batch from the middle of the row, in microseconds an image or a batch. Classes: few-shot and nearest neighbours.
Processes: images per second of one and of two on this machine, at one global batch (on a GPU machine, of its GPUs).
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from PIL import Image
from timing import Result, compared, in_turns, line, matrix_rate, save

from sslvit import rng
from sslvit.cli import run_cli
from sslvit.data.loader import EpochSampler
from sslvit.data.spec import open_source
from sslvit.evaluate.fewshot import fewshot
from sslvit.evaluate.knn import knn
from sslvit.models.vit import ViT
from sslvit.objectives.mpp import MPP
from sslvit.objectives.objective import Batch
from sslvit.processes.collectives import start
from sslvit.training.cost import counting

HERE = Path(__file__).parent
BATCHES = [("XS/8", 32, batch) for batch in (8, 32, 128, 512)]
RESOLUTIONS = [("XS/8", size, max(4096 // (size * size // 64), 2)) for size in (32, 64, 128, 224)]
MODELS = [("XS/16", 224, 4), ("Ti/16", 224, 4), ("S/16", 224, 4), ("B/16", 224, 4)]


def step(model: str, size: int, batch: int, device: str) -> Callable[[], None]:
    objective = MPP(ViT.variant(model, image_size=size)).to(device)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, fused=True)
    inputs = Batch((torch.rand(batch, 3, size, size, device=device),), rng.key(0, torch.arange(batch, device=device)))

    def run() -> None:
        objective(inputs, 0.5)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def steps(cases: list[tuple[str, int, int]], rounds: int, device: str, rate: float) -> list[Result]:
    measured = []
    for model, size, batch in cases:
        run = step(model, size, batch, device)
        with counting() as counter:
            run()
        seconds = in_turns({"step": run}, rounds=rounds)
        case = f"{model} at {size} px, batch {batch}"
        measured += compared(case, seconds, images=batch, flops=counter.get_total_flops(), rate=rate)
    return measured


def paths(counts: tuple[int, ...], rounds: int) -> list[Result]:
    """Of lists of one file by many names: what it costs to have them, not to read them."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (8, 8)).save(f"{folder}/one.png")
        for count in counts:
            (Path(folder) / "list.txt").write_bytes(b"one.png\n" * count)
            runs = {"opening the list": lambda: open_source(f"list:{folder}/list.txt", image_size=8, cache=False)}
            row = EpochSampler(runs["opening the list"](), batch_size=256, accumulation=1, rank=0, processes=1, seed=0)
            runs["an epoch's order"] = lambda count=count: rng.permutation(
                rng.key(time.perf_counter_ns(), "order"), count
            )
            runs["a batch of 256"] = lambda row=row, count=count: row[count // 512]
            seconds = in_turns(runs, rounds=rounds, warm=1)
            batch = {"a batch of 256": seconds.pop("a batch of 256")}
            measured += compared(f"{count:,} paths", seconds, images=count)
            measured += compared(f"{count:,} paths", batch, images=256)
    return measured


def classes(counts: tuple[int, ...], rounds: int) -> list[Result]:
    measured = []
    for count in counts:
        x, labels = torch.randn(20_000, 128), torch.arange(20_000) % count
        test, asked = torch.randn(2_000, 128), torch.arange(2_000) % count
        runs = {
            "20-nn": lambda features=(x, labels, test, asked): knn(*features),
            "10-shot": lambda features=(x, labels, test, asked): fewshot(*features, shots=10),
        }
        measured += compared(
            f"{count:,} classes, 20,000 and 2,000", in_turns(runs, rounds=rounds, warm=1), images=22_000
        )
    return measured


def processes(rounds: int) -> list[Result]:
    """Of whole runs, by what they write of their cost."""
    count = torch.cuda.device_count() or 2
    seconds: dict[str, list[float]] = {"1 process": [], f"{count} processes": []}
    images = 4096
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for who, many in (("1 process", 1), (f"{count} processes", count)):
                out = Path(folder) / f"{turn}-{many}"
                words = f"--data shapes:n={images} --image_size 32 --model XS/8 --epochs 1 --eval_data shapes:n=64"
                launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
                launch += [str(many), str(HERE.parent / "mpp.py"), *words.split(), "--out", str(out)]
                environment = os.environ | {"ACCELERATE_USE_CPU": str(not torch.cuda.is_available()).lower()}
                done = subprocess.run(launch, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(launch)} ended with {done.returncode}: {done.stderr[-500:]}")
                log = (out / "metrics.jsonl").read_text().splitlines()
                seconds[who].append(float(log[-1].split('"seconds": ')[1].split(",")[0].rstrip("}")))
    return compared("XS/8 at 32 px, batch 64", seconds, images=images)


def main(
    rounds: int = 5,
    counts: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000),
    threads: int = 0,
    out: Path | None = None,
) -> None:
    """Measure what more work costs."""
    device = start(threads=threads).device.type  # as every recipe begins
    rate = matrix_rate(device)
    print(f"{device}, {torch.get_num_threads()} threads; matrix products: {rate / 1e9:,.0f} GFLOP/s in float32")
    results = []
    for measure in (
        lambda: steps(BATCHES, rounds, device, rate),
        lambda: steps(RESOLUTIONS, rounds, device, rate),
        lambda: steps(MODELS, rounds, device, rate),
        lambda: paths(counts, rounds),
        lambda: classes((10, 100, 1_000), rounds),
        lambda: processes(min(rounds, 3)),
    ):
        measured = measure()
        print("\n".join(map(line, measured)), flush=True)
        results += measured
    save(results, out, "growth")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
