"""The views that an objective sees: a PNG of the first images of a run beside their views.

    python recipes/dino.py --data folder:/my/images --show_views views.png

Each row is one image: first the whole of it, then its views, the very ones that training with these options sees in
its first step, and last, where an objective hides patches, what is left of the first view. Large views and small ones
are shown at their true sizes. Mixup and cutmix, which mix the images of a batch, come after, in the objective.
"""

import errno
import os
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from sslvit.config import TrainConfig
from sslvit.data.loader import Views
from sslvit.data.source import Images
from sslvit.errors import CannotWrite
from sslvit.objectives.objective import Batch, Objective
from sslvit.storage import durable
from sslvit.training.batches import sampler_for
from sslvit.views.pretraining import EvalView

SHOWN = 8  # images
GAP = 4  # white pixels between images


@torch.no_grad()
def show_views(
    config: TrainConfig, file: Path, objective: Objective, source: Images, views: Views, accelerator: Accelerator
) -> None:
    few = replace(config, batch_size=SHOWN * accelerator.num_processes, accumulation=1)
    samples, view_key, slot_key, _ = sampler_for(source, few, accelerator)[0]
    seen = views(samples.pixels, view_key, samples.extents)
    hidden = objective.cpu().reconstructed(Batch(seen, slot_key, samples.labels))[:1]
    if accelerator.is_main_process:
        pixels = samples.pixels[:, : source.channels]  # without a mask
        whole = EvalView(tuple(seen[0].shape[-2:]))(pixels, view_key, samples.extents)
        draw((*whole, *seen, *hidden), file)
    several = "1 view" if len(seen) == 1 else f"{len(seen)} views"
    masked = ", and once more with what the model does not see in grey" if hidden else ""
    accelerator.print(f"{file}: {SHOWN} images of {source.name}, each whole and in {several}{masked}")


def draw(columns: tuple[Tensor, ...], file: Path, *, across: bool = False) -> None:
    """Batches b c h w in [0, 1] side by side, a row for each image; or, across, a row for each batch."""
    picture = sheet(columns, across=across)
    try:
        if not file.parent.is_dir():  # a mistyped folder is not made
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        durable.replace_picture(file, picture)
    except OSError as error:
        raise CannotWrite(f"--show_views {file} cannot be written: {error.strerror}") from error


def sheet(columns: tuple[Tensor, ...], *, across: bool) -> Image.Image:
    columns = tuple(images.mT for images in columns) if across else columns
    height = max(images.shape[-2] for images in columns)
    pixels = torch.cat([tile(images, height) for images in columns], dim=-1)
    pixels = pixels.mT if across else pixels
    return Image.fromarray(rearrange((pixels * 255).round().to(torch.uint8), "c h w -> h w c").numpy())


def tile(images: Tensor, height: int) -> Tensor:
    """b c h w in [0, 1] -> c height w + GAP, each below the other in its own cell, grey ones in three channels."""
    if images.shape[1] != 3:
        images = repeat(images[:, :1], "b 1 h w -> b c h w", c=3)
    b, c, h, w = images.shape
    sheet = torch.ones(b, c, height + GAP, w + GAP)
    sheet[:, :, :h, :w] = images
    return rearrange(sheet, "b c h w -> c (b h) w")
