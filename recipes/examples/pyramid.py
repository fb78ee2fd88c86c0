"""Feature maps at four scales, for a detector or a segmenter: python recipes/examples/pyramid.py MODEL"""

import sys

import torch
import torch.nn.functional as F
from einops import rearrange

from sslvit.cli import run_cli
from sslvit.weights.foreign.open import open_backbone


def main() -> None:
    if len(sys.argv) != 2:
        raise ValueError(__doc__)
    backbone, _ = open_backbone(sys.argv[1])
    height, width = (2 * side for side in backbone.image_size)  # positions are resized to images of any size
    images = torch.rand(2, backbone.channels, height, width)
    quarters = [backbone.depth * i // 4 - 1 for i in (1, 2, 3, 4)] if backbone.depth >= 4 else [backbone.depth - 1]
    with torch.no_grad():
        outputs = backbone.intermediate(images, sorted(set(quarters)))
    maps = [rearrange(out.patches, "b (h w) d -> b d h w", h=height // backbone.patch_size[0]) for out in outputs]
    maps = [maps[min(level, len(maps) - 1)] for level in range(4)]
    pyramid = [F.interpolate(one, scale_factor=factor) for one, factor in zip(maps, (4, 2, 1, 0.5), strict=True)]
    print("\n".join(f"level {level}: {tuple(one.shape)}" for level, one in enumerate(pyramid)))


run_cli(main)
