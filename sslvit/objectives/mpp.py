"""Masked patch prediction, as in appendix B.1.2 of the ViT paper (https://arxiv.org/abs/2010.11929).

Half of the patch embeddings are corrupted: 80% of those become a learned mask embedding, 10% another patch's embedding,
10% stay. From the output of each corrupted patch, whatever became of it, a linear head predicts the patch's colours.

The paper leaves some choices open, which are made here:
- "50%" is an exact count per image; what becomes of a corrupted patch is an independent draw, as in BERT.
- The mean of the clean pixels in [0, 1] becomes floor(8 mean), at most 7. Class 64 r + 8 g + b: black 0, white 511.
- "Another patch" is any other patch of the same image, so that an image's loss does not depend on its batch.
- Embeddings are corrupted before positions are added: a masked patch still knows where it is.
- The class token stays. The mask embedding and the head's weights start as N(0, 0.02).
- The 16 softmaxes and the squared errors are averaged, not summed: with a head of zeros, mean and downsized colours
  both cost ln 512. Pixels are those of the image in [0, 1].
"""

from math import prod
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.blocks import at_least_float32
from sslvit.models.patches import patchify, unpatchify
from sslvit.models.readout import Encoded, read
from sslvit.models.vit import ViT
from sslvit.objectives.masking import put, random_order, rows_of, take_rows
from sslvit.objectives.objective import Batch, Objective
from sslvit.objectives.spread import spread
from sslvit.processes.device import send_together
from sslvit.views.batching import Size
from sslvit.views.pretraining import CropFlip

Target = Literal["mean", "downsized", "pixels"]
LEVELS = 8  # 3 bits per channel
SIDE = 4  # the side of the downsized patch


class Chosen(NamedTuple):
    """The corrupted patches."""

    places: Tensor  # b m
    rows: Tensor  # b m: counted through all images


class MPP(Objective):
    """Masked patch prediction: the colours of corrupted patches, by a linear head.

    >>> import sslvit
    >>> objective = sslvit.MPP(sslvit.ViT.variant("mu/8", image_size=16), corrupt=0.5)
    >>> objective.readout
    'mean'
    """

    def __init__(self, backbone: ViT, *, target: Target = "mean", corrupt: float = 0.5, seed: int = 0):
        """target: a patch's mean colour (the paper's choice), its 4x4 downsized version, or all its pixels.
        corrupt: the share of patches that is corrupted (the paper also tried 0.15)."""
        super().__init__()
        channels, patch_size = backbone.channels, backbone.patch_size
        self.count = round(corrupt * prod(backbone.grid))
        if target not in get_args(Target):
            raise ValueError(f"target must be one of {get_args(Target)}, got {target!r}")
        if not 0 < corrupt <= 1 or self.count == 0:
            raise ValueError(f"corrupt {corrupt} of {prod(backbone.grid)} patches leaves nothing to predict")
        if target != "pixels" and channels not in (1, 2, 3):
            raise ValueError(f"a softmax over {LEVELS}^{channels} colours is too large: use the target pixels")
        if target == "downsized" and min(patch_size) < SIDE:
            raise ValueError(f"patch size {patch_size} is below {SIDE}: use the target mean or pixels")
        self.backbone, self.target, self.readout = backbone, target, "mean"
        self.side = SIDE if target == "downsized" else 1
        self.colors = LEVELS**channels
        outputs = prod(patch_size) * channels if target == "pixels" else self.side**2 * self.colors
        generator = torch.Generator().manual_seed(seed)
        self.mask_embedding = nn.Parameter(0.02 * torch.randn(backbone.width, generator=generator))
        with torch.random.fork_rng(devices=[]):  # torch's layers draw from its global generator when they are made
            self.head = nn.Linear(backbone.width, outputs)
        nn.init.trunc_normal_(self.head.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.head.bias)

    def default_views(self, image_size: Size, channels: int) -> CropFlip:
        return CropFlip(image_size, scale=(0.5, 1.0))

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        (images,) = batch.views
        encoded, predicted, chosen = self.predict(batch)
        patches = take_rows(patchify(images, self.backbone.patch_size), chosen.rows)
        if self.target == "pixels":
            loss, metrics = self.pixel_loss(predicted, patches)
        else:
            loss, metrics = self.color_loss(predicted, patches)
        return loss, metrics | spread(read(encoded, self.readout))

    def predict(self, batch: Batch) -> tuple[Encoded, Tensor, Chosen]:
        """The corrupted images encoded, the head's outputs for the corrupted patches, b m o, and their places."""
        (images,) = batch.views
        chosen = random_order(rng.fold(batch.key, "corrupted"), prod(self.backbone.grid))[:, : self.count]
        tokens, chosen = corrupted(self.backbone.embed(images), chosen, self.mask_embedding, batch.key)
        encoded = self.backbone.encode(self.backbone.add_positions(tokens), key=rng.fold(batch.key, "backbone"))
        return encoded, self.head(take_rows(encoded.patches, chosen.rows)), chosen

    def color_loss(self, predicted: Tensor, patches: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        classes = rearrange(color_classes(patches, self.backbone.patch_size, self.side), "b m s -> (b m s)")
        logits = rearrange(predicted, "b m (s k) -> (b m s) k", k=self.colors)
        logits = logits.to(at_least_float32(logits.dtype))
        loss = F.cross_entropy(logits, classes)
        with torch.no_grad():
            counts = logits.new_zeros(self.colors).scatter_(0, classes, 1.0, reduce="add")
            accuracy = (logits.argmax(-1) == classes).mean(dtype=torch.float32)
        return loss, {"accuracy": accuracy, "accuracy_of_commonest_colour": counts.max() / len(classes)}

    def pixel_loss(self, predicted: Tensor, patches: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = F.mse_loss(predicted.to(patches.dtype), patches)
        with torch.no_grad():
            mean_patch = reduce(patches, "b m v -> v", "mean")
            return loss, {"loss_of_mean_patch": F.mse_loss(mean_patch.expand_as(patches), patches)}

    @torch.no_grad()
    def reconstructed(self, batch: Batch) -> tuple[Tensor, ...]:
        """The corrupted images, masked patches grey, and the images with corrupted patches as predicted."""
        (images,), size = batch.views, self.backbone.patch_size
        _, predicted, chosen = self.predict(batch)
        predicted = predicted.float()
        if self.target != "pixels":
            classes = rearrange(predicted, "b m (s k) -> b m s k", k=self.colors).argmax(-1)
            levels = [classes // LEVELS**power % LEVELS for power in reversed(range(self.backbone.channels))]
            cells = (torch.stack(levels, -1).float() + 0.5) / LEVELS
            cells = rearrange(cells, "b m (sy sx) c -> (b m) c sy sx", sy=self.side)
            predicted = rearrange(F.interpolate(cells, size), "(b m) c p q -> b m (p q c)", b=len(images))
        patches = patchify(images, size)
        places = chosen.places.to(batch.key.device)
        seen, _ = corrupted(patches, places, patches.new_full((), 0.5), batch.key)
        filled = put(patches, chosen.places, predicted.clamp(0, 1))
        return tuple(unpatchify(x, size, self.backbone.grid) for x in (seen, filled))


def corrupted(tokens: Tensor, chosen: Tensor, mask: Tensor, key: Tensor) -> tuple[Tensor, Chosen]:
    """Of the chosen patches 80% replaced by the mask, 10% by another patch of the image: b n d, b m, d, b -> b n d. And
    the chosen ones on the tokens' device; they and the key may be on the CPU."""
    n, m = tokens.shape[1], chosen.shape[1]
    fate = rng.uniform(rng.fold(key, "fate"), m)
    # Any other patch is 1 to n - 1 places further in raster order, cyclically, each as likely.
    other = (chosen + 1 + rng.integers(rng.fold(key, "other"), max(n - 1, 1), m)) % n
    source = torch.where(fate < 0.9, other, chosen)
    drawn = Chosen(chosen, rows_of(chosen, n)), rows_of(source, n), (fate < 0.8).unsqueeze(-1)
    there, rows, masked = send_together(drawn, tokens.device)
    replacement = torch.where(masked, mask.to(tokens.dtype), take_rows(tokens, rows))
    return put(tokens, there.places, replacement), there


def color_classes(patches: Tensor, patch_size: tuple[int, int], side: int) -> Tensor:
    """The 3-bit colour class of each cell, with side x side cells per patch: b m (p q c) -> b m (side side)

    A pixel that lies in two cells counts in each by the area that it has there.
    """
    height, width = patch_size
    if height % side or width % side:
        patches = repeat(patches, "b m (p q c) -> b m (p sy q sx c)", p=height, q=width, sy=side, sx=side)
        height, width = height * side, width * side
    means = reduce(
        patches,
        "b m (sy p sx q c) -> b m (sy sx) c",
        "mean",
        sy=side, sx=side, p=height // side, q=width // side,
    )  # fmt: skip
    levels = (means * LEVELS).clamp(0, LEVELS - 1).long()
    classes = levels[..., 0]
    for channel in range(1, levels.shape[-1]):
        classes = torch.add(levels[..., channel], classes, alpha=LEVELS)
    return classes
