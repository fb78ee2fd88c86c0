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

    On the CPU, since a GPU would be waited for to learn how many patches are hidden. 16 patches of a row are the bits
    of one number, images come last in the arrays, and those that are done leave them after every few blocks.
    """
    (height, width), key = grid, key.cpu()
    words, left = -(-width // 16), wanted.cpu().double().numpy()
    masks, counts = np.zeros((len(key), height, words), "<u2"), np.zeros(len(key), int)
    rows, rounds = np.flatnonzero(left > 0), 0
    mask, left, hidden = np.zeros((height, words, len(rows)), np.uint16), left[rows], np.zeros(len(rows))
    while len(rows):
        drawn = rng.bits(rng.fold(key[torch.from_numpy(rows)], rounds), BLOCKS, TRIES).numpy().astype("<i8", copy=False)
        u = drawn.view("<u2").reshape(len(rows), BLOCKS, TRIES, 4).transpose(1, 3, 2, 0)  # four draws from each hash
        at_once = 2 if len(rows) > 256 else TRIES  # mostly one of two may be placed; of few images all are as fast
        for block in np.ascontiguousarray(u):
            placed, new = try_blocks(block[:, :at_once], left, mask, grid, least)
            again = np.flatnonzero(new == 0) if at_once < TRIES else ()
            if len(again):
                others = block[:, at_once:].take(again, 2)
                placed[..., again], new[again] = try_blocks(others, left[again], mask.take(again, 2), grid, least)
            mask |= placed
            hidden += new
            left = (left - new) * (new > 0)
        done, going = np.flatnonzero(left <= 0), np.flatnonzero(left > 0)
        masks[rows[done]], counts[rows[done]] = mask.take(done, 2).transpose(2, 0, 1), hidden[done]
        mask, left, hidden, rows = mask.take(going, 2), left[going], hidden[going], rows[going]
        rounds += 1
    bits = np.unpackbits(masks.view(np.uint8), axis=-1, bitorder="little")[..., :width]
    flat = bits.reshape(len(key), -1).view(bool)
    weights = np.repeat(1 / np.maximum(counts, 1), counts)
    return Hidden(*(torch.from_numpy(each) for each in (flat, np.flatnonzero(flat), weights)))


def try_blocks(
    drawn: np.ndarray, left: np.ndarray, mask: np.ndarray, grid: tuple[int, int], least: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of t blocks for each image the first that may be placed, and how many patches it hides anew; nothing and 0 if
    there is none: 4 t b of 16 bits, b, h words b -> h words b, b. In float64, as all boxes here (views/crop.py)."""
    (height, width), images = grid, np.arange(len(left))
    u = drawn / 65536
    area, aspect = least + (left - least) * u[0], np.exp((2 * u[1] - 1) * -math.log(ASPECT))
    h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    small = (h < height) & (w < width)
    h, w = h * small, w * small
    top, start = (u[2] * (height - h + 1)).astype(np.int16), (u[3] * (width - w + 1)).astype(np.int16)
    low, end = top + h.astype(np.int16), start + w.astype(np.int16)
    y = np.arange(height, dtype=np.int16)[:, None, None]
    word = 16 * np.arange(mask.shape[1], dtype=np.int32)[:, None, None]
    columns = (1 << (end - word).clip(0, 16)) - (1 << (start - word).clip(0, 16))
    blocks = ((y >= top) & (y < low))[:, None] * columns.astype(np.uint16)  # h words t b
    new = h * w - ones(mask[:, :, None] & blocks).sum((0, 1), dtype=np.int32)
    new *= new <= left
    first = (new > 0).argmax(0)  # 0 if none may
    new = new[first, images]
    return blocks[:, :, first, images] * (new > 0), new


def ones(words: np.ndarray) -> np.ndarray:
    """How many bits of each are set: sums of neighbours in pairs, then fours, eights and all sixteen."""
    words = words - ((words >> 1) & 0x5555)
    words = (words & 0x3333) + ((words >> 2) & 0x3333)
    words = (words + (words >> 4)) & 0x0F0F
    return (words + (words >> 8)) & 0xFF


def wanted_by_image(key: Tensor, patches: int, ratio: tuple[float, float]) -> Tensor:
    """iBOT's: of half the images nothing, of the others a uniform share between these, by an image's own key: b -> b"""
    u = rng.uniform(key, 2).double()
    share = ratio[0] + (ratio[1] - ratio[0]) * u[:, 1]
    return torch.where(u[:, 0] < 0.5, 0.0, share * patches)


def wanted_by_batch(
    key: Tensor,
    patches: int,
    ratio: tuple[float, float],
    probability: float,
    device: torch.device = collectives.CPU,
) -> Tensor:
    """DINOv2's: exactly this share of the images of all processes has a mask, the first with a ratio of the first of as
    many equal bins, and so on, and which image is which is random: b -> b

    The images of all processes are put into the order of a hash of their keys, so it depends on no process. device:
    where processes can exchange them.
    """
    key = key.cpu()
    draws = rng.bits(rng.fold(key, "order"))
    everyone = collectives.gathered_by(device, draws).sort().values
    masked = int(len(everyone) * probability)
    place = torch.searchsorted(everyone, draws)  # equal hashes, one in 2^64, would share a bin
    share = (place + rng.uniform(rng.fold(key, "share")).double()) / max(masked, 1)
    wanted = (patches * (ratio[0] + (ratio[1] - ratio[0]) * share)).floor()
    return torch.where(place < masked, wanted, 0.0)
