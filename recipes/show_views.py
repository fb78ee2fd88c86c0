"""What an objective really sees: a PNG of your own images beside their views.

    python recipes/show_views.py --data folder:/my/images --views dino --image_size 224 --out views.png

Each row is one image: first the whole of it, then its views, the same that training with this seed sees in its first
epoch. Large views and small ones are shown at their true sizes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from sslvit import rng
from sslvit.data.source import open_source
from sslvit.data.supervised import Supervised
from sslvit.data.views import DINO, Light, MoCoV3, Plain
from sslvit.errors import at_the_door

GAP = 4  # white pixels between images


@dataclass(frozen=True)
class Config:
    """Draw the views of a few images."""

    data: str = "shapes"
    """Images: shapes (built in), folder:/dir, idx:/dir, parquet:/files, hf:name, disk:/dir, npz:/file."""
    views: Literal["light", "moco_v3", "dino", "deit", "plain_vit", "plain"] = "moco_v3"
    image_size: int = 32
    images: int = 8
    """How many images, spread evenly over the data."""
    epochs: int = 1
    """How many epochs of views, side by side."""
    seed: int = 0
    out: Path = Path("views.png")


def tile(images: Tensor, height: int) -> Tensor:
    """b c h w in [0, 1] -> c height w + GAP, each below the other in its own cell, grey ones in three channels."""
    if images.shape[1] != 3:
        images = repeat(images[:, :1], "b 1 h w -> b c h w", c=3)
    b, c, h, w = images.shape
    sheet = torch.ones(b, c, height + GAP, w + GAP)
    sheet[:, :, :h, :w] = images
    return rearrange(sheet, "b c h w -> c (b h) w")


def main() -> None:
    config = tyro.cli(Config)
    size = config.image_size
    view = {
        "light": Light(size),
        "moco_v3": MoCoV3(size),
        "dino": DINO(size, max(size * 3 // 7, 1)),
        "deit": Supervised.deit(size),
        "plain_vit": Supervised.plain_vit(size),
        "plain": Plain(size),
    }[config.views]
    source = open_source(config.data, image_size=size)
    ids = np.linspace(0, len(source) - 1, min(config.images, len(source))).astype(np.int64)
    samples = source.read(ids)
    columns = [Plain(size)(samples.pixels, samples.ids, samples.extents)[0]]
    for epoch in range(config.epochs):
        columns += view(samples.pixels, rng.key(config.seed, "views", epoch, samples.ids), samples.extents)
    height = max(images.shape[-2] for images in columns)
    sheet = torch.cat([tile(images, height) for images in columns], dim=-1)
    picture = rearrange((sheet * 255).round().to(torch.uint8), "c h w -> h w c")
    Image.fromarray(picture.numpy()).save(config.out)
    print(f"{config.out}: {len(ids)} images of {source.name}, each with {len(columns) - 1} views")


if __name__ == "__main__":
    at_the_door(main)
