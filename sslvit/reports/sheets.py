"""Pictures of evaluate/seen.py's results, and of attention by head."""

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from sslvit.evaluate.seen import ImageMap, NearestPatches, PatchColors
from sslvit.models.positions import Grid
from sslvit.reports.figures import LONGEST, heat
from sslvit.reports.tiles import INK, Font, Named, enlarged, font_for, in_rows, rgb, tile_size, tiled, wrapped, write

SIDE, MARGIN = 720, 44  # pixels of a map of images, and of its edge
THUMB, DOT, EDGE = 52, 7, 4  # pixels of an image on it, of a dot's radius, and of a frame
NAMED = 12  # classes, each with a color of its own; more have none
COLORS = (
    (228, 26, 28), (30, 110, 200), (60, 170, 70), (255, 215, 0), (120, 40, 150), (255, 130, 20), (60, 220, 230),
    (245, 80, 210), (130, 75, 30), (0, 110, 110), (150, 150, 150), (255, 180, 190),
)  # fmt: skip


def patch_sheet(images: Tensor, seen: PatchColors, grid: Grid) -> Image.Image:
    """Images b c H W, the first of those that were seen, beside the colors of their patches."""
    columns = {"image": rgb(images)}
    for name, colors in {"components 1 to 3": seen.colors, "foreground": seen.foreground_colors}.items():
        columns[name] = rgb(rearrange(colors[: len(images)], "b (h w) c -> b c h w", h=grid[0]))
    rows: list[list[Named]] = [[(name, tiles[i]) for name, tiles in columns.items()] for i in range(len(images))]
    return tiled(rows, tile_size(*images.shape[2:]), "Patches: principal components, one basis for all images")


def head_sheet(images: Tensor, last: Tensor, whose: str) -> Image.Image:
    """Images b c H W, and the last block's attention to their patches, b k gh gw, by head.

    Each map is drawn from 0, dark, to its greatest value: one that is nearly even looks even."""
    last = last[: len(images)]
    shares = heat((last / last.amax((2, 3), keepdim=True).clamp_min(1e-12)).float().cpu().numpy())
    rows: list[list[Named]] = []
    for image, maps in zip(rgb(images), shares, strict=True):
        tiles: list[Named] = [("image", image), *((f"head {head}", one) for head, one in enumerate(maps, start=1))]
        rows += in_rows(tiles)
    return tiled(rows, tile_size(*images.shape[2:]), f"What {whose} to in the last block")


def nearest_sheet(images: Tensor, chosen: int, nearest: NearestPatches, grid: Grid) -> Image.Image:
    """Images b c H W: that of the chosen patch, by its number on the grid, and then those of the nearest. Each patch is
    framed."""
    size = tile_size(*images.shape[2:])
    names = ["chosen", *(f"cosine {cosine:.2f}" for cosine in nearest.cosines.tolist())]
    tiles: list[Named] = []
    for name, image, patch in zip(names, rgb(images), [chosen, *nearest.patches.tolist()], strict=True):
        tile = enlarged(image, size)
        frame(tile, divmod(patch, grid[1]), grid)
        tiles.append((name, tile))
    row, column = (place + 1 for place in divmod(chosen, grid[1]))
    title = f"The patch in row {row}, column {column}, and the most similar one of each other image"
    return tiled(in_rows(tiles), size, title)


def frame(tile: Image.Image, place: tuple[int, int], grid: Grid) -> None:
    """Around a patch, not over it, in two colors, one of which differs from what is there."""
    (row, column), (high, wide) = place, (tile.height / grid[0], tile.width / grid[1])
    box = [round(column * wide), round(row * high), round((column + 1) * wide) - 1, round((row + 1) * high) - 1]
    thick, draw = max(2, tile.width // 64), ImageDraw.Draw(tile)
    for out, color in ((2 * thick, "black"), (thick, (255, 60, 60))):
        draw.rectangle([box[0] - out, box[1] - out, box[2] + out, box[3] + out], outline=color, width=thick)


def map_sheet(
    made: ImageMap, thumbs: Tensor, labels: Tensor | None, classes: tuple[str, ...] | None = None
) -> Image.Image:
    """Images as points, in the colors of their labels if these are few. Where there is room, the image itself: b c h w.

    Both axes have the same scale."""
    present = [] if labels is None else labels.unique().tolist()
    named = 0 < len(present) <= NAMED
    colors = dict(zip(present, COLORS, strict=False)) if named else {}
    inks = [colors.get(label, INK) for label in ([-1] * len(thumbs) if labels is None else labels.tolist())]
    font, line = font_for(SIDE)
    title = wrapped(f"{len(thumbs):,} images: {made.method}", font, SIDE - 16)
    names = {str(classes[label] if classes else label)[:LONGEST]: color for label, color in colors.items()}
    entries = legend(names, font, line)
    top, bottom = 12 + len(title) * line, entries[-1][1] + line + 12 if entries else 0
    sheet = Image.new("RGB", (SIDE, top + SIDE + bottom), "white")
    draw = ImageDraw.Draw(sheet)
    write(draw, (8, 6), title, font, line, "la")
    draw.rectangle([0, top, SIDE - 1, top + SIDE - 1], outline=(208, 215, 222), width=2)
    places = on_square(made.points) + np.array([0, top])
    wide, high = (round(THUMB * side / max(thumbs.shape[2:])) for side in thumbs.shape[:1:-1])
    shown = apart(places, THUMB + 2 * EDGE)
    for i, (x, y) in enumerate(places.tolist()):
        if i not in shown:
            draw.ellipse([x - DOT, y - DOT, x + DOT, y + DOT], fill=inks[i], outline="white", width=2)
    for i in shown:
        left, upper = places[i].tolist() - np.array([wide, high]) // 2
        draw.rectangle([left - EDGE, upper - EDGE, left + wide + EDGE - 1, upper + high + EDGE - 1], fill=inks[i])
        sheet.paste(enlarged(rgb(thumbs[i : i + 1])[0], (wide, high)), (int(left), int(upper)))
    for x, y, name, color in entries:
        y += top + SIDE + 8
        draw.ellipse([x, y + 5, x + line - 10, y + line - 5], fill=color)
        draw.text((x + line, y), name, INK, font)
    return sheet


def on_square(points: Tensor) -> np.ndarray:
    """Points n 2 as pixels of a square, its middle the middle of their range, the second axis upwards."""
    values = points.double().numpy()
    low, high = values.min(0), values.max(0)
    scale = (SIDE - 2 * MARGIN) / max((high - low).max(), 1e-12)
    return (SIDE / 2 + (values - (low + high) / 2) * scale * np.array([1, -1])).round().astype(int)


def apart(places: np.ndarray, size: int) -> list[int]:
    """The first of the points, and each further one around which a square of this size covers no other's."""
    shown: list[int] = []
    for i, place in enumerate(places):
        if not shown or (abs(places[shown] - place).max(1) >= size).all():
            shown.append(i)
    return shown


def legend(
    names: dict[str, tuple[int, int, int]], font: Font, line: int
) -> list[tuple[int, int, str, tuple[int, int, int]]]:
    """Where each name goes, in rows."""
    entries, x, y = [], 8, 0
    for name, color in names.items():
        width = line + round(font.getlength(name)) + 24
        if x > 8 and x + width > SIDE:
            x, y = 8, y + line
        entries.append((x, y, name, color))
        x += width
    return entries
