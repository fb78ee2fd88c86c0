"""LeJEPA (https://arxiv.org/abs/2511.08544): views agree, and their embeddings follow an isotropic Gaussian.

The loss is (1 - weight) * invariance + weight * SIGReg of the embeddings projector(backbone(view)); there is no
teacher, no stopped gradient and no schedule of its own.
- Invariance: the squared distance of each view's embedding to the mean over the large views, averaged over views,
  images and dimensions. The gradient flows through both.
- SIGReg, for each view and then averaged: the embeddings are projected onto random directions, and along each one the
  Epps-Pulley statistic compares the empirical characteristic function of all images with that of a standard normal,
  exp(-t^2 / 2): the integral over t of the squared difference times exp(-t^2 / 2), by the trapezoidal rule at 17 points
  from 0 to 3 and doubled, since it is the same for -t; times the number of images.

The number of images is that of all processes, and so are the characteristic functions. The directions are the same for
all processes and new in each step: they depend on the progress alone. Even of
Gaussian embeddings the statistic is above 0 on average.

The loss acts on the embeddings; what is read afterwards is the backbone's class token.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sslvit import rng
from sslvit.models.blocks import at_least_float32
from sslvit.models.vit import ViT
from sslvit.objectives.objective import Batch, Objective, check_class_token, check_shares, class_tokens, step_key
from sslvit.objectives.projector import projector
from sslvit.objectives.spread import scale, spread
from sslvit.processes.collectives import all_gather, processes
from sslvit.processes.device import send
from sslvit.views.batching import Size, to_pair
from sslvit.views.pretraining import EqualCrops, is_thumbnail

KNOTS, FARTHEST = 17, 3.0


class LeJEPA(Objective):
    """Agreement of several views, whose embeddings are kept Gaussian along random directions.

    >>> import sslvit
    >>> objective = sslvit.LeJEPA(sslvit.ViT.variant("mu/8", image_size=16), hidden=32, dimension=16)
    >>> objective.readout
    'cls'
    """

    couples_samples = True

    def __init__(
        self,
        backbone: ViT,
        *,
        weight: float = 0.02,
        large: int = 2,
        directions: int = 1024,
        hidden: int = 2048,
        dimension: int = 64,
        seed: int = 0,
    ):
        """weight: SIGReg's. large: how many of the views, the first ones, make the mean that all should be near.
        hidden, dimension: of the projector."""
        super().__init__()
        check_class_token(backbone, "LeJEPA")
        check_shares(weight=weight)
        if large < 1 or directions < 1:
            raise ValueError(f"large {large} and directions {directions} must be at least 1")
        self.backbone, self.readout, self.weight = backbone, "cls", weight
        self.large, self.directions = large, directions
        generator = torch.Generator().manual_seed(seed)
        widths = (backbone.width, hidden, hidden, dimension)
        self.projector = projector(*widths, generator=generator, end="linear with bias")

    def default_views(self, image_size: Size, channels: int) -> EqualCrops:
        """Small crops have half the side of large ones, and 98 of 224 px above thumbnails, in whole patches."""
        thumbnail = is_thumbnail(image_size)
        sides = [side * (1 / 2 if thumbnail else 98 / 224) for side in to_pair(image_size)]
        height, width = (max(round(s / p), 1) * p for s, p in zip(sides, self.backbone.patch_size, strict=True))
        small, (least, middle) = (4, (0.25, 0.6)) if thumbnail else (6, (0.05, 0.3))
        return EqualCrops(
            image_size, scale=(middle, 1.0), color=channels in (1, 3), large=self.large,
            small=small, small_size=(height, width), small_scale=(least, middle),
        )  # fmt: skip

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        if len(batch.views) < max(self.large, 2):
            raise ValueError(f"LeJEPA needs at least {max(self.large, 2)} views of an image, not {len(batch.views)}")
        features = self.encode(batch)
        embeddings = rearrange(self.projector(features), "(v b) d -> v b d", v=len(batch.views))
        with torch.autocast(features.device.type, enabled=False):  # cosines of many radians need digits
            embeddings = embeddings.to(at_least_float32(embeddings.dtype))
            invariance = (embeddings - embeddings[: self.large].mean(0)).square().mean()
            gaussian = sigreg(embeddings, self.draw(progress, embeddings))
        loss = (1 - self.weight) * invariance + self.weight * gaussian
        metrics = {"invariance": invariance.detach(), "sigreg": gaussian.detach()}
        metrics |= {"embedding_std": scale(embeddings[0])} | spread(features[: len(batch.key)])
        return loss, metrics

    def encode(self, batch: Batch) -> Tensor:
        """The class tokens of all views, each size in one pass: (v b) d"""
        views = [(view, rng.fold(batch.key, "view", number)) for number, view in enumerate(batch.views)]
        return class_tokens(self.backbone, views)

    @torch.no_grad()
    def draw(self, progress: float, like: Tensor) -> Tensor:
        """Random unit vectors, columns of length 1: d m"""
        key = send(step_key("directions", progress), like.device)
        return F.normalize(rng.normal(key, like.shape[-1], self.directions).to(like.dtype), dim=0)


def sigreg(embeddings: Tensor, directions: Tensor) -> Tensor:
    """The mean Epps-Pulley statistic over directions and views: v b d, d m -> ()"""
    t = torch.linspace(0, FARTHEST, KNOTS, dtype=embeddings.dtype, device=embeddings.device)
    normal = (-t.square() / 2).exp()
    weights = 2 * FARTHEST / (KNOTS - 1) * normal
    weights[0], weights[-1] = weights[0] / 2, weights[-1] / 2
    angles = (embeddings @ directions).unsqueeze(-1) * t  # v b m t
    here = torch.stack([angles.cos().mean(1), angles.sin().mean(1)])  # cs v m t
    real, imaginary = all_gather(here.unsqueeze(0)).mean(0)
    distance = (real - normal).square() + imaginary.square()
    return (distance @ weights).mean() * embeddings.shape[1] * processes()
