"""A confusion matrix as a picture: a row is a class, a column what its images were taken for."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sslvit.storage import durable

RIGHT, WRONG = np.array([33, 102, 172]), np.array([178, 24, 43])  # told apart by the colour-blind too
LONGEST = 18  # characters of a class's name
LARGEST = 1200  # pixels of the matrix, as far as cells have a pixel


def draw_confusion(counts: Tensor, classes: tuple[str, ...] | None, file: Path) -> None:
    """counts: i j, images of class i that were taken for j. The darker a cell, the larger its share of the row."""
    size = len(counts)
    names = [str(name)[:LONGEST] for name in classes or range(size)]
    cell = min(max(LARGEST // size, 1), 36)
    font = ImageFont.load_default(min(max(cell - 4, 8), 13))
    named = cell >= 12
    margin = 12 + max(int(font.getlength(name)) for name in names) if named else 8
    share = counts.double().numpy() / np.maximum(counts.sum(1, keepdim=True).numpy(), 1)
    ink = np.where(np.eye(size, dtype=bool)[..., None], RIGHT, WRONG)
    pixels = (255 - share[..., None] ** 0.5 * (255 - ink)).astype(np.uint8)  # the root shows what is rare
    side = margin + size * cell + 8
    picture = Image.new("RGB", (side, side), "white")
    matrix = Image.fromarray(pixels).resize((size * cell, size * cell), Image.Resampling.NEAREST)
    picture.paste(matrix, (margin, margin))
    draw = ImageDraw.Draw(picture)
    for row in range(size if named else 0):
        middle = margin + row * cell + cell // 2
        draw.text((margin - 6, middle), names[row], fill="black", font=font, anchor="rm")
        upright = Image.new("L", (margin, cell))
        ImageDraw.Draw(upright).text((0, cell // 2), names[row], fill=255, font=font, anchor="lm")
        upright = upright.rotate(90, expand=True)
        picture.paste("black", (margin + row * cell, -6), upright)
        for column in range(size if cell >= 30 else 0):
            if count := int(counts[row, column]):
                place = margin + column * cell + cell // 2, middle
                colour = "white" if share[row, column] > 0.3 else "black"
                draw.text(place, f"{count}", fill=colour, font=font, anchor="mm")
    durable.replace_picture(file, picture)
