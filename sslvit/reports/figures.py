"""Figures of evaluate/analysis.py's results and of a confusion matrix, drawn with Pillow and NumPy."""

from math import ceil, floor
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sslvit.reports.tiles import GAP, INK, TEXT, rgb, tile_size, tiled
from sslvit.storage import durable

# A color scale from dark blue to yellow whose brightness rises evenly: readable in grey and with color blindness.
STOPS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
RIGHT, WRONG = np.array([33, 102, 172]), np.array([178, 24, 43])  # distinct with color blindness too
LONGEST = 18  # characters of a class's name
LARGEST = 1200  # pixels of a confusion matrix, if each cell can have a pixel


def heat(values: np.ndarray) -> np.ndarray:
    """Colors of values from 0 to 1: ... -> ... 3, uint8"""
    places = np.linspace(0, 1, len(STOPS))
    return np.stack([np.interp(values, places, STOPS[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def filter_sheet(components: Tensor, columns: int = 7) -> Image.Image:
    """Filters n p q c from 0 to 1, row by row, the first one top left. Each weight is a square of pixels."""
    n, p, q, _ = components.shape
    cell = max(1, 64 // max(p, q))
    tiles = np.full((columns * ceil(n / columns), p, q, 3), 255, np.uint8)
    tiles[:n] = rgb(rearrange(components, "n p q c -> n c p q"))
    sheet = np.pad(
        _grid(rearrange(tiles, "(r c) p q k -> r c p q k", c=columns), cell),
        ((GAP, 0), (GAP, 0), (0, 0)),
        constant_values=255,
    )
    return Image.fromarray(sheet)


def similarity_tiles(similarity: Tensor, least: float | None = None) -> Image.Image:
    """A tile for each patch: the cosine similarity of its position with those of all patches, gh gw gh gw.

    Colors go from `least` to 1, by default from the least similarity, rounded down to a tenth; the paper's go from -1.
    Of more than 16 patches in a direction the tiles of 16, evenly spaced, are shown.
    """
    gh, gw = similarity.shape[:2]
    least = min(floor(10 * float(similarity.min())) / 10, 0.9) if least is None else least
    rows, columns = (np.unique(np.linspace(0, size - 1, 16).round().astype(int)) for size in (gh, gw))
    cell = min(max(700 // (max(len(rows), len(columns)) * max(gh, gw)), 1), 24)
    high, wide = gh * cell + GAP, gw * cell + GAP
    k = max(1, len(columns) * wide / 300)  # the letters of a wide picture can be read on a phone too
    left, top, bar = (round(k * pixels) for pixels in (54, 46, 92))
    size = left + len(columns) * wide + bar, top + max(len(rows) * high, 120) + round(12 * k)
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(round(k * TEXT))
    draw = ImageDraw.Draw(sheet)
    colors = heat((similarity.double().numpy() - least) / (1 - least))
    sheet.paste(Image.fromarray(_grid(colors[np.ix_(rows, columns)], cell)), (left, top))
    for c, j in _spaced(columns, wide, 24 * k):
        draw.text((left + c * wide + gw * cell / 2, top - 5 * k), f"{j + 1}", INK, font, "ms")
    for r, i in _spaced(rows, high, 16 * k):
        draw.text((left - 6 * k, top + r * high + gh * cell / 2), f"{i + 1}", INK, font, "rm")
    draw.text((left + len(columns) * wide / 2, 14 * k), "column of the patch", INK, font, "mm")
    _upright(sheet, "row of the patch", font, (round(16 * k), top + len(rows) * high // 2))
    right, length = left + len(columns) * wide + round(14 * k), size[1] - top - round(12 * k) - GAP
    sheet.paste(Image.fromarray(repeat(heat(np.linspace(1, 0, length)), "h c -> h w c", w=round(14 * k))), (right, top))
    for share in (0, 0.5, 1):
        value = f"{least + share * (1 - least):.2g}"
        draw.text((right + 20 * k, top + (1 - share) * (length - 1)), value, INK, font, "lm")
    _upright(sheet, "cosine similarity", font, (right + round(66 * k), top + length // 2))
    return sheet


def attention_sheet(images: Tensor, maps: dict[str, Tensor], over: bool = True) -> Image.Image:
    """Images b c H W from 0 to 1, a row each, and maps b gh gw of them by name, a column each.

    A map is drawn from 0, dark, to its greatest value: one that is nearly even looks even. `over` adds the image
    multiplied by the map, interpolated and divided by its greatest value, as in the ViT paper.
    """
    shown = rgb(images)
    (height, width), columns = shown.shape[1:3], {"image": shown}
    for name, values in maps.items():
        values = values.float().cpu()
        shares = values / values.amax((1, 2), keepdim=True).clamp_min(1e-12)
        columns[name] = heat(shares.numpy())
        if over:
            fine = F.interpolate(rearrange(shares, "b h w -> b 1 h w"), (height, width), mode="bilinear")
            product = shown * rearrange(fine, "b 1 h w -> b h w 1").numpy()
            columns[f"{name} on image"] = product.round().astype(np.uint8)
    rows = [[(name, tiles[i]) for name, tiles in columns.items()] for i in range(len(shown))]
    return tiled(rows, tile_size(height, width))


def draw_confusion(counts: Tensor, classes: tuple[str, ...] | None, file: Path) -> None:
    """counts: i j, images of class i that were predicted as j. A row is a class, a column a prediction; the darker a
    cell, the larger its share of the row."""
    size = len(counts)
    names = [str(name)[:LONGEST] for name in classes or range(size)]
    cell = min(max(LARGEST // size, 1), 36)
    named, font = cell >= 12, ImageFont.load_default(min(max(cell - 4, 8), 13))
    margin = 12 + max(int(font.getlength(name)) for name in names) if named else 8
    share = counts.double().numpy() / np.maximum(counts.sum(1, keepdim=True).numpy(), 1)
    ink = np.where(np.eye(size, dtype=bool)[..., None], RIGHT, WRONG)
    pixels = (255 - share[..., None] ** 0.5 * (255 - ink)).astype(np.uint8)  # the root shows rare mistakes
    side = margin + size * cell + 8
    picture = Image.new("RGB", (side, side), "white")
    picture.paste(_enlarged(pixels, cell), (margin, margin))
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names if named else []):
        middle = margin + row * cell + cell // 2
        draw.text((margin - 6, middle), name, INK, font, "rm")
        _upright(picture, name, font, (middle, margin - 6 - int(font.getlength(name)) // 2))
        for column in range(size if cell >= 30 else 0):
            if count := int(counts[row, column]):
                color = "white" if share[row, column] > 0.3 else "black"
                draw.text((margin + column * cell + cell // 2, middle), f"{count}", color, font, "mm")
    durable.replace_picture(file, picture)


def _enlarged(pixels: np.ndarray, times: int) -> Image.Image:
    return Image.fromarray(repeat(pixels, "h w c -> (h y) (w x) c", y=times, x=times))


def _grid(tiles: np.ndarray, times: int) -> np.ndarray:
    """Tiles r c h w 3 in rows and columns, enlarged, each with a gap to the right and below."""
    enlarged = repeat(tiles, "r c h w k -> r c (h y) (w x) k", y=times, x=times)
    padded = np.pad(enlarged, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    return rearrange(padded, "r c h w k -> (r h) (c w) k")


def _upright(
    picture: Image.Image, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, center: tuple[int, int]
) -> None:
    left, top, right, bottom = font.getbbox(text)
    strip = Image.new("L", (ceil(right - left) + 2, ceil(bottom - top) + 2))
    ImageDraw.Draw(strip).text((1 - left, 1 - top), text, 255, font)
    strip = strip.rotate(90, expand=True)
    picture.paste(INK, (center[0] - strip.width // 2, center[1] - strip.height // 2), strip)


def _spaced(labels: np.ndarray, apart: float, room: float) -> list[tuple[int, int]]:
    """The labels that have room, with their places, of labels that are so far apart."""
    every = ceil(room / apart)
    return [(i, int(label)) for i, label in enumerate(labels) if i % every == 0]
