"""What the features of a ViT have in common: principal components of patches, nearest patches, and a map of images.

Pure functions of features, in float64, with no random draw but t-SNE's, whose seed is fixed.
"""

from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sslvit.models.positions import Grid

COLORS = 3  # components, as red, green and blue
CUT = 0.02  # the share of patches at either end of a component that has its darkest or brightest color
PERPLEXITY, FEWEST = 30.0, 8  # of t-SNE, and the images below which there is none


class Basis(NamedTuple):
    """Principal components, the largest first."""

    mean: Tensor  # d
    directions: Tensor  # k d, of length 1
    variance: Tensor  # k: the share of all variance that lies in each


class PatchColors(NamedTuple):
    """The principal components of patches, with one basis for all images."""

    first: Tensor  # n p: the first component; above 0 is the foreground
    foreground: Tensor  # n p, bool
    colors: Tensor  # n p 3, from 0 to 1: the first three components
    foreground_colors: Tensor  # n p 3: those of the foreground's own basis; 0, black, elsewhere
    variance: Tensor  # the share of all variance that lies in each of the first three


class NearestPatches(NamedTuple):
    """The most similar patch of each of other images, the most similar first."""

    images: Tensor  # k: their numbers among the images
    patches: Tensor  # k: their numbers in the image, row by row
    cosines: Tensor  # k


class ImageMap(NamedTuple):
    points: Tensor  # n 2
    method: str  # in words


def principal(rows: Tensor, count: int) -> Basis:
    """Of n d, less its mean; fewer than `count` components where the rows span fewer dimensions. A component's
    arbitrary sign makes its largest weight positive."""
    rows = rows.double()
    mean = rows.mean(0)
    # The triangle of a QR decomposition has the same components, and is small where there are many rows.
    centered = rows - mean
    reduced = torch.linalg.qr(centered, mode="r").R if len(rows) > rows.shape[1] else centered
    _, spread, directions = torch.linalg.svd(reduced, full_matrices=False)
    variance = spread.square() / spread.square().sum().clamp_min(1e-300)
    count = min(count, rows.shape[0] - 1, rows.shape[1])  # less their mean, n rows span n - 1 dimensions
    directions = directions[:count]
    directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    return Basis(mean, directions, variance[:count])


def projected(rows: Tensor, basis: Basis) -> Tensor:
    """n d -> n k"""
    return (rows.double() - basis.mean) @ basis.directions.T


def pca_of_patches(features: Tensor, grid: Grid) -> PatchColors:
    """Of patches n p d, row by row on a grid, as in DINOv2's figure 1 (https://arxiv.org/abs/2304.07193).

    The foreground is where the first component of all patches is above 0, their mean. Which end of it that is, the
    paper does not say. Here it is the end that holds a larger share of the inner patches than of those at the images'
    borders; where no patch is inner, the sign stays as `principal` has it. The foreground's colors are the components
    of its patches alone. Each goes from 0 to 1 between its 2nd and its 98th percentile.
    """
    check(features, axes=3)
    n, p, _ = features.shape
    if grid[0] * grid[1] != p:
        raise ValueError(f"features have {p} patches per image, which are no grid of {grid[0]} rows by {grid[1]}")
    rows = rearrange(features, "n p d -> (n p) d").cpu()
    basis = principal(rows, COLORS)
    values = projected(rows, basis)
    first = rearrange(values[:, 0] if values.shape[1] else values.new_zeros(n * p), "(n p) -> n p", n=n)
    inner = inner_patches(grid)
    if leaning(first < 0, inner) > leaning(first > 0, inner):  # no number where no patch is inner
        first = -first
    foreground = first > 0
    chosen = rows[rearrange(foreground, "n p -> (n p)")]
    own = torch.zeros(n, p, COLORS)
    if len(chosen):
        own[foreground] = colored(projected(chosen, principal(chosen, COLORS)))
    colors = rearrange(colored(values), "(n p) k -> n p k", n=n)
    return PatchColors(first.float(), foreground, colors, own, basis.variance)


def inner_patches(grid: Grid) -> Tensor:
    """Which patches are not at the border of an image: p"""
    inner = torch.zeros(grid, dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    return inner.flatten()


def leaning(what: Tensor, inner: Tensor) -> float:
    """How much larger a share of the inner patches it holds than of the others: n p, p"""
    return (what[:, inner].double().mean() - what[:, ~inner].double().mean()).item()


def colored(values: Tensor) -> Tensor:
    """Components n k as colors n 3 from 0 to 1; a missing or constant one is 0.5."""
    colors = torch.full((len(values), COLORS), 0.5)
    low, high = torch.from_numpy(np.quantile(values.numpy(), [CUT, 1 - CUT], axis=0))
    scaled = torch.where(high > low, (values - low) / (high - low).clamp_min(1e-300), 0.5)
    colors[:, : values.shape[1]] = scaled.clamp(0, 1).float()
    return colors


def nearest_patches(features: Tensor, image: int, patch: int, count: int) -> NearestPatches:
    """Of patches n p d, by cosine: the best one of each image but the chosen patch's own."""
    check(features, axes=3)
    n, p, _ = features.shape
    if not (0 <= image < n and 0 <= patch < p):
        raise ValueError(f"patch {patch} of image {image}: there are {n} images of {p} patches, numbered from 0")
    chosen = F.normalize(features[image, patch].double(), dim=-1)
    best = [(F.normalize(one.double(), dim=-1) @ chosen).max(-1) for one in features]
    cosines, patches = (torch.stack(each) for each in zip(*best, strict=True))
    others = torch.arange(n)[torch.arange(n) != image]
    order = others[cosines[others].argsort(descending=True, stable=True)][:count]
    return NearestPatches(order, patches[order], cosines[order])


def image_map(features: Tensor) -> ImageMap:
    """Features n d as points in two dimensions: by t-SNE of scikit-learn where it is installed and there are enough
    images, not all alike, else by their first two principal components."""
    check(features, axes=2)
    if find_spec("sklearn") is not None and len(features) >= FEWEST and (features != features[0]).any():
        from sklearn.manifold import TSNE

        perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
        made = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(features.float().numpy())
        by = f"t-SNE by scikit-learn {version('scikit-learn')}, perplexity {perplexity:.3g}"
        return ImageMap(torch.from_numpy(made), by)
    basis = principal(features, 2)
    points = F.pad(projected(features, basis), (0, 2 - len(basis.directions)))
    return ImageMap(points.float(), f"two principal components, {basis.variance.sum():.0%} of the variance")


def check(features: Tensor, axes: int) -> None:
    if features.ndim != axes or not features.numel():
        wanted = "patches n p d" if axes == 3 else "images n d"
        raise ValueError(f"features of shape {tuple(features.shape)} are not those of {wanted}")
    if not features.isfinite().all():
        raise ValueError(f"{int((~features.isfinite()).sum())} of the features are not finite")
