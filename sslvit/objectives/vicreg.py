"""VICReg (https://arxiv.org/abs/2105.04906): views agree, each dimension varies, and no two say the same.

No teacher, no negatives: of the embeddings expander(backbone(view)) three terms are summed, as in the official code
(https://github.com/facebookresearch/vicreg):
- invariance, the mean squared difference of the two views;
- variance, the mean over dimensions of how much each standard deviation, sqrt(var + 1e-4), falls short of 1, and over
  both views;
- covariance, the squared covariances of different dimensions, summed and divided by their number, summed over views.

Variances and covariances, with n - 1 in the denominator, are of the images of all processes. Each view has its own
batch statistics in the expander. Other than there, the backbone is a ViT, of which the class token is read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit import rng
from sslvit.models.blocks import at_least_float32
from sslvit.models.vit import ViT
from sslvit.objectives.objective import Batch, Objective, check_class_token, check_views
from sslvit.objectives.projector import projector
from sslvit.objectives.spread import scale, spread
from sslvit.processes.collectives import all_gather
from sslvit.views.batching import Size
from sslvit.views.pretraining import ContrastivePair, is_thumbnail


class VICReg(Objective):
    """Agreement of two views, with variance and covariance of the embeddings kept from collapsing.

    >>> import sslvit
    >>> objective = sslvit.VICReg(sslvit.ViT.variant("mu/8", image_size=16), dimension=32)
    >>> objective.readout
    'cls'
    """

    couples_samples = True

    def __init__(
        self,
        backbone: ViT,
        *,
        dimension: int = 8192,
        weights: tuple[float, float, float] = (25.0, 25.0, 1.0),
        seed: int = 0,
    ):
        """dimension: of all three layers of the expander. weights: of invariance, variance and covariance."""
        super().__init__()
        check_class_token(backbone, "VICReg")
        if min(weights) < 0:
            raise ValueError(f"weights {weights} must not be negative")
        self.backbone, self.readout, self.weights = backbone, "cls", weights
        generator = torch.Generator().manual_seed(seed)
        self.expander = projector(backbone.width, *[dimension] * 3, generator=generator, end="linear")

    def default_views(self, image_size: Size, channels: int) -> ContrastivePair:
        least = 0.5 if is_thumbnail(image_size) else 0.08
        return ContrastivePair(image_size, scale=(least, 1.0), color=channels in (1, 3), interpolation="bicubic")

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        check_views(batch, 2)
        keys = torch.cat([rng.fold(batch.key, "view", view) for view in range(2)])
        features = self.backbone(torch.cat(batch.views), keys).cls.chunk(2)
        first, second = (self.expander(x) for x in features)
        with torch.autocast(first.device.type, enabled=False):  # covariances in bfloat16 would have three digits
            wide = at_least_float32(first.dtype)
            first, second = first.to(wide), second.to(wide)
            invariance = F.mse_loss(first, second)
            everywhere = [all_gather(x) for x in (first, second)]
            variance = sum(shortfall(x) for x in everywhere) / 2
            covariance = sum(redundancy(x) for x in everywhere)
        terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
        loss = sum(weight * term for weight, term in zip(self.weights, terms.values(), strict=True))
        metrics = {name: term.detach() for name, term in terms.items()}
        return loss, metrics | {"embedding_std": scale(first)} | spread(features[0])


def shortfall(embeddings: Tensor) -> Tensor:
    """By how much the standard deviations of the dimensions are below 1, on average: n d -> ()"""
    return F.relu(1 - (embeddings.var(0) + 1e-4).sqrt()).mean()


def redundancy(embeddings: Tensor) -> Tensor:
    """The squared covariances of each dimension with all others, averaged over dimensions: n d -> ()"""
    n, d = embeddings.shape
    centred = embeddings - embeddings.mean(0)
    covariance = centred.T @ centred / (n - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / d
