"""Views per second on one CPU core: ours and the same views by others, in one run, in turns.

    taskset -c 0 python recipes/benchmarks/views.py --sizes 32 96 224

`official` is what the papers' code runs: PIL images and Pillow's own blur through torchvision, one sample at a time
(timm's DeiT pipeline for `deit`). `torchvision` is v2 on uint8 tensors, one sample at a time, with the 17 taps that a
sigma of 2 needs. kornia, lightly and timm take part where they are installed, or are named. None of them standardises.

One core of an AMD EPYC (Zen 3), torch 2.15, kornia 0.9.0, lightly 1.6.0, 2026-11-21, the median of 5 rounds in
multiples of the official pipeline (least to most); docs/results/speed.md has all of them:
    moco_v3    32 px  12.7 (9.7 to 20.2)    96 px  3.1 (2.6 to 4.3)   224 px  3.1 (2.5 to 3.6)
"""

import random
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import tyro
from einops import rearrange
from PIL import Image, ImageFilter
from timing import compared, save
from torchvision.transforms import v2

from sslvit import rng
from sslvit.views.pretraining import ContrastivePair, ContrastiveView, CropFlip, EvalView, MultiCrop
from sslvit.views.supervised import SupervisedView

CANVAS, COUNT = {32: 32, 96: 96, 224: 256}, {32: 256, 96: 64, 224: 32}
SIGMA = (0.1, 2.0)  # the peers' at every size
OURS = {
    "light": CropFlip,
    "moco_v3": lambda s: ContrastivePair(s, sigma=SIGMA),
    "dino": lambda s: MultiCrop(s, s * 3 // 7, sigma=SIGMA),
    "deit": SupervisedView.deit,
    "plain": EvalView,
}
OTHERS = ("kornia", "lightly", "timm")
BICUBIC = {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
# Magnitude 8, not 9: at the level 10 that 9 +- 0.5 is clipped to, timm asks for 0 bits, which Pillow 13 refuses.
DEIT = {"auto_augment": "rand-m8-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel", "interpolation": "bicubic"}
FLOAT = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


class PillowBlur(torch.nn.Module):
    def forward(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def by_torchvision(view: ContrastiveView, blur: torch.nn.Module) -> Callable:
    mode = v2.InterpolationMode(view.interpolation)
    steps = [v2.RandomResizedCrop(view.size, view.scale, interpolation=mode, antialias=True), v2.RandomHorizontalFlip()]
    if view.jitter:
        steps += [v2.RandomApply([v2.ColorJitter(*view.strengths)], view.jitter), v2.RandomGrayscale(view.grey)]
        steps += [v2.RandomApply([blur], view.blur), v2.RandomSolarize(128, view.solarize)]
    return v2.Compose([*steps, *FLOAT])


def by_kornia(view: ContrastiveView) -> Callable:
    import kornia.augmentation as K

    steps = [K.RandomResizedCrop((view.size,) * 2, view.scale, resample=view.interpolation), K.RandomHorizontalFlip()]
    if view.jitter:
        steps += [K.ColorJitter(*view.strengths, p=view.jitter), K.RandomGrayscale(p=view.grey)]
        steps += [K.RandomGaussianBlur((17, 17), (0.1, 2.0), p=view.blur), K.RandomSolarize(0.0, 0.0, p=view.solarize)]
    return torch.nn.Sequential(*steps)


def by_lightly(name: str, size: int) -> Callable:
    from lightly import transforms as T

    if name == "light":
        return T.MAETransform(size, normalize=None)
    if name == "dino":
        return T.DINOTransform(size, local_crop_size=size * 3 // 7, n_local_views=8, normalize=None)
    first, second = T.BYOLView1Transform(size, normalize=None), T.BYOLView2Transform(size, normalize=None)
    return T.BYOLTransform(first, second)


def contestants(name: str, size: int) -> dict[str, Callable]:
    """Each takes the uint8 batch, the same images as PIL's and a round, and gives its views."""
    ours = OURS[name](size)
    out = {"sslvit": lambda pixels, pictures, turn: ours(pixels, rng.key(turn, torch.arange(len(pixels))))}
    if name == "deit":
        steps = [v2.RandomResizedCrop(size, **BICUBIC), v2.RandomHorizontalFlip(), v2.RandAugment(), *FLOAT]
        tensors, pillow = [v2.Compose([*steps, v2.RandomErasing(0.25)])], []
        if find_spec("timm"):
            from timm.data import create_transform

            pillow = [create_transform(size, is_training=True, color_jitter=None, mean=(0,) * 3, std=(1,) * 3, **DEIT)]
    elif name == "plain":
        tensors = pillow = [v2.Compose([v2.Resize((size, size), **BICUBIC), *FLOAT])]
    else:
        light = (ContrastiveView(size, (0.2, 1.0), interpolation="bicubic", jitter=0.0),)
        views = light if name == "light" else ours.views
        tensors = [by_torchvision(view, v2.GaussianBlur(17, (0.1, 2.0))) for view in views]
        pillow = [by_torchvision(view, PillowBlur()) for view in views]
        if find_spec("kornia"):
            batched = [by_kornia(view) for view in views]
            out["kornia"] = lambda pixels, pictures, turn: [step(pixels / 255) for step in batched]
        if find_spec("lightly"):
            both = by_lightly(name, size)
            out["lightly"] = lambda pixels, pictures, turn: [*map(torch.stack, zip(*map(both, pictures), strict=True))]
    if pillow:
        out["official"] = lambda pixels, pictures, turn: [torch.stack([step(p) for p in pictures]) for step in pillow]
    out["torchvision"] = lambda pixels, pictures, turn: [torch.stack([step(p) for p in pixels]) for step in tensors]
    return out


def measure(name: str, size: int, rounds: int = 5) -> dict[str, list[float]]:
    """Views per second of each contestant, one number per round; all run in every round."""
    canvas = CANVAS[size]
    noise = torch.rand(COUNT[size], 3, canvas // 4, canvas // 4, generator=torch.Generator().manual_seed(0))
    pixels = (v2.functional.resize(noise, [canvas, canvas]) * 255).to(torch.uint8)
    pictures = [Image.fromarray(image) for image in rearrange(pixels, "b c h w -> b h w c").numpy()]
    everyone = contestants(name, size)
    speeds: dict[str, list[float]] = {who: [] for who in everyone}
    for turn in range(rounds + 1):
        for who, run in everyone.items():
            start = time.perf_counter()
            views = run(pixels, pictures, turn)
            if turn:  # the first is a warm-up
                speeds[who].append(sum(map(len, views)) / (time.perf_counter() - start))
    return speeds


def main(
    sizes: tuple[int, ...] = (32, 96, 224),
    sets: tuple[str, ...] = tuple(OURS),
    rounds: int = 5,
    out: Path | None = None,
) -> None:
    """Measure views per second, and how many times the official pipeline's that is: medians (least to most)."""
    torch.set_num_threads(1)
    results = []
    for other in OTHERS:
        if not find_spec(other):
            print(f"{other} is not installed and is left out")
    for name in sets:
        for size in sizes:
            speeds = measure(name, size, rounds)
            base = speeds.get("official", speeds["torchvision"])
            for who, numbers in speeds.items():
                ratios = sorted(a / b for a, b in zip(numbers, base, strict=True))
                times = f"{median(ratios):6.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                print(f"{name:8}{size:4} px  {who:12}{median(numbers):9.0f} views/s  {times}", flush=True)
            seconds = {who: [1 / speed for speed in numbers] for who, numbers in speeds.items()}
            results += compared(f"a view of {name} at {size} px", seconds, images=1)
    save(results, out, "views")


if __name__ == "__main__":
    tyro.cli(main)
