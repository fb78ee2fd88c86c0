"""A folder of images of one size, each of one grey value: its number."""

from pathlib import Path

import numpy as np
from image_zoo import png


def images(folder: Path, count: int = 30, side: int = 8) -> str:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number:03}.png").write_bytes(png(np.full((side, side, 3), number % 256, np.uint8), 8, 2))
    return str(folder)
