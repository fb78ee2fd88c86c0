"""SimCLR (https://arxiv.org/abs/2002.05709): two views of an image agree, and differ from all others of the batch.

Each embedding, projector(backbone(view)), must identify that of the other view of its image among all others: those of
both views of the images of all processes. As in the official code (https://github.com/google-research/simclr):
- The projector has batch norm behind each linear layer; behind the last one with a scale, but without a shift.
- Batch statistics are those of both views together.
- The backbone is read before the projector, which is thrown away.

Other than there, the backbone is a ViT, of which the class token is read; the head's width need not be the backbone's;
weights are drawn by torch's rule; and the loss is the mean over both views, which is half of their sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit import rng
from sslvit.models.blocks import at_least_float32
from sslvit.models.vit import ViT
from sslvit.objectives.objective import Batch, Objective, check_class_token, check_views
from sslvit.objectives.projector import projector
from sslvit.objectives.spread import deviation, spread
from sslvit.processes.collectives import all_gather, processes, rank
from sslvit.views.batching import Size
from sslvit.views.pretraining import StrongPair, is_thumbnail


class SimCLR(Objective):
    """Contrastive learning of two views, with the rest of the batch as negatives and without a teacher.

    >>> import sslvit
    >>> objective = sslvit.SimCLR(sslvit.ViT.variant("mu/8", image_size=16), hidden=32, dimension=16)
    >>> objective.readout
    'cls'
    """

    couples_samples = True

    def __init__(
        self,
        backbone: ViT,
        *,
        temperature: float = 0.1,
        hidden: int = 2048,
        dimension: int = 128,
        layers: int = 2,
        seed: int = 0,
    ):
        """hidden, dimension, layers: of the projector."""
        super().__init__()
        check_class_token(backbone, "SimCLR")
        if not temperature > 0 or layers < 1:
            raise ValueError(f"temperature {temperature} must be above 0, layers {layers} at least 1")
        self.backbone, self.readout, self.temperature = backbone, "cls", temperature
        generator = torch.Generator().manual_seed(seed)
        widths = (backbone.width, *[hidden] * (layers - 1), dimension)
        self.projector = projector(*widths, generator=generator, end="scaled norm")

    def default_views(self, image_size: Size, channels: int) -> StrongPair:
        least, strength = (0.5, 0.5) if is_thumbnail(image_size) else (0.08, 1.0)
        return StrongPair(image_size, scale=(least, 1.0), color=channels in (1, 3), strength=strength)

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        check_views(batch, 2)
        keys = torch.cat([rng.fold(batch.key, "view", view) for view in range(2)])
        features = self.backbone(torch.cat(batch.views), keys).cls
        embeddings = self.projector(features)
        loss, metrics = nt_xent(embeddings, self.temperature)
        metrics |= {"embedding_std": deviation(embeddings)} | spread(features[: len(batch.key)])
        return loss, metrics


def nt_xent(embeddings: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The cross entropy of each embedding's partner among all others: (view b) d, of two views."""
    if embeddings.shape[0] * processes() < 4:
        raise ValueError("a contrastive loss needs two images at least: a single one has nothing to differ from")
    # bfloat16 has three digits, and the temperature magnifies its errors.
    with torch.autocast(embeddings.device.type, enabled=False):
        wide = at_least_float32(embeddings.dtype)
        own = F.normalize(embeddings.to(wide), dim=-1)
        cosines = own @ all_gather(own).T
    here = torch.arange(len(own), device=own.device)
    first = len(own) * rank()  # of the columns
    partner = (here + len(own) // 2) % len(own)
    logits = cosines / temperature
    itself = F.one_hot(first + here, logits.shape[1]).bool()
    logits = logits.masked_fill(itself, -torch.inf)
    loss = F.cross_entropy(logits, first + partner)
    with torch.no_grad():  # alignment and uniformity: https://arxiv.org/abs/2005.10242
        accuracy = (logits.argmax(-1) == first + partner).to(wide).mean()
        alignment = 2 - 2 * (own * own[partner]).sum(-1).mean()
        nearness = (4 * cosines - 4).exp().masked_fill(itself, 0.0)
        uniformity = (nearness.sum() / (itself.numel() - len(own))).log()
    return loss, {"accuracy": accuracy, "alignment": alignment, "uniformity": uniformity}
