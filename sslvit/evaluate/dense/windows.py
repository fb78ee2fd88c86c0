"""Patch features of whole images: an image's shorter side is resized to the window's size, and windows of that size
slide over it, as in the linear protocol of DINOv2. An image of the window's size is one window.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from sslvit.data.masks import MaskedSource
from sslvit.evaluate.features import evaluation_mode
from sslvit.models.readout import Encoded
from sslvit.objectives.segmentation import feature_maps
from sslvit.views.segmentation import IGNORED

CLASSES = 16  # whose scores are enlarged at a time


class Windows(NamedTuple):
    """An image that is read by windows of one size."""

    id: int
    image: Tensor  # uint8 k c s s
    labels: Tensor  # uint8 k s s: the mask in the windows
    mask: Tensor  # uint8 H W: as it was read
    size: tuple[int, int]  # of the resized image
    corners: Tensor  # k 2: top, left


class Window(NamedTuple):
    """side: of the square, in pixels. stride: of its steps; 2/3 of the side if 0, as 341 of 512."""

    side: int
    stride: int = 0

    def of(self, id: int, image: Tensor, mask: Tensor) -> Windows:
        height, width = mask.shape
        scale = self.side / min(height, width)
        size = max(self.side, round(height * scale)), max(self.side, round(width * scale))
        labels = mask
        if size != (height, width):
            image = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
            labels = F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]
        corners = [(top, left) for top in self.starts(size[0]) for left in self.starts(size[1])]
        cut = [(slice(top, top + self.side), slice(left, left + self.side)) for top, left in corners]
        return Windows(
            id,
            torch.stack([image[:, rows, columns] for rows, columns in cut]),
            torch.stack([labels[rows, columns] for rows, columns in cut]),
            mask,
            size,
            torch.tensor(corners),
        )

    def starts(self, length: int) -> list[int]:
        """As few as reach the end, the last one at the end."""
        stride = self.stride or max(1, round(self.side * 341 / 512))
        steps = -(-(length - self.side) // stride)
        return [min(step * stride, length - self.side) for step in range(steps + 1)]


class Seen(NamedTuple):
    windows: Windows
    features: Tensor  # k h w d, float32, on the CPU


class WindowedImages(Dataset):
    def __init__(self, source: MaskedSource, ids: np.ndarray, window: Window):
        self.source, self.ids, self.window = source, ids, window

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Windows:
        id = int(self.ids[index])
        return self.window.of(id, *self.source.pair(id))


def patch_features(
    backbone: nn.Module,
    source: MaskedSource,
    ids: np.ndarray,
    window: Window,
    device: torch.device,
    *,
    layers: int | Sequence[int] = 1,
    batch_size: int = 64,
    workers: int = 0,
) -> Iterator[Seen]:
    """The features of every patch of these images in order; of several last blocks, or of these blocks, joined."""
    loader = DataLoader(WindowedImages(source, ids, window), batch_size=None, num_workers=workers)
    waiting: list[Windows] = []
    with evaluation_mode(backbone, device.type):
        for index, one in enumerate(loader):
            waiting.append(one)
            last = index + 1 == len(ids)
            if last or sum(len(held.image) for held in waiting) >= batch_size:
                images = torch.cat([held.image for held in waiting]).split(batch_size)
                parts = [feature_maps(backbone, some.to(device) / 255, layers).float().cpu() for some in images]
                maps = rearrange(torch.cat(parts), "b d h w -> b h w d")
                if not maps.isfinite().all():
                    raise ValueError(f"patch features of {source.name} are not finite: has the model diverged?")
                for held, part in zip(waiting, maps.split([len(held.image) for held in waiting]), strict=True):
                    yield Seen(held, part)
                waiting = []


class RawPixels(nn.Module):
    """The pixels of each patch as its features, to compare with."""

    def __init__(self, patch_size: tuple[int, int]):
        super().__init__()
        self.patch_size = patch_size

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1]

    def forward(self, images: Tensor) -> Encoded:
        p, q = self.patch_size
        return Encoded(None, rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=q))


def patch_classes(labels: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """The share of each class among a patch's pixels that are not ignored, 0 if all are: k H W -> k h w classes"""
    p, q = labels.shape[1] // grid[0], labels.shape[2] // grid[1]
    pixels = rearrange(labels[:, : grid[0] * p, : grid[1] * q], "k (h p) (w q) -> k h w (p q)", p=p, q=q).long()
    seen = pixels != IGNORED
    counts = torch.zeros(*pixels.shape[:3], classes).scatter_add_(-1, pixels.where(seen, 0), seen.float())
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def stitched(scores: Tensor, windows: Windows) -> Tensor:
    """Scores of patches to classes of pixels: each window's are enlarged to its pixels, averaged where windows overlap,
    and enlarged to the mask: k c h w -> H W"""
    best = answer = torch.empty(0)
    for number, some in enumerate(scores.split(CLASSES, dim=1)):  # few classes at a time: large images take much memory
        value, index = _enlarged(some, windows).max(0)
        if number:
            index = torch.where(value > best, index + number * CLASSES, answer)
            value = torch.maximum(value, best)
        best, answer = value, index
    return answer


def _enlarged(scores: Tensor, windows: Windows) -> Tensor:
    """k c h w -> c H W"""
    side = windows.image.shape[-1]
    scores = F.interpolate(scores, (side, side), mode="bilinear")
    whole = scores
    if len(scores) > 1:
        whole, count = scores.new_zeros(1, scores.shape[1], *windows.size), scores.new_zeros(1, 1, *windows.size)
        for one, (top, left) in zip(scores, windows.corners.tolist(), strict=True):
            whole[0, :, top : top + side, left : left + side] += one
            count[0, :, top : top + side, left : left + side] += 1
        whole /= count
    if whole.shape[2:] != windows.mask.shape:
        whole = F.interpolate(whole, windows.mask.shape, mode="bilinear")
    return whole[0]
