"""Pictures of what analysis.py finds.

Drawn with Pillow and NumPy alone, so that the package needs no plotting library.
"""

from math import ceil, floor

import numpy as np
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Five stops of a scale whose brightness rises evenly, dark blue to yellow: it reads in grey and by the colour-blind.
STOPS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
INK = (40, 40, 40)
TEXT = 13  # pixels of letters
GAP = 4  # white pixels between tiles
TILE = 128  # pixels that the shorter side of an image is shown with, or up to twice as many: in whole multiples


def heat(values: np.ndarray) -> np.ndarray:
    """Colours of values from 0 to 1: ... -> ... 3, uint8"""
    places = np.linspace(0, 1, len(STOPS))
    return np.stack([np.interp(values, places, STOPS[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def filter_sheet(components: Tensor, columns: int = 7) -> Image.Image:
    """Filters n p q c from 0 to 1, row by row, the first one top left. Each weight is a square of pixels."""
    n, p, q, _ = components.shape
    cell = max(1, 64 // max(p, q))
    sheet = Image.new("RGB", (columns * (q * cell + GAP) + GAP, ceil(n / columns) * (p * cell + GAP) + GAP), "white")
    for i, tile in enumerate(_rgb(rearrange(components, "n p q c -> n c p q"))):
        row, column = divmod(i, columns)
        place = GAP + column * (q * cell + GAP), GAP + row * (p * cell + GAP)
        sheet.paste(_enlarged(tile, cell), place)
    return sheet


def similarity_tiles(similarity: Tensor, least: float | None = None) -> Image.Image:
    """A tile for each patch, which shows the cosine similarity of its position with those of all patches, gh gw gh gw.

    Colours go from `least` to 1, by default from the least there is, rounded down to a tenth; the paper's go from -1.
    Of more than 16 patches in a direction the tiles of 16, evenly spaced, are shown.
    """
    gh, gw = similarity.shape[:2]
    least = min(floor(10 * float(similarity.min())) / 10, 0.9) if least is None else least
    rows, columns = (np.unique(np.linspace(0, size - 1, 16).round().astype(int)) for size in (gh, gw))
    cell = min(max(900 // (max(len(rows), len(columns)) * max(gh, gw)), 1), 24)
    high, wide = gh * cell + GAP, gw * cell + GAP
    left, top, bar = 54, 46, 92
    size = left + len(columns) * wide + bar, top + max(len(rows) * high, 120) + 12
    sheet, font = Image.new("RGB", size, "white"), _font(TEXT)
    draw = ImageDraw.Draw(sheet)
    colours = heat((similarity.double().numpy() - least) / (1 - least))
    for r, i in enumerate(rows):
        for c, j in enumerate(columns):
            sheet.paste(_enlarged(colours[i, j], cell), (left + c * wide, top + r * high))
    for c, j in _spaced(columns, wide, 24):
        draw.text((left + c * wide + gw * cell / 2, top - 5), f"{j + 1}", INK, font, "ms")
    for r, i in _spaced(rows, high, 16):
        draw.text((left - 6, top + r * high + gh * cell / 2), f"{i + 1}", INK, font, "rm")
    draw.text((left + len(columns) * wide / 2, 14), "column of the patch", INK, font, "mm")
    _upright(sheet, "row of the patch", font, (16, top + len(rows) * high // 2))
    right, length = left + len(columns) * wide + 14, size[1] - top - 12 - GAP
    sheet.paste(Image.fromarray(repeat(heat(np.linspace(1, 0, length)), "h c -> h w c", w=14)), (right, top))
    for share in (0, 0.5, 1):
        words = f"{least + share * (1 - least):.2g}"
        draw.text((right + 20, top + (1 - share) * (length - 1)), words, INK, font, "lm")
    _upright(sheet, "cosine similarity", font, (right + 66, top + length // 2))
    return sheet


def attention_sheet(images: Tensor, maps: dict[str, Tensor], over: bool = True) -> Image.Image:
    """Images b c H W from 0 to 1, a row each, and maps b gh gw of them by name, a column each.

    A map is shown from 0, dark, to its greatest value: one that is nearly even looks even. `over` puts beside it the
    image multiplied by the map, interpolated and divided by its greatest value, as in the ViT paper.
    """
    shown = _rgb(images)
    (height, width), columns = shown.shape[1:3], {"image": shown}
    for name, values in maps.items():
        values = values.float().cpu()
        shares = values / values.amax((1, 2), keepdim=True).clamp_min(1e-12)
        columns[name] = heat(shares.numpy())
        if over:
            fine = F.interpolate(rearrange(shares, "b h w -> b 1 h w"), (height, width), mode="bilinear")
            columns[f"{name} on image"] = (
                (shown * rearrange(fine, "b 1 h w -> b h w 1").numpy()).round().astype(np.uint8)
            )
    least = min(height, width)
    times = 1 / (least // TILE) if least >= TILE else ceil(TILE / least)
    size = round(width * times), round(height * times)
    font, heading = _font(TEXT), TEXT + 10
    sheet = Image.new("RGB", (len(columns) * (size[0] + GAP) + GAP, heading + len(shown) * (size[1] + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, tiles) in enumerate(columns.items()):
        left = GAP + column * (size[0] + GAP)
        draw.text((left + size[0] / 2, heading / 2), name, INK, font, "mm")
        for row, tile in enumerate(tiles):
            # Enlarged pixels stay squares: a map has no more than its patches, nor a small image than its pixels.
            how = Image.Resampling.NEAREST if tile.shape[0] <= size[1] else Image.Resampling.LANCZOS
            sheet.paste(Image.fromarray(tile).resize(size, how), (left, heading + row * (size[1] + GAP)))
    return sheet


def _rgb(images: Tensor) -> np.ndarray:
    """b c h w from 0 to 1 -> b h w 3, uint8; of other than three channels the first is shown, in grey."""
    if images.shape[1] != 3:
        images = repeat(images[:, :1], "b 1 h w -> b c h w", c=3)
    return rearrange((images.float().cpu() * 255).round().clamp(0, 255).byte().numpy(), "b c h w -> b h w c")


def _enlarged(pixels: np.ndarray, times: int) -> Image.Image:
    return Image.fromarray(repeat(pixels, "h w c -> (h y) (w x) c", y=times, x=times))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _upright(
    picture: Image.Image, words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, centre: tuple[int, int]
) -> None:
    left, top, right, bottom = font.getbbox(words)
    strip = Image.new("L", (ceil(right - left) + 2, ceil(bottom - top) + 2))
    ImageDraw.Draw(strip).text((1 - left, 1 - top), words, 255, font)
    strip = strip.rotate(90, expand=True)
    picture.paste(INK, (centre[0] - strip.width // 2, centre[1] - strip.height // 2), strip)


def _spaced(labels: np.ndarray, apart: float, room: float) -> list[tuple[int, int]]:
    """Of labels that stand so far apart those that have room, with their places."""
    every = ceil(room / apart)
    return [(i, int(label)) for i, label in enumerate(labels) if i % every == 0]
