"""Pictures of what analysis.py finds: Pillow images, and the plot of attention distances as SVG too.

Drawn with Pillow and NumPy alone, so that the package needs no plotting library.
"""

from html import escape
from math import ceil, floor, log10
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Five stops of a scale whose brightness rises evenly, dark blue to yellow: it reads in grey and by the colour-blind.
STOPS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
SERIES = ((150, 150, 150), (33, 102, 172), (178, 24, 43), (77, 146, 33))  # colours of a plot's series, in order
INK, FAINT = (40, 40, 40), (225, 225, 225)
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


class Mark(NamedTuple):
    """A line, a dot or words, for the two renderers below."""

    kind: str  # line, dashes, dot, words
    x: float
    y: float
    to: tuple[float, float] = (0, 0)
    colour: tuple[int, int, int] = INK
    words: str = ""
    anchor: str = "middle"  # of words: start, middle, end; or upright, in the middle


SIZE, LEFT, RIGHT, TOP, BOTTOM = (640, 420), 62, 622, 40, 366


def distance_marks(series: dict[str, Tensor], spread_evenly: float) -> list[Mark]:
    """Attention distances in pixels, l k each, by name: a dot a head, and a dashed line for attention that is spread
    evenly over the image. Series stand side by side in each layer."""
    depth = max(len(distances) for distances in series.values())
    largest = max(1.0, spread_evenly, *(float(distances.max()) for distances in series.values()))
    step = _step(largest, 6)
    top = step * ceil(largest * 1.02 / step)
    column = (RIGHT - LEFT) / depth

    def height(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * value / top

    marks = []
    for tick in np.arange(0, top + step / 2, step):
        marks.append(Mark("line", LEFT, height(tick), (RIGHT, height(tick)), FAINT))
        marks.append(Mark("words", LEFT - 8, height(tick), words=f"{tick:.10g}", anchor="end"))
    for layer, _ in _spaced(np.arange(depth), column, 26):
        marks.append(Mark("words", LEFT + (layer + 0.5) * column, BOTTOM + 16, words=f"{layer + 1}"))
    marks.append(Mark("line", LEFT, BOTTOM, (RIGHT, BOTTOM)))
    marks.append(Mark("dashes", LEFT, height(spread_evenly), (RIGHT, height(spread_evenly))))
    apart = min(column / (len(series) + 1), 16)
    for i, (name, distances) in enumerate(series.items()):
        colour, aside = SERIES[i % len(SERIES)], (i - (len(series) - 1) / 2) * apart
        for layer, heads in enumerate(distances.tolist()):
            x = LEFT + (layer + 0.5) * column + aside
            marks += [Mark("dot", x, height(head), colour=colour) for head in heads]
        marks.append(Mark("dot", LEFT + 8 + 140 * i, 18, colour=colour))
        marks.append(Mark("words", LEFT + 18 + 140 * i, 18, words=name, anchor="start"))
    legend = LEFT + 8 + 140 * len(series)
    marks.append(Mark("dashes", legend - 6, 18, (legend + 18, 18)))
    marks.append(Mark("words", legend + 26, 18, words="attention spread evenly", anchor="start"))
    marks.append(Mark("words", (LEFT + RIGHT) / 2, SIZE[1] - 14, words="layer"))
    marks.append(Mark("words", 16, (TOP + BOTTOM) / 2, words="mean attention distance, pixels", anchor="upright"))
    return marks


def distance_svg(series: dict[str, Tensor], spread_evenly: float) -> str:
    width, height = SIZE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="{TEXT}" fill="rgb{INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for mark in distance_marks(series, spread_evenly):
        x, y = f"{mark.x:.2f}", f"{mark.y:.2f}"
        if mark.kind == "dot":
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="rgb{mark.colour}" fill-opacity="0.7"/>')
        elif mark.kind == "words":
            turn = f' transform="rotate(-90 {x} {y})"' if mark.anchor == "upright" else ""
            anchor = "middle" if mark.anchor == "upright" else mark.anchor
            words = f'text-anchor="{anchor}" dominant-baseline="central"{turn}>{escape(mark.words)}'
            parts.append(f'<text x="{x}" y="{y}" {words}</text>')
        else:
            dashes = ' stroke-dasharray="6 4"' if mark.kind == "dashes" else ""
            ends = f'x1="{x}" y1="{y}" x2="{mark.to[0]:.2f}" y2="{mark.to[1]:.2f}"'
            parts.append(f'<line {ends} stroke="rgb{mark.colour}"{dashes}/>')
    return "\n".join([*parts, "</svg>\n"])


def distance_picture(series: dict[str, Tensor], spread_evenly: float) -> Image.Image:
    """The same, at twice as many pixels."""
    fine = 4  # drawn at this scale and halved: Pillow's own lines and circles have steps
    picture = Image.new("RGB", (SIZE[0] * fine, SIZE[1] * fine), "white")
    draw, font = ImageDraw.Draw(picture, "RGBA"), _font(TEXT * fine)
    for mark in distance_marks(series, spread_evenly):
        x, y, (to_x, to_y) = mark.x * fine, mark.y * fine, (mark.to[0] * fine, mark.to[1] * fine)
        if mark.kind == "dot":
            draw.circle((x, y), 4 * fine, (*mark.colour, 178))
        elif mark.kind == "words" and mark.anchor == "upright":
            _upright(picture, mark.words, font, (int(x), int(y)))
        elif mark.kind == "words":
            draw.text((x, y), mark.words, INK, font, {"start": "lm", "middle": "mm", "end": "rm"}[mark.anchor])
        elif mark.kind == "line":
            draw.line((x, y, to_x, to_y), mark.colour, fine)
        else:
            for start in np.arange(x, to_x, 10 * fine):
                draw.line((start, y, min(start + 6 * fine, to_x), y), mark.colour, fine)
    return picture.resize((SIZE[0] * 2, SIZE[1] * 2), Image.Resampling.LANCZOS)


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


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _upright(picture: Image.Image, words: str, font: ImageFont.FreeTypeFont, centre: tuple[int, int]) -> None:
    left, top, right, bottom = font.getbbox(words)
    strip = Image.new("L", (ceil(right - left) + 2, ceil(bottom - top) + 2))
    ImageDraw.Draw(strip).text((1 - left, 1 - top), words, 255, font)
    strip = strip.rotate(90, expand=True)
    picture.paste(INK, (centre[0] - strip.width // 2, centre[1] - strip.height // 2), strip)


def _spaced(labels: np.ndarray, apart: float, room: float) -> list[tuple[int, int]]:
    """Of labels that stand so far apart those that have room, with their places."""
    every = ceil(room / apart)
    return [(i, int(label)) for i, label in enumerate(labels) if i % every == 0]


def _step(largest: float, count: int) -> float:
    """1, 2 or 5 times a power of ten, of which about so many reach the largest value."""
    power = 10.0 ** floor(log10(largest / count))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * count >= largest)
