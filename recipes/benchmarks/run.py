"""End to end: from a command to its first step, and images per second from stored images to updated weights.

    python recipes/benchmarks/run.py
    python recipes/benchmarks/run.py --objectives moco_v3 dino --image_size 32 --workers 1 --threads 1

Start-up is that of `accelerate launch recipes/mpp.py` on the built-in images, in processes of their own: to the first
step; to the first line of the log, which waits for the evaluation of the random start; and the imports alone. Training
reads images of 0 to 255 held in memory, makes the objective's views of them, and trains: ours by sslvit's loader and
views, the other by lightly's transforms in a DataLoader of PIL images, with lightly's heads and losses on timm's
backbone; both with as many workers and threads. Beside it a step alone, on views that are there.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from contestants import Sizes, ours
from peers import BY, PEERS
from PIL import Image
from steps import TYPES, compile_blocks, stepper
from timing import OURS, Result, compared, in_turns, line, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslvit.cli import run_cli
from sslvit.data.loader import EpochSampler, load
from sslvit.data.spec import Source, open_source
from sslvit.processes.device import send
from sslvit.views.pretraining import ContrastivePair, CropFlip, MultiCrop

HERE = Path(__file__).parent
ALONE = "our step alone"
IMPORTS = (
    "sslvit.train", "sslvit.cli.parse", "sslvit.reports.run", "sslvit.objectives.mpp", "sslvit.evaluate.monitor",
)  # fmt: skip
SIGMA = (0.1, 2.0)  # the peers' at every size
VIEWS = {
    "mpp": CropFlip,
    "mae": CropFlip,
    "supervised": CropFlip,
    "moco_v3": lambda size: ContrastivePair(size, sigma=SIGMA),
}


def starting(rounds: int) -> list[Result]:
    """From the command to the first step, to the first line of the log, and to the end of the imports."""

    def until(there: Callable[[Path], bool], *options: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            words = ["--epochs", "1", *options, "--out", f"{folder}/run"]
            command = [sys.executable, "-m", "accelerate.commands.launch", str(HERE.parent / "mpp.py"), *words]
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            try:
                while not there(Path(folder) / "run"):
                    if process.poll() is not None:
                        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} before its first step")
                    time.sleep(0.01)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def saved(run: Path) -> bool:
        return (run / "checkpoints" / "step-00000001").exists()

    def logged(run: Path) -> bool:
        log = run / "metrics.jsonl"
        return log.exists() and any(json.loads(line)["step"] == 1 for line in log.read_text().split("\n")[:-1][:3])

    def imports(*modules: str) -> None:
        subprocess.run([sys.executable, "-c", f"import {', '.join(modules)}"], check=True)

    runs = {
        "first step": lambda: until(saved, "--log_every", "2", "--save_every", "1"),
        "first line": lambda: until(logged, "--log_every", "1"),
        "launcher's imports": lambda: imports("accelerate.commands.launch"),
        "imports": lambda: imports(*IMPORTS),
    }
    return compared("from the command, recipes/mpp.py", in_turns(runs, rounds=rounds, warm=1))


class Pictures(Dataset):
    """The same images as PIL's, each as a tuple of views."""

    def __init__(self, pixels: np.ndarray, transform: Callable):
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, id: int) -> tuple[Tensor, ...]:
        return tuple(self.transform(Image.fromarray(self.pixels[id])))


def of_lightly(name: str, source: Source, sizes: Any, workers: int) -> Iterator[tuple[Tensor, ...]]:
    from lightly.transforms import DINOTransform, MAETransform, MoCoV2Transform

    size = sizes.image_size
    transform = {
        "moco_v3": lambda: MoCoV2Transform(input_size=size),
        "mae": lambda: MAETransform(input_size=size),
        "dino": lambda: DINOTransform(global_crop_size=size, local_crop_size=sizes.small_crop, n_local_views=8),
    }[name]()
    pixels = source.read(np.arange(len(source))).pixels.permute(0, 2, 3, 1).contiguous().numpy()
    loader = DataLoader(
        Pictures(pixels, transform), sizes.batch_size, shuffle=True, num_workers=workers, drop_last=True,
        persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        yield from loader


def of_ours(name: str, source: Source, sizes: Any, workers: int) -> Iterator[tuple[Tensor, ...]]:
    """As in training: a GPU makes its own views, workers those of a CPU."""
    row = EpochSampler(source, batch_size=sizes.batch_size, accumulation=1, rank=0, processes=1, seed=0)
    size, gpu = sizes.image_size, torch.cuda.is_available()
    views = MultiCrop(size, sizes.small_crop, sigma=SIGMA) if name == "dino" else VIEWS[name](size)
    ahead = None if gpu or not workers else views
    for one in load(row, first_step=0, steps=1_000_000, workers=workers, timeout=600, pin=gpu, views=ahead):
        pixels = send(one.samples.pixels, torch.device("cuda" if gpu else "cpu"))
        yield one.views or views(pixels, one.view_key, one.samples.extents)


def training(
    name: str, sizes: Any, source: Source, workers: int, steps: int, rounds: int, dtype: torch.dtype, compile: bool
) -> list[Result]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs, peers = {}, {OURS: of_ours, "lightly": of_lightly}
    for who, read in peers.items():
        if who != OURS and (name not in PEERS[who] or not find_spec(who)):
            continue
        contestant = (BY.get(who) or ours)(name, sizes, device)
        compile_blocks(contestant.trained, compile)
        parameters = [p for p in contestant.trained.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        batches = read(name, source, sizes, workers)

        def run(contestant=contestant, optimizer=optimizer, batches=batches) -> None:
            for _ in range(steps):
                views = tuple(view.to(device, non_blocking=True) for view in next(batches))
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    loss = contestant.loss(views)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                contestant.after()

        runs[who] = run
    alone = stepper(OURS, name, sizes, device, dtype, compile)
    runs[ALONE] = lambda: [alone() for _ in range(steps)]
    seconds = in_turns(runs, rounds=rounds, warm=1)
    case = f"{name}, {sizes.model} at {sizes.image_size} px, batch {sizes.batch_size}, {sizes.heads} heads, end to end"
    return compared(case, seconds, images=sizes.batch_size * steps)


def main(
    objectives: tuple[str, ...] = ("mpp", "mae", "moco_v3", "dino"),
    model: str = "XS/8",
    image_size: int = 32,
    batch_size: int = 64,
    workers: int = 1,
    steps: int = 8,
    rounds: int = 5,
    threads: int = 1,
    precision: Literal["no", "bf16", "fp16"] = "no",
    compile: bool = False,
    heads: Literal["paper", "small"] = "small",
    start_up: bool = True,
    out: Path | None = None,
) -> None:
    """Measure start-up, and training from images in memory to updated weights."""
    torch.set_num_threads(threads or torch.get_num_threads())
    results = starting(3) if start_up else []
    print("\n".join(map(line, results)), flush=True)
    source = open_source("shapes:n=2048", image_size=image_size)
    source.read(np.arange(8))  # the built-in images are drawn when they are first read
    for name in objectives:
        sizes, how = Sizes(model, image_size, batch_size, heads), (TYPES[precision], compile)
        measured = training(name, sizes, source, workers, steps, rounds, *how)
        print("\n".join(map(line, measured)), flush=True)
        results += measured
    save(results, out, "run")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
