"""The built-in labelled images: textured objects on textured backgrounds, made by arithmetic, nothing downloaded.

An image is a pure function of (seed, id): twelve shapes (the label) on grounds of ten textures (a second label, for
transfer), with position, scale, rotation, stretch, colors, shading, light and the object's own texture as nuisance.
The scene has no pixels until it is rendered, so every size shows the same one. Disjoint ids are disjoint draws.

Nearly everything a pixel goes through is + - * / sqrt, floor, round, abs, min and max: IEEE 754 rounds each of them
in one way, so batching and threads change no pixel. Sines would break that: their vector and scalar codes differ.

At 32 px, with 10,000 images to learn from and 2,000 to be asked about, 20 nearest neighbours (temperature 0.07) name
50 % of the shapes from raw pixels and 15 % from the mean patch of a random ViT (XS/8, seed 0), and of the textures
9 % from pixels, which is chance (8.3 % and 10 % are the chances). A kind tends to a color, so colors alone go far
and outlines further. Textures need a net that finds them anywhere at any angle: a convolutional one of four layers has
37 % of them after two passes, XS/8 trained on labels is still at chance after five.
"""

from collections.abc import Callable
from math import cos, pi, sin

import torch
from torch import Tensor

from sslvit import rng

# Rotations come from a table of 4096 unit vectors: no sine is evaluated on a tensor.
DIRECTIONS = torch.tensor([(cos(turn * pi / 2048), sin(turn * pi / 2048)) for turn in range(4096)])
# The colour that each kind tends to: twelve around the circle of hues.
SHAPE_COLORS = torch.tensor([[0.5 + 0.35 * cos(2 * pi * (k / 12 - c / 3)) for c in range(3)] for k in range(12)])
PIXELS = 1 << 20  # rendered at a time, so that the planes of a piece stay near the cache


# --- Shapes: distance to the outline, negative inside, in the object's own coordinates (it spans about [-1, 1]) ---


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x * x).add_(y * y).sqrt_()


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs().sub_(half_width), y.abs().sub_(half_height))


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: the plane is folded onto the sector of half a point, where the outline is one line."""
    x = x.abs()
    for side in (1, -1):  # the mirrors between a point and its neighbours
        normal_x, normal_y = side * cos(pi / 5), -sin(pi / 5)
        reach = (x * normal_x + y * normal_y).clamp_(min=0).mul_(2)
        x, y = x - reach * normal_x, y - reach * normal_y
    x = x.abs()
    # The line from the tip (0, 1) to the notch at radius 0.45, 36 degrees away.
    edge_x, edge_y = 0.45 * sin(pi / 5), 0.45 * cos(pi / 5) - 1
    norm = (edge_x**2 + edge_y**2) ** 0.5
    return x * (-edge_y / norm) + (y - 1) * (edge_x / norm)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y + 0.1
    tilted = torch.maximum((x + y).abs(), (x - y).abs()) * 0.5**0.5 - 0.6
    lobe = 0.6 * 0.5**0.5
    return torch.minimum(tilted, _length(x - lobe, y - lobe) - 0.6)


def _arrow(x: Tensor, y: Tensor) -> Tensor:
    head = torch.maximum(x.abs() * 0.8 + y * 0.6 - 0.6, -0.05 - y)
    return torch.minimum(head, _box(x, y + 0.5, 0.22, 0.5))


# --- Textures: a value in [0, 1] from coordinates in cycles; `sharp` (pixels a cycle) makes an edge one pixel soft. ---


def _near(x: Tensor) -> Tensor:
    """Distance to the nearest integer, in [0, 1/2]: the triangle wave that stands in for a cosine."""
    return x.sub(x.round()).abs_()


def _edge(signed: Tensor, sharp: Tensor) -> Tensor:
    return signed.mul_(sharp).add_(0.5).clamp_(0, 1)


def _bricks(u: Tensor, v: Tensor, sharp: Tensor) -> Tensor:
    row = v.floor()
    along = _near((u + row) * 0.5).mul_(2)  # every other row is shifted by half a brick
    return _edge(0.14 - torch.minimum(along, _near(v)), sharp)


def _cell(u: Tensor, v: Tensor) -> Tensor:
    """A number in [0, 1] for each integer cell, the same in every image: an image shows its own part of the plane."""
    mixed = u.to(torch.int32) * 374761393 + v.to(torch.int32) * 668265263  # wraps modulo 2**32
    mixed = (mixed ^ ((mixed >> 13) & 0x7FFFF)) * 1274126177
    return ((mixed >> 16) & 0xFF).to(torch.float32) * (1 / 255)


def _clouds(u: Tensor, v: Tensor, sharp: Tensor) -> Tensor:
    u, v = u * 0.8, v * 0.8
    low_u, low_v = u.floor(), v.floor()
    part_u, part_v = u - low_u, v - low_v
    part_u, part_v = part_u * part_u * (3 - part_u * 2), part_v * part_v * (3 - part_v * 2)
    low, high = (
        _cell(low_u, row).mul_(1 - part_u).add_(_cell(low_u + 1, row).mul_(part_u)) for row in (low_v, low_v + 1)
    )
    return low.mul_(1 - part_v).add_(high.mul_(part_v))


OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: _length(x, y) - 0.85,
    "ring": lambda x, y: (_length(x, y) - 0.68).abs() - 0.24,
    "crescent": lambda x, y: torch.maximum(_length(x, y) - 0.95, 0.78 - _length(x - 0.45, y)),
    "half disc": lambda x, y: torch.maximum(_length(x, y + 0.45) - 1.0, -0.45 - y),
    "triangle": lambda x, y: torch.maximum(x.abs() * (3**0.5 / 2) + y * 0.5, -y) - 0.52,
    "square": lambda x, y: _box(x, y, 0.74, 0.74),
    "bar": lambda x, y: _box(x, y, 0.98, 0.34),
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.95, 0.28), _box(x, y, 0.28, 0.95)),
    "star": _star,
    "heart": _heart,
    "corner": lambda x, y: torch.minimum(_box(x + 0.52, y, 0.28, 0.85), _box(x, y + 0.57, 0.8, 0.28)),
    "arrow": _arrow,
}
PATTERNS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "stripes": lambda u, v, sharp: _edge(_near(u).sub_(0.25), sharp),
    "zigzag": lambda u, v, sharp: _edge(_near(u + _near(v * 0.6).mul_(1.7)).sub_(0.25), sharp),
    "checks": lambda u, v, sharp: _edge(_near(u * 0.7).sub_(0.25).mul_(_near(v * 0.7).sub_(0.25)).mul_(5), sharp),
    "lattice": lambda u, v, sharp: _edge(0.15 - torch.minimum(_near(u), _near(v)), sharp),
    "plaid": lambda u, v, sharp: _edge(_near(u).sub_(0.25), sharp).add_(_edge(_near(v).sub_(0.25), sharp)).mul_(0.5),
    "dots": lambda u, v, sharp: _edge(0.32 - _length(_near(u), _near(v)), sharp),
    "rings": lambda u, v, sharp: _edge(_near(_length(u, v)).sub_(0.25), sharp),
    "bricks": _bricks,
    "mosaic": lambda u, v, sharp: _cell((u * 1.4).floor_(), (v * 1.4).floor_()),
    "clouds": _clouds,
}
SHAPES = tuple(OUTLINES)
TEXTURES = tuple(PATTERNS)


def shape_label(ids: Tensor, seed: int = 0) -> Tensor:
    """Which of SHAPES is the object: b -> b."""
    return rng.integers(rng.key(seed, "shapes", "shape", ids), len(SHAPES))


def texture_label(ids: Tensor, seed: int = 0) -> Tensor:
    """Which of TEXTURES the ground has: b -> b."""
    return rng.integers(rng.key(seed, "shapes", "texture", ids), len(TEXTURES))


def make(ids: Tensor, size: int, seed: int = 0, colors_of: Tensor | None = None) -> Tensor:
    """The images of these ids, as uint8: b -> b 3 size size. colors_of: the shape whose colour each object has, b, by
    default its own; all else stays the same."""
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError(f"ids are a vector of int64, not {ids.dtype} of shape {tuple(ids.shape)}")
    if size < 8:
        raise ValueError(f"size {size} is below 8 pixels, where shapes are indistinguishable")
    images = torch.empty(len(ids), 3, size, size, dtype=torch.uint8, device=ids.device)
    piece = max(1, PIXELS // size**2)
    colors_of = shape_label(ids, seed) if colors_of is None else colors_of
    for start in range(0, len(ids), piece):
        some = slice(start, start + piece)
        _render(ids[some], size, seed, colors_of[some], images[some])
    return images


def between(key: Tensor, name: str, low: float, high: float, *shape: int) -> Tensor:
    return rng.uniform(rng.fold(key, name), *shape).mul_(high - low).add_(low)


def turned(key: Tensor, name: str, turns: float = 1.0) -> tuple[Tensor, Tensor]:
    """A random direction out of so many turns around upright: b -> b, b (cosine, sine)."""
    count = round(turns * len(DIRECTIONS))
    index = (rng.integers(rng.fold(key, name), count) - count // 2) % len(DIRECTIONS)
    return DIRECTIONS.to(key.device)[index].unbind(1)


def plane(line: Tensor, center: Tensor, along_x: Tensor, along_y: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """A linear function over the image, (x - centre) . (along_x, along_y) + offset: b -> b size size."""
    column = (line - center[:, 0, None]) * along_x[:, None]
    row = (line - center[:, 1, None]) * along_y[:, None]
    if isinstance(offset, Tensor):
        row = row + offset[:, None]
    return row[:, :, None] + column[:, None, :]


def texture(key: Tensor, name: str, labels: Tensor, line: Tensor, center: Tensor, low: float, high: float) -> Tensor:
    """How much of its second colour a texture shows at each pixel: b size size in [0, 1]."""
    cosine, sine = turned(key, name + " rotation")
    cycles = between(key, name + " frequency", low, high)  # per unit, that is per half image
    phase = between(key, name + " phase", -0.5, 0.5, 2)
    values = line.new_empty(len(labels), len(line), len(line))
    for index, (texture, pattern) in enumerate(PATTERNS.items()):
        rows = (labels == index).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        # The mosaic and the clouds must start elsewhere in each image; the rings stay around the object.
        start = phase[rows] * (1 if texture == "rings" else 1000)
        along_x, along_y, middle = cosine[rows] * cycles[rows], sine[rows] * cycles[rows], center[rows]
        u = plane(line, middle, along_x, along_y, start[:, 0])
        v = plane(line, middle, -along_y, along_x, start[:, 1])
        values[rows] = pattern(u, v, (len(line) / 2 / cycles[rows])[:, None, None])
    return values


def outline_distance(
    labels: Tensor, line: Tensor, center: Tensor, direction: tuple[Tensor, Tensor], scale: Tensor, stretch: Tensor
) -> Tensor:
    """How far each pixel is from the outline of one shape, negative inside, in units of half an image: b size size"""
    cosine, sine = direction
    distance = line.new_empty(len(labels), len(line), len(line))
    for index, outline in enumerate(OUTLINES.values()):
        rows = (labels == index).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        along_x, along_y, middle = cosine[rows] / scale[rows], sine[rows] / scale[rows], center[rows]
        x = plane(line, middle, along_x * stretch[rows], along_y * stretch[rows])
        y = plane(line, middle, -along_y / stretch[rows], along_x / stretch[rows])
        distance[rows] = outline(x, y).mul_(scale[rows, None, None])
    return distance


def _render(ids: Tensor, size: int, seed: int, colors_of: Tensor, out: Tensor) -> None:
    key = rng.key(seed, "shapes", "scene", ids)
    line = (torch.arange(size, device=ids.device, dtype=torch.float32) + 0.5) * (2 / size) - 1

    # Where the object is, and its outline as a distance in units of the image.
    scale = between(key, "scale", 0.5, 0.8)
    stretch = between(key, "stretch", 0.85, 1.2)
    center = between(key, "position", -1, 1, 2) * (1 - scale)[:, None]
    cosine, sine = turned(key, "rotation", turns=0.25)
    labels = shape_label(ids, seed)
    distance = outline_distance(labels, line, center, (cosine, sine), scale, stretch)

    # Colours: a kind of object tends to a colour, as things do, and varies around it as far as its neighbours'; the
    # ground's is free. Where the object's is free too, colours are all that a small model learns in minutes, and they
    # say nothing of the kind.
    ground_color = between(key, "ground colour", 0.0, 0.6, 3, 1)
    object_color = SHAPE_COLORS.to(ids.device)[colors_of, :, None] + between(key, "tint", -0.25, 0.25, 3, 1)
    colors = torch.cat([ground_color, object_color], dim=2).clamp_(0, 1)
    others = rng.uniform(rng.fold(key, "second colour"), 3, 2)
    contrast = between(key, "contrast", 0.1, 0.3, 1, 2) * torch.tensor([2.0, 1.0], device=ids.device)
    differences = (others - colors) * contrast

    ground = texture(key, "ground", texture_label(ids, seed), line, torch.zeros_like(center), 1.2, 2.0)
    worn = rng.integers(rng.fold(key, "object texture"), len(TEXTURES))
    worn = texture(key, "object", worn, line, center, 1.8, 3.2)

    # Light: a slope over the whole scene; the object is domed, and darkens the ground where it stands on it.
    slope = between(key, "light", -0.35, 0.35, 2)
    light = plane(line, torch.zeros_like(center), slope[:, 0], slope[:, 1], between(key, "exposure", 0.7, 1.1))
    dome, shadow = between(key, "dome", 0, 0.5)[:, None, None], between(key, "shadow", 0, 0.6)[:, None, None]
    inside = (distance * (-size / 2)).add_(0.5).clamp_(0, 1)
    bright = (distance * -4).clamp_(0, 1).mul_(dome).add_(0.75).mul_(inside).mul_(light)
    dim = distance.mul_(-5).add_(1).clamp_(0, 1).mul_(-shadow).add_(1).mul_(inside.neg_().add_(1)).mul_(light)
    # Four weights for four colours, so that a channel costs four multiplications.
    weights = (dim, ground.mul_(dim), bright, worn.mul_(bright))
    total, part = torch.empty_like(light), torch.empty_like(light)
    for channel in range(3):
        paints = torch.stack([colors, differences], dim=-1)[:, channel].flatten(1) * 255
        torch.mul(weights[0], paints[:, 0, None, None], out=total)
        for layer in range(1, 4):
            total += torch.mul(weights[layer], paints[:, layer, None, None], out=part)
        out[:, channel] = total.add_(0.5).clamp_(0, 255)
