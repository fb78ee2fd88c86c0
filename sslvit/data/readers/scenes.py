"""The built-in scenes: two to five objects of `shapes` on two grounds, with the class of every pixel. Nothing is
downloaded, no label is drawn by hand.

A scene is a pure function of (seed, id), as the images of shapes.py are, and like theirs its arithmetic gives the same
pixels everywhere. A line divides the ground into two textures. Objects lie on it and on each other; each tends to the
colour of its kind. The classes are the ten textures of the ground and then the twelve shapes. An object is smaller than
in `shapes`, so a scene needs more pixels: 64 and more.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sslvit import rng
from sslvit.data.readers.shapes import (
    PIXELS,
    SHAPE_COLORS,
    SHAPES,
    TEXTURES,
    between,
    outline_distance,
    plane,
    texture,
    turned,
)

CLASSES = (*(f"{name} ground" for name in TEXTURES), *SHAPES)
FEWEST, MOST = 2, 5  # objects
SMALLEST = 32  # pixels, below which the objects cannot be recognised


class Scenes(NamedTuple):
    images: Tensor  # uint8 b 3 size size
    masks: Tensor  # uint8 b size size: of CLASSES
    objects: Tensor  # int8 b size size: which object is seen, -1 for the ground
    kinds: Tensor  # int64 b MOST: of SHAPES, -1 where a scene has fewer objects


def make(ids: Tensor, size: int, seed: int = 0) -> Scenes:
    """The scenes of these ids: b"""
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError(f"ids are a vector of int64, not {ids.dtype} of shape {tuple(ids.shape)}")
    if size < SMALLEST:
        raise ValueError(f"size {size} is below {SMALLEST} pixels, where the objects of a scene are indistinguishable")
    step = max(1, PIXELS // (3 * size**2))
    pieces = [_render(piece, size, seed) for piece in ids.split(step)] or [_render(ids, size, seed)]
    return Scenes(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _render(ids: Tensor, size: int, seed: int) -> Scenes:
    key, count = rng.key(seed, "shapes", "scenes", ids), len(ids)
    line = (torch.arange(size, device=ids.device, dtype=torch.float32) + 0.5) * (2 / size) - 1
    middle = line.new_zeros(count, 2)

    # Two grounds, on either side of a line that passes near the middle.
    cosine, sine = turned(key, "border")
    side = plane(line, between(key, "border", -0.4, 0.4, 2), cosine, sine)
    first = rng.integers(rng.fold(key, "first ground"), len(TEXTURES))
    second = (first + 1 + rng.integers(rng.fold(key, "second ground"), len(TEXTURES) - 1)) % len(TEXTURES)
    share = (side * (size / 2)).add_(0.5).clamp_(0, 1)[:, None]
    image = _painted(key, "first", first, line, middle).mul_(share)
    image += _painted(key, "second", second, line, middle).mul_(1 - share)
    masks = torch.where(side > 0, first[:, None, None], second[:, None, None])

    number = FEWEST + rng.integers(rng.fold(key, "number"), MOST - FEWEST + 1)
    objects, kinds = torch.full_like(masks, -1), []
    for index in range(MOST):
        own = rng.fold(key, "object", index)
        kind = rng.integers(rng.fold(own, "kind"), len(SHAPES))
        scale, stretch = between(own, "scale", 0.25, 0.45), between(own, "stretch", 0.85, 1.2)
        center = between(own, "position", -1, 1, 2) * (1 - 0.8 * scale)[:, None]
        distance = outline_distance(kind, line, center, turned(own, "rotation", turns=0.25), scale, stretch)
        exists = (index < number)[:, None, None]
        inside = (distance * (-size / 2)).add_(0.5).clamp_(0, 1).mul_(exists)[:, None]
        # It is domed, and darkens what it lies on.
        dome, shadow = between(own, "dome", 0, 0.5)[:, None, None], between(own, "shadow", 0, 0.6)[:, None, None]
        bright = (distance * -8).clamp_(0, 1).mul_(dome).add_(0.75)[:, None]
        dim = (distance * -10).add_(1).clamp_(0, 1).mul_(-shadow).mul_(exists).add_(1)[:, None]
        paint = _painted(own, "object", rng.integers(rng.fold(own, "texture"), len(TEXTURES)), line, center, kind)
        image = image.mul_(dim).mul_(1 - inside).add_(paint.mul_(bright).mul_(inside))
        seen = (distance < 0) & exists
        masks = torch.where(seen, len(TEXTURES) + kind[:, None, None], masks)
        objects = torch.where(seen, index, objects)
        kinds.append(torch.where(index < number, kind, -1))

    slope = between(key, "light", -0.35, 0.35, 2)
    light = plane(line, middle, slope[:, 0], slope[:, 1], between(key, "exposure", 0.7, 1.1))
    image = image.mul_(light[:, None]).mul_(255).add_(0.5).clamp_(0, 255)
    return Scenes(image.to(torch.uint8), masks.to(torch.uint8), objects.to(torch.int8), torch.stack(kinds, 1))


def _painted(
    key: Tensor, name: str, labels: Tensor, line: Tensor, center: Tensor, kind: Tensor | None = None
) -> Tensor:
    """A texture in two colours, of an object near the colour of its kind: b 3 size size"""
    free = between(key, name + " colour", 0.1, 0.7, 3)
    tint = between(key, name + " tint", -0.2, 0.2, 3)
    base = free if kind is None else (SHAPE_COLORS.to(line.device)[kind] + tint).clamp_(0, 1)
    contrast = (
        between(key, name + " contrast", 0.3, 0.6) if kind is None else between(key, name + " contrast", 0.1, 0.3)
    )
    change = (rng.uniform(rng.fold(key, name + " second colour"), 3) - base) * contrast[:, None]
    pattern = texture(key, name, labels, line, center, 3.0, 5.0)[:, None]
    return (pattern * change[:, :, None, None]).add_(base[:, :, None, None])
