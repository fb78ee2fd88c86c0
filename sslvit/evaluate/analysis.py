"""Inside a ViT, as in the ViT paper (its Figures 6, 7, 10, 11 and 14, https://arxiv.org/abs/2010.11929).

Filters, similarity of positions, attention distance, and attention maps of the class token: pure functions of a ViT and
of images in [0, 1], drawn by reports/figures.py. Attention is computed one block at a time while a few images pass
through the model, so that memory holds `b k n n` of one block only.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor

from sslvit.evaluate.features import evaluation_mode
from sslvit.evaluate.seen import principal
from sslvit.models.positions import Grid, join_2d
from sslvit.models.vit import ViT

AT_ONCE = 1 << 26  # bytes of one block's attention


class Filters(NamedTuple):
    components: Tensor  # n p q c, each from 0 to 1
    variance: Tensor  # n: the share of the filters' variance that lies in each, largest first


class Distances(NamedTuple):
    """Mean attention distance in pixels, and what is needed to judge it; by layer and head, l k."""

    renormalised: Tensor  # each patch's attention to the patches is made to sum to 1
    plain: Tensor  # as it is, less what goes to the class token and the registers
    on_patches: Tensor  # the share of the patches' attention that goes to patches
    images: int


class Maps(NamedTuple):
    """The class token's attention, or the mean attention of the patches without one. Each map is the patches' part of a
    distribution over all tokens, so it sums to 1 at most."""

    rollout: Tensor  # b gh gw: through all layers
    last: Tensor  # b k gh gw: in the last layer, by head


@torch.no_grad()
def filters(vit: ViT, count: int = 28) -> Filters:
    """The first principal components of the patch embedding's filters; fewer than `count` where the filters span less.

    The filters' mean is subtracted (the paper does not say whether it did that). Each component is rescaled by its own
    least and greatest value.
    """
    if vit.config.hybrid is not None:
        raise ValueError(f"hybrid {vit.config.hybrid!r} embeds features of a ResNet: it has no filters of pixels")
    weight = vit.patch_embed.proj.weight.cpu()
    if not weight.isfinite().all():
        raise ValueError("the patch embedding's filters are not finite")
    rows = rearrange(weight, "d c p q -> d (p q c)")
    _, directions, variance = principal(rows, count)
    least, greatest = (reduce(directions, "n x -> n 1", how) for how in ("min", "max"))
    scaled = torch.where(greatest > least, (directions - least) / (greatest - least), 0.5)
    p, q = vit.patch_size
    return Filters(rearrange(scaled, "n (p q c) -> n p q c", p=p, q=q).float(), variance)


@torch.no_grad()
def position_similarity(vit: ViT, layer: int = 0) -> Tensor:
    """Cosine similarity of the patches' positions, each with all: gh gw gh gw, without the class token. Only positions
    at every layer have a table per layer."""
    if vit.position in ("none", "relative", "relative_bias", "rope"):
        raise ValueError(f"position {vit.position!r} has no table with a row for each patch, so none to compare")
    h, w = vit.grid
    if vit.position == "learned_2d":
        tables = join_2d(vit.pos_embed_x, vit.pos_embed_y)
    else:
        _, tables = vit.pos_embed.split([vit.prefix_positions, h * w], 1)
    if not 0 <= layer < len(tables):
        raise ValueError(f"layer {layer}: positions have tables for {len(tables)} layers")
    unit = F.normalize(tables[layer].double().cpu(), dim=-1)
    return rearrange(unit @ unit.mT, "(h w) (i j) -> h w i j", h=h, i=h)


def position_structure(similarity: Tensor) -> dict[str, float]:
    """Mean similarities of neighbours, of other pairs in a row or a column, and of all other pairs: gh gw gh gw"""
    rows, columns = _offsets(similarity.shape[:2])
    line = (rows == 0) != (columns == 0)
    kinds = {"neighbours": rows + columns == 1, "same row or column": line & (rows + columns > 1)}
    kinds["elsewhere"] = (rows > 0) & (columns > 0)
    flat = rearrange(similarity, "h w i j -> (h w) (i j)")
    return {name: flat[pairs].mean().item() for name, pairs in kinds.items() if pairs.any()}


def pixel_distances(grid: Grid, patch_size: tuple[int, int]) -> Tensor:
    """Between the centers of all patches: (gh gw) (gh gw)"""
    rows, columns = _offsets(grid)
    return torch.hypot(rows * float(patch_size[0]), columns * float(patch_size[1]))


def watch(vit: ViT, images: Tensor, look: Callable[[int, Tensor], None]) -> None:
    """Calls look(layer, probabilities) in each block of one forward pass: from 0, `b k n n`, a row for each query.

    In evaluation mode and in float32. The class token comes first, then registers, then patches.
    """

    def hook(layer: int, attention: Any, inputs: tuple[Any, ...]) -> None:
        tokens, relative, _, rope = inputs  # normed tokens with their positions, relative and rotary positions
        look(layer, attention.probabilities(tokens, relative, rope))

    hooks = [block.attn.register_forward_pre_hook(partial(hook, layer)) for layer, block in enumerate(vit.blocks)]
    try:
        with evaluation_mode(vit, images.device.type):
            vit(images)
    finally:
        for handle in hooks:
            handle.remove()


def mean_attention_distance(vit: ViT, batches: Iterable[Tensor]) -> Distances:
    """The distance in pixels from a patch to the patches that it attends to, weighted by attention: for each head the
    mean over all patches of all images `b c H W`.

    The paper does not say what it did with the class token; its row is left out here. `plain` is what the widespread
    re-implementation computes: it also leaves out the class token's column, so attention to it counts as
    distance 0, and a head that rests on it looks local. `renormalised` asks only where among the patches a head looks,
    so it compares models with and without prefix tokens. A patch that attends to no patch at all counts as 0.
    """
    sums, queries, count = torch.zeros(3, vit.depth, vit.heads, dtype=torch.float64), 0, 0
    for batch in batches:
        h, w = vit.grid_of(batch)
        for images in batch.split(images_at_once(vit, batch)):
            sums += _summed_distances(vit, images)
        count, queries = count + len(batch), queries + len(batch) * h * w
    if not count:
        raise ValueError("no images to measure attention distance on")
    if not sums.isfinite().all():
        layers = (~sums.isfinite()).any(-1).any(0).nonzero().flatten() + 1
        raise ValueError(f"attention is not finite in layers {layers.tolist()} of {vit.depth}")
    renormalised, plain, on_patches = sums / queries
    return Distances(renormalised, plain, on_patches, images=count)


def _summed_distances(vit: ViT, images: Tensor) -> Tensor:
    """The fields of Distances, summed over patches and images: b c H W -> three l k"""
    distances, layers = pixel_distances(vit.grid_of(images), vit.patch_size).to(images), []

    def look(layer: int, attention: Tensor) -> None:
        attention = attention[..., vit.prefix :, vit.prefix :]
        mass, plain = attention.sum(-1), einsum(attention, distances, "b k i j, i j -> b k i")
        each = torch.stack([plain / mass.clamp_min(torch.finfo(mass.dtype).tiny), plain, mass])
        layers.append(reduce(each.double(), "three b k i -> three k", "sum"))

    watch(vit, images, look)
    return torch.stack(layers, 1).cpu()


def roll_out(below: Tensor, attention: Tensor) -> Tensor:
    """One layer of attention rollout (https://arxiv.org/abs/2005.00928) on the layers below: `b n n, b k n n -> b n n`.

    Heads are averaged. Half of each token comes through the residual connection, a term that the ViT paper does not
    repeat but needs for its maps. The later layer multiplies from the left: row q of the product says of which input
    tokens output token q is made.
    """
    mixed = 0.5 * reduce(attention, "b k q n -> b q n", "mean") + 0.5 * torch.eye(attention.shape[-1]).to(attention)
    return mixed / mixed.sum(-1, keepdim=True) @ below


def attention_maps(vit: ViT, images: Tensor) -> Maps:
    """b c H W -> b gh gw and b k gh gw"""
    batches = [_maps(vit, batch) for batch in images.split(images_at_once(vit, images))]
    return Maps(*(torch.cat(maps).cpu() for maps in zip(*batches, strict=True)))


def _maps(vit: ViT, images: Tensor) -> Maps:
    grid, rolled, last = vit.grid_of(images), None, None

    def look(layer: int, attention: Tensor) -> None:
        nonlocal rolled, last
        below = torch.eye(attention.shape[-1]).to(attention) if rolled is None else rolled
        rolled, last = roll_out(below, attention), _seen(vit, attention, grid)

    watch(vit, images, look)
    return Maps(_seen(vit, rolled, grid), last)


def _seen(vit: ViT, attention: Tensor, grid: Grid) -> Tensor:
    """The class token's row, or the mean row of the patches, as a map of the patches: ... n n -> ... gh gw"""
    row = attention[..., vit.prefix :, :].mean(-2) if vit.cls_token is None else attention[..., 0, :]
    return rearrange(row[..., vit.prefix :], "... (h w) -> ... h w", h=grid[0])


def _offsets(grid: Grid) -> tuple[Tensor, Tensor]:
    """The rows and the columns between two patches: (gh gw) (gh gw) each"""
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid)).unbind(-1)
    return tuple((place.unsqueeze(1) - place).abs() for place in places)


def images_at_once(vit: ViT, images: Tensor) -> int:
    """The images that pass through the model together."""
    h, w = vit.grid_of(images)
    return max(1, AT_ONCE // (4 * vit.heads * (vit.prefix + h * w) ** 2))
