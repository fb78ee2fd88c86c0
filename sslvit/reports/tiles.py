"""Small pictures of one size in rows, each below its name, drawn so that the names can be read on a phone."""

from math import ceil

import numpy as np
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK = (40, 40, 40)
TEXT = 13  # pixels of letters
GAP = 4  # white pixels between tiles
TILE = 128  # pixels of an image's shorter side, or up to twice as many: images are enlarged in whole multiples
ACROSS = 5  # tiles of a row at most
NARROW = 360  # pixels of a picture on a phone: the letters of a wider one grow with it

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Named = tuple[str, np.ndarray | Image.Image]


def tiled(rows: list[list[Named]], size: tuple[int, int], title: str = "") -> Image.Image:
    """size: width and height of a tile. A row has no names where they are those of the row above."""
    width = max(map(len, rows)) * (size[0] + GAP) + GAP
    font, line = font_for(width)
    top = wrapped(title, font, width - 2 * GAP) if title else []
    names = [[wrapped(name, font, size[0]) for name, _ in row] for row in rows]
    drawn = [i == 0 or row != names[i - 1] for i, row in enumerate(names)]
    heads = [max(map(len, row)) * line + 6 if new else 0 for row, new in zip(names, drawn, strict=True)]
    above = len(top) * line + (8 if top else 0)
    sheet = Image.new("RGB", (width, above + sum(heads) + len(rows) * (size[1] + GAP)), "white")
    draw, y = ImageDraw.Draw(sheet), above
    write(draw, (GAP, 4), top, font, line, "la")
    for row, texts, head in zip(rows, names, heads, strict=True):
        for column, ((_, picture), lines) in enumerate(zip(row, texts, strict=True)):
            left = GAP + column * (size[0] + GAP)
            if head:
                place = (left + size[0] / 2, y + head - 3 - len(lines) * line)
                write(draw, place, lines, font, line, "ma")
            sheet.paste(enlarged(picture, size), (left, y + head))
        y += head + size[1] + GAP
    return sheet


def in_rows(tiles: list[Named]) -> list[list[Named]]:
    """As few rows as there can be, of about the same length."""
    across = ceil(len(tiles) / ceil(len(tiles) / ACROSS))
    return [tiles[first : first + across] for first in range(0, len(tiles), across)]


def tile_size(height: int, width: int) -> tuple[int, int]:
    """Width and height of a tile that shows an image of this height and width."""
    least = min(height, width)
    times = 1 / (least // TILE) if least >= TILE else ceil(TILE / least)
    return round(width * times), round(height * times)


def enlarged(picture: np.ndarray | Image.Image, size: tuple[int, int]) -> Image.Image:
    """Enlarged pixels stay squares: there is no more detail than a map's patches or a small image's pixels."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return picture.resize(size, Image.Resampling.NEAREST if picture.height <= size[1] else Image.Resampling.LANCZOS)


def rgb(images: Tensor) -> np.ndarray:
    """b c h w from 0 to 1 -> b h w 3, uint8; of other than three channels the first, in grey."""
    if images.shape[1] != 3:
        images = repeat(images[:, :1], "b 1 h w -> b c h w", c=3)
    return rearrange((images.float().cpu() * 255).round().clamp(0, 255).byte().numpy(), "b c h w -> b h w c")


def font_for(width: int) -> tuple[Font, int]:
    """The letters of a picture of this width, and the height of a line."""
    size = round(TEXT * max(1, width / NARROW))
    return ImageFont.load_default(size), round(1.25 * size)


def wrapped(text: str, font: Font, width: float) -> list[str]:
    """Lines of whole words."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def write(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], lines: list[str], font: Font, line: int, anchor: str
) -> None:
    for i, text in enumerate(lines):
        draw.text((place[0], place[1] + i * line), text, INK, font, anchor)
