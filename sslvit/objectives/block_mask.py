"""Masks of rectangular blocks, by the rules of BEiT, iBOT and DINOv2. How many patches they hide varies by image.

An image's blocks are placed one after the other. A block's area is uniform between `least` and what is left to hide,
its aspect ratio log-uniform between 0.3 and 1/0.3, its place uniform; it must be smaller than the grid in both
directions and hide something new, but no more than is left. After ten tries without one that does, the mask stays as it
is: so it often hides a little less than was wanted, and never more.

    BEiT (https://arxiv.org/abs/2106.08254)      wanted 75 of 14 x 14, least 16
    iBOT (https://arxiv.org/abs/2111.07832)      wanted `wanted_by_image`, least (shorter side // 3)^2
    DINOv2 (https://arxiv.org/abs/2304.07193)    wanted `wanted_by_batch`, least 4

As in their code, an area is drawn between `least` and what is left even if less than `least` is left. All draws come
from the key of an image, so its mask is the same in any batch and on any number of processes.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslvit import rng
from sslvit.processes import collectives

TRIES = 10  # for each block
BLOCKS = 3  # placed of an image before those that are done are left out
ASPECT = 0.3  # the least, and one over the largest


class Hidden(NamedTuple):
    """What is hidden of some images."""

    mask: Tensor  # b n, True where hidden
    places: Tensor  # m: of all hidden patches, among the b n patches of all images
    weights: Tensor  # m, float64: one over the number that is hidden of its image

    def of(self, patches: Tensor) -> Tensor:
        """The hidden ones of these, in order of images: b n d -> m d"""
        return patches.flatten(0, 1).index_select(0, self.places)


def check_masks(grid: tuple[int, int], ratio: tuple[float, float]) -> None:
    """Raises ValueError where nothing could be hidden."""
    if min(grid) < 2:
        raise ValueError(
            f"blocks are smaller than the grid in both directions, and this is {grid[0]} x {grid[1]} patches: give "
            "larger images, smaller patches, or an objective that hides none, as DINO"
        )
    if not 0 < ratio[0] <= ratio[1] <= 1:
        raise ValueError(
            f"mask_ratios {ratio[0]:g} {ratio[1]:g}: give two shares of a crop, the smaller first, above 0"
        )


def block_mask(key: Tensor, wanted: Tensor, grid: tuple[int, int], least: float) -> Hidden:
    """Hides about `wanted` patches of each image, or none where it is 0: b, b -> b (h w)

    Worked out on the CPU, so that a GPU need not be waited for to learn how many patches are hidden. Images come last
    in its arrays, and those that are done leave them after every few blocks.
    """
    (height, width), device, key = grid, key.device, key.cpu()
    masks, left = np.zeros((height, width, len(key)), bool), wanted.cpu().double().numpy().copy()
    rows, rounds = np.flatnonzero(left > 0), 0
    y, x, shifts = np.arange(height)[:, None], np.arange(width)[:, None], np.arange(0, 64, 16)[:, None, None]
    while len(rows):
        drawn = rng.bits(rng.fold(key[torch.from_numpy(rows)], rounds), BLOCKS, TRIES)
        bits = drawn.permute(1, 2, 0).contiguous().numpy()
        mask, left_of = np.take(masks, rows, 2), left[rows]
        for block in range(BLOCKS):
            u = (bits[block] >> shifts & 0xFFFF) / 65536  # four draws of 16 bits from each hash
            top, low, start, end, hides = try_blocks(u, left_of, mask, least)
            mask |= ((y >= top) & (y < low))[:, None] & ((x >= start) & (x < end))
            left_of = np.where(hides > 0, left_of - hides, 0.0)
        masks[:, :, rows], left[rows] = mask, left_of
        rows, rounds = rows[left_of > 0], rounds + 1
    flat = np.ascontiguousarray(masks.reshape(-1, len(key)).T)
    places, counts = np.flatnonzero(flat), np.count_nonzero(masks, (0, 1))
    weights = np.repeat(1 / np.maximum(counts, 1), counts)
    return Hidden(*(torch.from_numpy(each).to(device) for each in (flat, places, weights)))


def try_blocks(u: np.ndarray, left: np.ndarray, mask: np.ndarray, least: float) -> tuple[np.ndarray, ...]:
    """Of ten blocks for each image the first that may be placed: its rows from and to, its columns from and to, and how
    many patches it hides anew; 0, and no rows, if there is none: 4 t b, b, h w b -> b each. In float64, as all boxes
    here (views/crop.py)."""
    height, width, images = mask.shape
    area, aspect = least + (left - least) * u[0], np.exp((2 * u[1] - 1) * -math.log(ASPECT))
    h, w = np.rint(np.sqrt(area * aspect)).astype(int), np.rint(np.sqrt(area / aspect)).astype(int)
    small = (h < height) & (w < width)
    h, w = h * small, w * small
    top, start = (u[2] * (height - h + 1)).astype(int), (u[3] * (width - w + 1)).astype(int)
    # The hidden patches above and left of each corner of the grid, from which those inside a block follow.
    sums = np.zeros((height + 1, width + 1, images), np.int16 if height * width < 1 << 15 else np.int32)
    for row in range(height):  # a quarter of the time of numpy's cumsum
        np.add(sums[row, 1:], mask[row], out=sums[row + 1, 1:])
    for column in range(width):
        sums[:, column + 1] += sums[:, column]
    low, end, image = top + h, start + w, np.arange(images)
    covered = sums[low, end, image] - sums[top, end, image] - sums[low, start, image] + sums[top, start, image]
    new = h * w - covered
    new[new > left] = 0
    first = (new > 0).argmax(0)  # 0 if none may
    top, low, start, end, new = (each[first, image] for each in (top, low, start, end, new))
    return top, np.where(new > 0, low, top), start, end, new


def wanted_by_image(key: Tensor, patches: int, ratio: tuple[float, float]) -> Tensor:
    """iBOT's: of half the images nothing, of the others a uniform share between these, by an image's own key: b -> b"""
    u = rng.uniform(key, 2).double()
    share = ratio[0] + (ratio[1] - ratio[0]) * u[:, 1]
    return torch.where(u[:, 0] < 0.5, 0.0, share * patches)


def wanted_by_batch(key: Tensor, patches: int, ratio: tuple[float, float], probability: float) -> Tensor:
    """DINOv2's: exactly this share of the images of all processes has a mask, the first with a ratio of the first of as
    many equal bins, and so on, and which image is which is random: b -> b

    The images of all processes are put into the order of a hash of their keys, so it depends on no process.
    """
    draws = rng.bits(rng.fold(key, "order"))
    everyone = collectives.all_gather(draws).sort().values
    masked = int(len(everyone) * probability)
    place = torch.searchsorted(everyone, draws)  # equal hashes, one in 2^64, would share a bin
    share = (place + rng.uniform(rng.fold(key, "share")).double()) / max(masked, 1)
    wanted = (patches * (ratio[0] + (ratio[1] - ratio[0]) * share)).floor()
    return torch.where(place < masked, wanted, 0.0)
