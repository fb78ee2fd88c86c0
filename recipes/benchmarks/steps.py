"""A training step of each objective beside the best peers that have it: seconds and peak memory, in one run, in turns.

    python recipes/benchmarks/steps.py --model S/16 --image_size 224 --batch_size 4

Forward, backward and AdamW (fused, for everybody), and the teacher's move, on the same images; views and reading are
measured elsewhere. Peers take part where they are installed: timm's backbone with a linear head (supervised) or with
nothing on it (mpp), vit-pytorch's MPP where it runs, transformers' ViTMAE and its SimMIM, and timm's backbone with
lightly's heads, losses and teachers for the rest. data2vec has no peer that trains.
Every peer is of the same sizes and has as many views: two for MoCo v3, SimCLR and VICReg, 2 large and 8 small crops for
DINO, iBOT and DINOv2, 2 and 4 for LeJEPA. Heads, decoders and LeJEPA's directions are the papers' or, with --heads
small, those of our recipes' small presets. Backbones are plain ViTs without drop path. What else differs is listed at
the head of peers.py and peers_lightly.py.
"floor" is what our step's operations would take at the rate at which timm's bare ViT of these sizes does its own, in
the same rounds.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import psutil
import torch
import tyro
from contestants import Sizes, ours
from peers import BY, PEERS
from timing import OURS, compared, in_turns, line, matrix_rate, save
from torch import nn

from sslvit.training.cost import counting

OBJECTIVES = ("supervised", "mpp", "mae", "simmim", "ijepa", "data2vec", "moco_v3", "simclr", "vicreg", "lejepa")
OBJECTIVES += ("dino", "ibot", "dinov2")
FLOOR = "floor, by timm"
BLOCKS = ("Block", "ViTMAELayer", "ViTLayer")  # by their names: ours and timm's, and transformers'
TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compile_blocks(trained: nn.Module, compile: bool) -> None:
    for module in trained.modules():
        if compile and type(module).__name__ in BLOCKS:
            module.compile()


def stepper(
    who: str, name: str, sizes: Sizes, device: str, dtype: torch.dtype = torch.float32, compile: bool = False
) -> Callable[[], None]:
    """Takes one step. The blocks of all contestants are compiled, or of none."""
    contestant = (BY.get(who) or ours)(name, sizes, device)
    compile_blocks(contestant.trained, compile)
    views = sizes.views(name, device)
    optimizer = torch.optim.AdamW([p for p in contestant.trained.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = contestant.loss(views)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        contestant.after()

    return step


def begin_anew(device: str) -> None:
    """Frees the last objective's memory and compiled kernels, which would be recompiled for dynamic shapes."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def warm(step: Callable[[], None], device: str) -> None:
    for turn in range(3 if device == "cuda" else 1):
        if turn == 2:  # the first may compile, which takes memory of its own
            torch.cuda.reset_peak_memory_stats()
        step()


def counted(step: Callable[[], None]) -> int:
    """Floating-point operations."""
    with counting() as counter:
        step()
    return counter.get_total_flops()


def peak(who: str, name: str, sizes: Sizes, device: str, threads: int) -> float:
    """MiB that three steps need on a CPU beyond the imports, in a process of their own."""
    options = json.dumps([who, name, sizes, device, threads])
    done = subprocess.run([sys.executable, __file__, "--peak-of", options], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def print_peak(who: str, name: str, sizes: list, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    sizes = Sizes(*sizes)
    stepper(who, name, Sizes("mu/8", 32, 2, "small"), device)()  # what it and torch load when they are first used
    before = psutil.Process().memory_info().rss
    step = stepper(who, name, sizes, device)
    for _ in range(3):
        step()
    lines = Path("/proc/self/status").read_text().splitlines()
    high = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    print((high - before) / 2**20)


def main(
    model: str = "S/16",
    image_size: int = 224,
    batch_size: int = 4,
    objectives: tuple[str, ...] = OBJECTIVES,
    rounds: int = 7,
    threads: int = 0,
    memory: bool = True,
    precision: Literal["no", "bf16", "fp16"] = "no",
    compile: bool = False,
    heads: Literal["paper", "small"] = "paper",
    out: Path | None = None,
) -> None:
    """Measure a step of each objective, and how many times a peer's seconds it takes: medians (least to most)."""
    torch.set_num_threads(threads or torch.get_num_threads())
    results = []
    device, sizes = "cuda" if torch.cuda.is_available() else "cpu", Sizes(model, image_size, batch_size, heads)
    how = (sizes, device, TYPES[precision], compile)
    rate = matrix_rate(device, TYPES[precision])
    print(
        f"{device}, {torch.get_num_threads()} threads; matrix products: {rate / 1e9:,.0f} GFLOP/s in {TYPES[precision]}"
    )
    for name in objectives:
        steps, mebibytes, step = {}, {}, None  # so that the last contestant's memory is free
        begin_anew(device)
        for who in (OURS, *(who for who, has in PEERS.items() if name in has)):
            if who != OURS and not find_spec(who):
                print(f"{who} is not installed and is left out")
                continue
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            try:
                step = stepper(who, name, *how)
                warm(step, device)
            except Exception as error:  # a peer that does not run is part of the result
                if who == OURS:
                    raise
                print(f"{name:11} {who:13} does not run: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
                continue
            steps[who] = step
            if device == "cuda":
                mebibytes[who] = (torch.cuda.max_memory_allocated() - before) / 2**20
            elif memory:
                mebibytes[who] = peak(who, name, sizes, device, torch.get_num_threads())
        if find_spec("timm"):
            steps[FLOOR] = stepper("timm", "mpp", *how)
        operations = {who: counted(steps[who]) for who in (OURS, FLOOR) if who in steps}
        about = {"images": batch_size, "flops": operations[OURS], "rate": rate, "mebibytes": mebibytes}
        case = f"step of {name}, {model} at {image_size} px, batch {batch_size}, {heads} heads"
        seconds = in_turns(steps, rounds=rounds)
        if FLOOR in seconds:
            seconds[FLOOR] = [operations[OURS] / operations[FLOOR] * bare for bare in seconds[FLOOR]]
        measured = compared(case, seconds, **about)
        print("\n".join(map(line, measured)), flush=True)
        results += measured
    save(results, out, "steps")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak-of"]:
        print_peak(*json.loads(sys.argv[2]))
    else:
        tyro.cli(main)
