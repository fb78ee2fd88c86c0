"""Arithmetic of the corruptions: blurs, zooms, shifts and bilinear samples of images, float64 b c h w.

Every sum is built of separate products and additions, element by element, so that a pixel does not depend on the images
beside it in the batch.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sslvit import rng

Border = Callable[[Tensor, int], Tensor]  # the pixels that are shown at these places, of so many
NEGLIGIBLE = 1e-12  # weight


def clamped(places: Tensor, n: int) -> Tensor:
    """aaa|abc|ccc"""
    return places.clamp(0, n - 1)


def mirrored(places: Tensor, n: int) -> Tensor:
    """cba|abc|cba"""
    places = places % (2 * n)
    return torch.minimum(places, 2 * n - 1 - places)


def reflected(places: Tensor, n: int) -> Tensor:
    """dcb|abcd|cba, without the border itself"""
    places = places % max(2 * n - 2, 1)
    return torch.minimum(places, (2 * n - 2 - places).clamp_min(0))


def weighted(x: Tensor, kernel: Tensor, border: Border) -> Tensor:
    """Correlation with a kernel of odd sides, on the CPU."""
    (h, w), (rows, columns) = x.shape[-2:], kernel.shape
    down, across = (
        border(torch.arange(-(k // 2), n + k // 2, device=x.device), n) for n, k in ((h, rows), (w, columns))
    )
    wide, total = x.index_select(-2, down).index_select(-1, across), torch.zeros_like(x)
    for row, column in (kernel.abs() > NEGLIGIBLE).nonzero().tolist():
        total += wide[..., row : row + h, column : column + w] * kernel[row, column].item()
    return total


def gaussian(x: Tensor, sigma: Sequence[float], border: Border, truncate: float = 4.0) -> Tensor:
    """sigma: of rows and of columns, in pixels."""
    for axis, one in enumerate(sigma):
        places = torch.arange(-int(truncate * one + 0.5), int(truncate * one + 0.5) + 1, dtype=torch.float64)
        weights = (-0.5 * (places / max(one, NEGLIGIBLE)) ** 2).exp()
        x = weighted(x, (weights / weights.sum()).unsqueeze(1 - axis), border)
    return x


def disk(radius: float, sigma: float) -> Tensor:
    """A kernel: a filled circle with soft edges."""
    reach = 8 if radius <= 8 else int(radius)
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    circle = (line.square() + line.square()[:, None] <= radius**2).double()
    soft = torch.arange(-1, 2) if radius <= 8 else torch.arange(-2, 3)
    soft = (-0.5 * (soft.double() / sigma) ** 2).exp()
    soft = soft[:, None] * soft
    return weighted((circle / circle.sum())[None, None], soft / soft.sum(), reflected)[0, 0]


def zoomed(x: Tensor, factor: float) -> Tensor:
    """The middle, enlarged to the size of the whole or slightly more."""
    for axis in (-2, -1):
        n = x.shape[axis]
        kept = math.ceil(n / factor)
        x, size = x.narrow(axis, (n - kept) // 2, kept), max(round(kept * factor), 1)
        at = torch.arange(size, dtype=torch.float64) * ((kept - 1) / max(size - 1, 1))
        low = at.floor().clamp(max=kept - 1).long()
        share = (at - low).to(x.device)
        share = share if axis == -1 else share[:, None]
        lower, upper = (x.index_select(axis, (low + i).clamp(max=kept - 1).to(x.device)) for i in (0, 1))
        x = lower * (1 - share) + upper * share
    return x


def motion(x: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """Blurred along a line at an angle for each image, to one side, with weights that fall like half a Gaussian. What
    would come from beyond the whole image is missing, so that strong blurs of small images are darker."""
    (b, c, h, w), width = x.shape, 2 * radius + 1
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(width)]
    angles = [math.radians(angle) for angle in degrees.tolist()]
    image, channel = torch.arange(b).view(b, 1, 1, 1).to(x.device), torch.arange(c).view(c, 1, 1).to(x.device)
    total = torch.zeros_like(x)
    for i, weight in enumerate(weights):
        down = torch.tensor([-math.ceil(i * math.sin(angle) - 0.5) for angle in angles])
        across = torch.tensor([-math.ceil(i * math.cos(angle) - 0.5) for angle in angles])
        share = ((down.abs() < h) & (across.abs() < w)).double() * (weight / sum(weights))
        rows = clamped(torch.arange(h) - down[:, None], h).view(b, 1, h, 1).to(x.device)
        columns = clamped(torch.arange(w) - across[:, None], w).view(b, 1, 1, w).to(x.device)
        total += x[image, channel, rows, columns] * share.view(b, 1, 1, 1).to(x.device)
    return total


def sampled(x: Tensor, rows: Tensor, columns: Tensor, border: Border) -> Tensor:
    """Bilinear, at places in pixels, b h w each."""
    (b, c), (h, w) = x.shape[:2], x.shape[-2:]
    image, channel = torch.arange(b, device=x.device).view(b, 1, 1, 1), torch.arange(c, device=x.device).view(c, 1, 1)
    top, left = rows.floor(), columns.floor()
    down, across = (rows - top)[:, None], (columns - left)[:, None]
    total = torch.zeros_like(x)
    for i, share in ((0, 1 - down), (1, down)):
        for j, part in ((0, 1 - across), (1, across)):
            y, z = border(top.long() + i, h)[:, None], border(left.long() + j, w)[:, None]
            total += x[image, channel, y, z] * (share * part)
    return total


def plasma(key: Tensor, size: int, decay: float) -> Tensor:
    """Clouds by midpoint displacement (diamond-square), from 0 to 1; the side is a power of two: b -> b side side"""
    field = torch.zeros(len(key), size, size, dtype=torch.float64, device=key.device)
    step, reach, drawn = size, 100.0, 0

    def displaced(total: Tensor) -> Tensor:
        nonlocal drawn
        drawn += 1
        noise = rng.uniform(rng.fold(key, drawn), *total.shape[1:]).double()
        return total / 4 + (noise * (2 * reach) - reach) * reach

    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        field[:, half::step, half::step] = displaced(pairs + pairs.roll(-1, 2))
        middles = field[:, half::step, half::step]
        beside = middles + middles.roll(1, 1), middles + middles.roll(1, 2)
        field[:, ::step, half::step] = displaced(beside[0] + (corners + corners.roll(-1, 2)))
        field[:, half::step, ::step] = displaced(beside[1] + (corners + corners.roll(-1, 1)))
        step, reach = half, reach / decay
    field -= field.amin((1, 2), keepdim=True)
    return field / field.amax((1, 2), keepdim=True).clamp_min(NEGLIGIBLE)
