"""The backbone beside timm's and transformers' of the same sizes: forward, and a training step, in one run, in turns.

    python recipes/benchmarks/backbone.py
    python recipes/benchmarks/backbone.py --cases XS/7:28:64 S/16:224:8 --rounds 9 --out runs/benchmark

A case is a model, the side of its images and the batch. Forward is without gradients; a step is forward, backward of
the mean class token, and fused AdamW. The share is that of the rate at which this machine multiplies two matrices,
measured first; operations are counted in our model (sslvit/training/cost.py). On a CPU the small cases are run once
more with each contestant in a process of its own, ours begun as our recipes begin (processes.collectives.start keeps
freed memory), the others as they are.
"""

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import tyro
from timing import OURS, compared, in_turns, line, matrix_rate, save
from torch import Tensor, nn

from sslvit.cli import run_cli
from sslvit.models.vit import ViT
from sslvit.processes.collectives import start
from sslvit.training.cost import counting

SMALL = ("XS/7:28:64", "XS/4:28:64", "XS/8:64:32", "Ti/16:224:8", "S/16:224:8", "B/16:224:4")
APART = ("XS/7:28:64", "XS/4:28:64")  # on a CPU, each contestant in a process of its own besides
LARGE = ("Ti/16:224:256", "S/16:224:256", "B/16:224:128")
TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def of_timm(vit: ViT) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": vit.image_size, "patch_size": vit.patch_size, "embed_dim": vit.width, "depth": vit.depth}
    shape |= {"num_heads": vit.heads, "mlp_ratio": vit.config.mlp_width / vit.width, "num_classes": 0}
    return VisionTransformer(**shape), lambda model, images: model(images)


def of_transformers(vit: ViT) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    from transformers import ViTConfig, ViTModel

    shape = {"hidden_size": vit.width, "num_hidden_layers": vit.depth, "num_attention_heads": vit.heads}
    shape |= {"intermediate_size": vit.config.mlp_width, "image_size": vit.image_size[0]}
    model = ViTModel(ViTConfig(**shape, patch_size=vit.patch_size[0]), add_pooling_layer=False)
    return model, lambda model, images: model(pixel_values=images).last_hidden_state[:, 0]


def contestants(case: str, device: str, only: str = "") -> tuple[dict[str, tuple[nn.Module, Callable]], int, int]:
    """Models with how to get the class token from them; the side of images; the batch."""
    try:
        model, size, batch = case.split(":")
        vit = ViT.variant(model, image_size=int(size))
    except ValueError as error:
        raise ValueError(f"--cases {case}: {error}. A case is like S/16:224:8, model, side of images, batch") from error
    models = {OURS: (vit, lambda model, images: model(images).cls)}
    for name, build in {"timm": of_timm, "transformers": of_transformers}.items():
        if only not in ("", name):
            continue
        if find_spec(name):
            models[name] = build(vit)
        else:
            print(f"{name} is not installed and is left out")
    return {who: (model.to(device), token) for who, (model, token) in models.items()}, int(size), int(batch)


def runner(
    model: nn.Module, token: Callable[[nn.Module, Tensor], Tensor], images: Tensor, trains: bool, dtype: torch.dtype
) -> Callable[[], None]:
    model.train(trains)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        lower = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)
        with torch.set_grad_enabled(trains), lower:
            loss = token(model, images).float().mean()
        if trains:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def in_a_process_of_its_own(who: str, case: str, threads: int, steps: int) -> float:
    """The median seconds of a training step of one contestant in a process of its own, as its users run it."""
    command = [sys.executable, __file__, "--alone", who, case, str(threads), str(steps)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def alone(who: str, case: str, threads: int, steps: int) -> None:
    if who == OURS:
        start(threads=threads)  # as every recipe begins
    torch.set_num_threads(threads)
    models, size, batch = contestants(case, "cpu", only=who)
    run = runner(*models[who], torch.rand(batch, 3, size, size), True, torch.float32)
    print(median(in_turns({who: run}, rounds=steps, warm=3)[who]))


def main(
    cases: tuple[str, ...] = (),
    apart: tuple[str, ...] | None = None,
    rounds: int = 7,
    threads: int = 0,
    precision: Literal["no", "bf16", "fp16"] = "no",
    out: Path | None = None,
) -> None:
    """Measure forward and a training step: milliseconds, images per second, and how many times a peer's time."""
    torch.set_num_threads(threads or torch.get_num_threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate = matrix_rate(device, TYPES[precision])
    print(
        f"{device}, {torch.get_num_threads()} threads; matrix products: {rate / 1e9:,.0f} GFLOP/s in {TYPES[precision]}"
    )
    results = []
    for case in cases or (LARGE if device == "cuda" else SMALL):
        models, size, batch = contestants(case, device)
        images = torch.rand(batch, 3, size, size, device=device)
        for kind in ("forward", "step"):
            runs = {who: runner(*one, images, kind == "step", TYPES[precision]) for who, one in models.items()}
            with counting() as counter:
                runs[OURS]()
            seconds = in_turns(runs, rounds=rounds)
            about = {"images": batch, "flops": counter.get_total_flops(), "rate": rate}
            measured = compared(f"{kind} of {case}", seconds, **about)
            print("\n".join(map(line, measured)), flush=True)
            results += measured
    whos = [who for who in (OURS, "timm", "transformers") if who == OURS or find_spec(who)]
    apart = (() if cases else APART) if apart is None else apart
    for case in apart if device == "cpu" else ():
        seconds = {who: [] for who in whos}
        for _ in range(rounds):
            for who in whos:
                seconds[who].append(in_a_process_of_its_own(who, case, torch.get_num_threads(), 8))
        about = {"images": int(case.rpartition(":")[2])}
        measured = compared(f"step of {case}, each in a process of its own", seconds, **about)
        print("\n".join(map(line, measured)), flush=True)
        results += measured
    save(results, out, "backbone")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        alone(*sys.argv[2:4], *map(int, sys.argv[4:]))
    else:
        run_cli(lambda: tyro.cli(main))
