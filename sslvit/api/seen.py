"""What the patches of images have in common."""

from math import isqrt

import torch
from torch import Tensor

from sslvit.api.calls import public
from sslvit.evaluate import seen
from sslvit.evaluate.features import Features
from sslvit.evaluate.seen import NearestPatches, PatchColors


@public
def pca_of_patches(features: Features | Tensor, grid: tuple[int, int] | None = None) -> PatchColors:
    """The principal components of patches, with one basis for all images, as in DINOv2's figure 1: `colors` of all
    patches, and `foreground_colors` of those whose `first` component is above its mean, the `foreground`.

    features: of the readout patches, or patches n p d, row by row. grid: rows and columns, by default of a square.
    The foreground is that end of the first component which holds a larger share of the inner patches than of those at
    the images' borders.

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=32)
    >>> features = sslvit.extract_features(vit, "shapes:n=64", readout="patches", ids=range(8))
    >>> seen = sslvit.pca_of_patches(features)
    >>> seen.foreground.shape, seen.colors.shape, seen.foreground_colors.unflatten(1, vit.grid).shape
    (torch.Size([8, 16]), torch.Size([8, 16, 3]), torch.Size([8, 4, 4, 3]))
    """
    patches = patches_of(features)
    side = isqrt(patches.shape[1])
    if grid is None and side**2 != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} patches per image are no square: give grid=(rows, columns)")
    return seen.pca_of_patches(patches, grid or (side, side))


@public
def nearest_patches(features: Features | Tensor, image: int, patch: int, *, count: int = 10) -> NearestPatches:
    """The most similar patch of each other image by cosine, the most similar first: `images`, `patches` and `cosines`.

    features: of the readout patches, or patches n p d. image, patch: numbers of the chosen one among them, from 0, row
    by row.

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=32)
    >>> features = sslvit.extract_features(vit, "shapes:n=64", readout="patches", ids=range(8))
    >>> nearest = sslvit.nearest_patches(features, image=0, patch=5, count=3)
    >>> nearest.images.shape, bool((nearest.cosines.diff() <= 0).all())
    (torch.Size([3]), True)
    """
    return seen.nearest_patches(patches_of(features), image, patch, count)


def patches_of(features: Features | Tensor) -> Tensor:
    patches = features.by_readout.get("patches") if isinstance(features, Features) else torch.as_tensor(features)
    if patches is None or patches.ndim != 3:
        found = ", ".join(features.by_readout) if isinstance(features, Features) else tuple(features.shape)
        raise ValueError(f"features are {found}: extract those of all patches by readout='patches'")
    return patches.detach().cpu()
