"""Segmentation: a head on the patches of a ViT, trained with the classes of pixels.

linear: batch norm and one linear layer, as in the linear protocol of DINOv2 and DINOv3 (mmsegmentation's decode head
with a kernel of 1, weights N(0, 0.01)). pyramid: four blocks, evenly spaced, at 4, 2, 1 and 1/2 times the resolution of
the patches, made alike by a linear layer and a norm each, added at the finest and smoothed by a 3 x 3 convolution: no
adapter, and few weights. Scores are enlarged bilinearly to the mask; the loss is the mean cross-entropy over all pixels
of all processes that are not ignored (mmsegmentation divides by all pixels of each process).
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sslvit import rng
from sslvit.errors import DataError
from sslvit.models.blocks import at_least_float32
from sslvit.models.vit import ViT
from sslvit.objectives.batch_norm import BatchNorm
from sslvit.objectives.objective import Batch, Objective, check_vit
from sslvit.processes import collectives
from sslvit.views.batching import Size
from sslvit.views.segmentation import IGNORED, SegmentationView

HeadKind = Literal["linear", "pyramid"]
LEVELS = (4.0, 2.0, 1.0, 0.5)  # resolutions of the pyramid over that of the patches


def feature_maps(backbone: ViT, images: Tensor, layers: int | Sequence[int] = 1, key: Tensor | None = None) -> Tensor:
    """The patches of the last N blocks, or of these blocks, side by side: b c H W -> b (l d) h w"""
    height = backbone.grid_of(images)[0]
    if layers == 1:
        encoded = [backbone(images) if key is None else backbone(images, key)]
    else:
        encoded = backbone.intermediate(images, layers if isinstance(layers, int) else sorted(set(layers)), key=key)
    if not isinstance(layers, int):  # a shallow ViT gives one block to several levels
        encoded = [encoded[sorted(set(layers)).index(layer)] for layer in layers]
    return torch.cat([rearrange(one.patches, "b (h w) d -> b d h w", h=height) for one in encoded], 1)


class NormOverPixels(BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        """b d h w -> b d h w"""
        b, _, h, _ = x.shape
        return rearrange(super().forward(rearrange(x, "b d h w -> (b h w) d")), "(b h w) d -> b d h w", b=b, h=h)


class LinearHead(nn.Module):
    """b (l d) h w -> b classes h w"""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm, self.classify = NormOverPixels(width), nn.Conv2d(width, classes, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.classify(self.norm(maps))


class PyramidHead(nn.Module):
    """b (4 d) h w -> b classes (4 h) (4 w)"""

    def __init__(self, width: int, classes: int, channels: int = 128):
        super().__init__()
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width // len(LEVELS), channels, 1), NormOverPixels(channels), nn.GELU())
            for _ in LEVELS
        )
        self.smooth = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), NormOverPixels(channels), nn.GELU())
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Tensor) -> Tensor:
        finest = [round(LEVELS[0] * side) for side in maps.shape[2:]]
        total: Tensor | float = 0.0
        for level, lateral, part in zip(LEVELS, self.lateral, maps.chunk(len(LEVELS), 1), strict=True):
            part = F.interpolate(part, scale_factor=level, mode="bilinear") if level > 1 else part
            part = F.max_pool2d(part, round(1 / level), ceil_mode=True) if level < 1 else part
            total = total + F.interpolate(lateral(part), finest, mode="bilinear")
        return self.classify(self.smooth(total))


HEADS: dict[HeadKind, type[LinearHead] | type[PyramidHead]] = {"linear": LinearHead, "pyramid": PyramidHead}


class Segmentation(Objective):
    """Classes of pixels by a head on a ViT's patches.

    >>> import sslvit, torch
    >>> objective = sslvit.Segmentation(sslvit.ViT.variant("mu/8", image_size=32), classes=5)
    >>> objective.scores(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 5, 4, 4])
    """

    uses_labels = True
    couples_samples = True  # batch norm

    def __init__(self, backbone: ViT, *, classes: int, head: HeadKind = "linear", blocks: int = 1, seed: int = 0):
        """blocks: of the linear head, how many last blocks it reads."""
        super().__init__()
        check_vit(backbone, "segmentation")
        if classes < 2:
            raise DataError(f"{classes} class leaves nothing to segment: at least 2 are needed")
        self.backbone, self.readout, self.classes = backbone, "mean", classes
        self.layers: int | list[int] = blocks
        if head == "pyramid":
            self.layers = [max(0, round(backbone.depth * (i + 1) / len(LEVELS)) - 1) for i in range(len(LEVELS))]
        width = backbone.width * (self.layers if isinstance(self.layers, int) else len(self.layers))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = HEADS[head](width, classes)
            nn.init.normal_(self.head.classify.weight, std=0.01)
            nn.init.zeros_(self.head.classify.bias)

    def default_views(self, image_size: Size, channels: int) -> SegmentationView:
        return SegmentationView(image_size)

    def scores(self, images: Tensor, key: Tensor | None = None) -> Tensor:
        """b c H W -> b classes h w, at the head's resolution. key: for drop path, b"""
        return self.head(feature_maps(self.backbone, images, self.layers, key))

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        images, masks = batch.views
        truth = (masks[:, 0] * IGNORED).round().long()
        scores = self.scores(images, rng.fold(batch.key, "backbone")).to(at_least_float32(images.dtype))
        scores = F.interpolate(scores, truth.shape[1:], mode="bilinear")
        seen = truth != IGNORED
        count = collectives.all_mean(seen.sum().to(scores.dtype)).clamp(min=1)
        loss = F.cross_entropy(scores, truth, ignore_index=IGNORED, reduction="sum") / count
        with torch.no_grad():
            accuracy = ((scores.argmax(1) == truth) & seen).sum() / count
        return loss, {"accuracy": accuracy}
