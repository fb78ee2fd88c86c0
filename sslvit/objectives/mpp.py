"""Masked patch prediction, as the ViT paper's appendix B.1.2 describes it (https://arxiv.org/abs/2010.11929).

Half of the patch embeddings are corrupted: 80 % of those become a learned mask embedding, 10 % another patch's
embedding, 10 % stay. From each corrupted patch's output, kept ones too, a linear head predicts that patch's colours.

What the paper leaves open is decided here:
- "50 %" is an exact count an image; what happens to a chosen patch is an independent draw a patch, as in BERT.
- The mean of the clean pixels in [0, 1] becomes floor(8 mean), at most 7. Class 64 r + 8 g + b: black 0, white 511.
- "Another patch" is any other patch of the same image, so that an image's loss does not depend on its batch.
- Embeddings are corrupted before positions are added: a masked patch still knows where it is.
- The class token stays. The mask embedding starts as N(0, 0.02), the head as the backbone's linear layers do.
- The 16 softmaxes and the squared errors are averaged, not summed: a head of zeros costs ln 512 for either colours.
"""

from math import prod
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.patches import patchify, unpatchify
from sslvit.models.readout import Encoded, read
from sslvit.models.vit import ViT
from sslvit.objectives.masking import random_order, take
from sslvit.objectives.objective import Batch, Objective
from sslvit.objectives.spread import spread

Target = Literal["mean", "downsized", "pixels"]
LEVELS = 8  # 3 bits a channel
SIDE = 4  # the side of the downsized patch


class MPP(Objective):
    def __init__(
        self,
        backbone: ViT,
        *,
        target: Target = "mean",
        corrupt: float = 0.5,
        seed: int = 0,
    ):
        """target: a patch's mean colour (the paper's choice), its 4x4 downsized version, or all its pixels.
        corrupt: the share of patches that is corrupted (the paper also tried 0.15)."""
        super().__init__()
        channels, patch_size = backbone.channels, backbone.patch_size
        self.count = round(corrupt * prod(backbone.grid))
        if target not in get_args(Target):
            raise ValueError(f"target {target!r} is none of {get_args(Target)}")
        if not 0 < corrupt <= 1 or self.count == 0:
            raise ValueError(f"corrupt {corrupt} of {prod(backbone.grid)} patches leaves nothing to predict")
        if target != "pixels" and channels not in (1, 2, 3):
            raise ValueError(f"a softmax over {LEVELS}^{channels} colours is too large: use the target pixels")
        if target == "downsized" and min(patch_size) < SIDE:
            raise ValueError(f"patch size {patch_size} is below {SIDE}: use the target mean or pixels")
        self.backbone, self.target, self.readout = backbone, target, "mean"
        self.colours = LEVELS**channels
        outputs = {"mean": self.colours, "downsized": SIDE * SIDE * self.colours, "pixels": prod(patch_size) * channels}
        generator = torch.Generator().manual_seed(seed)
        self.mask_embedding = nn.Parameter(0.02 * torch.randn(backbone.width, generator=generator))
        self.head = nn.Linear(backbone.width, outputs[target])
        nn.init.trunc_normal_(self.head.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        (images,) = batch.views
        chosen = random_order(rng.fold(batch.key, "corrupted"), prod(self.backbone.grid))[:, : self.count]
        encoded, predicted = self.predict(images, chosen, batch.key)
        patches = take(patchify(images, self.backbone.patch_size), chosen)
        loss, metrics = (self.pixel_loss if self.target == "pixels" else self.colour_loss)(predicted, patches)
        return loss, metrics | spread(read(encoded, self.readout))

    def predict(self, images: Tensor, chosen: Tensor, key: Tensor) -> tuple[Encoded, Tensor]:
        """What the backbone makes of corrupted images, and the head of the corrupted patches: b c H W, b m -> b m o"""
        tokens = self.corrupt(self.backbone.embed(images), chosen, key)
        encoded = self.backbone.encode(self.backbone.add_positions(tokens), key=rng.fold(key, "backbone"))
        return encoded, self.head(take(encoded.patches, chosen))

    def corrupt(self, tokens: Tensor, chosen: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """b n d, b m -> b n d"""
        mask = self.mask_embedding if mask is None else mask
        n, m = tokens.shape[1], chosen.shape[1]
        fate = rng.uniform(rng.fold(key, "fate"), m)
        # 1..n-1 places further round the image is any other patch, each as likely.
        other = (chosen + 1 + rng.integers(rng.fold(key, "other"), max(n - 1, 1), m)) % n
        source = torch.where(fate < 0.9, other, chosen)
        replacement = torch.where(fate.unsqueeze(-1) < 0.8, mask.to(tokens.dtype), take(tokens, source))
        return tokens.scatter(1, chosen.unsqueeze(-1).expand_as(replacement), replacement)

    @torch.no_grad()
    def reconstructed(self, batch: Batch) -> tuple[Tensor, ...]:
        """The corrupted images, masked patches grey, and with the predictions in the place of corrupted patches."""
        images, size = batch.views[0], self.backbone.patch_size
        chosen = random_order(rng.fold(batch.key, "corrupted"), prod(self.backbone.grid))[:, : self.count]
        predicted = self.predict(images, chosen, batch.key)[1].float()
        if self.target != "pixels":
            side, c = SIDE if self.target == "downsized" else 1, images.shape[1]
            classes = rearrange(predicted, "b m (s k) -> b m s k", k=self.colours).argmax(-1)
            levels = [classes // LEVELS**power % LEVELS for power in reversed(range(c))]
            cells = (torch.stack(levels, -1).float() + 0.5) / LEVELS
            cells = rearrange(cells, "b m (sy sx) c -> (b m) c sy sx", sy=side)
            predicted = rearrange(F.interpolate(cells, size), "(b m) c p q -> b m (p q c)", b=len(images))
        patches = patchify(images, size)
        corrupted = self.corrupt(patches, chosen, batch.key, patches.new_full((), 0.5))
        filled = patches.scatter(1, chosen.unsqueeze(-1).expand_as(predicted), predicted.clamp(0, 1))
        return tuple(unpatchify(x, size, self.backbone.grid) for x in (corrupted, filled))

    def colour_loss(self, predicted: Tensor, patches: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        classes = colour_classes(patches, self.backbone.patch_size, SIDE if self.target == "downsized" else 1)
        logits = rearrange(predicted, "b m (s k) -> (b m s) k", k=self.colours)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        classes = rearrange(classes, "b m s -> (b m s)")
        loss = F.cross_entropy(logits, classes)
        with torch.no_grad():
            counts = logits.new_zeros(self.colours)
            counts.index_add_(0, classes, logits.new_ones(()).expand(len(classes)))
            accuracy = (logits.argmax(-1) == classes).float().mean()
        return loss, {"accuracy": accuracy, "accuracy_of_commonest_colour": counts.max() / len(classes)}

    def pixel_loss(self, predicted: Tensor, patches: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = F.mse_loss(predicted.to(patches.dtype), patches)
        with torch.no_grad():
            grey = reduce(patches, "b m v -> v", "mean")
            return loss, {"loss_of_mean_patch": F.mse_loss(grey.expand_as(patches), patches)}


def colour_classes(patches: Tensor, patch_size: tuple[int, int], side: int) -> Tensor:
    """The 3-bit colour class of each cell of side x side cells of a patch: b m (p q c) -> b m (side side)

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
    levels = (means * LEVELS).floor().clamp(0, LEVELS - 1).long()
    classes = levels[..., 0]
    for channel in range(1, levels.shape[-1]):
        classes = classes * LEVELS + levels[..., channel]
    return classes
