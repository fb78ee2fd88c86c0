"""MoCo v3 (https://arxiv.org/abs/2104.02057): contrastive learning with a teacher and large batches.

A query is predictor(projector(backbone(view))) of the student; a key is projector(backbone(other view)) of the teacher,
a moving average of the student. Each query must identify its own key among those of the batch over all processes. As in
the official code (https://github.com/facebookresearch/moco-v3):
- Linear layers of the heads have no biases, and both heads end in a batch norm without weights.
- Each view has its own batch statistics, and so has the teacher, which stays in training mode.
- The loss is multiplied by twice the temperature, for which the paper's learning rate is chosen.
- The patch projection is never trained; positions are fixed, with a backbone of position "sincos_moco_v3".

The official code moves the teacher before it computes the keys. `after_step` does so after the step before, with the
same weights and, its progress being that of the next step, the same momentum, so the keys are the same. The official
move before the first step (the teacher is the student) and ours after the last (the momentum is 1) change nothing.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslvit import rng
from sslvit.models.blocks import at_least_float32
from sslvit.models.vit import ViT
from sslvit.objectives import schedule
from sslvit.objectives.objective import Batch, Objective, check_class_token, check_shares
from sslvit.objectives.projector import projector
from sslvit.objectives.spread import deviation, spread
from sslvit.objectives.teacher import ema_update, frozen_copy
from sslvit.processes.collectives import all_gather, rank
from sslvit.views.batching import Size
from sslvit.views.pretraining import ContrastivePair, is_thumbnail


class MoCoV3(Objective):
    """Contrastive learning of two views, with a teacher and the batch as negatives.

    >>> import sslvit
    >>> objective = sslvit.MoCoV3(sslvit.ViT.variant("mu/8", image_size=16), hidden=32, dimension=16)
    >>> objective.readout
    'cls'
    """

    couples_samples = True

    def __init__(
        self,
        backbone: ViT,
        *,
        temperature: float = 0.2,
        momentum: float = 0.99,
        hidden: int = 4096,
        dimension: int = 256,
        freeze_patch_projection: bool = True,
        chunks: int = 1,
        seed: int = 0,
    ):
        """momentum: the teacher's at first; it rises to 1 by half a cosine. hidden, dimension: widths of both heads.
        chunks: the backbone sees the batch in this many chunks, and again in the backward pass, which saves memory; the
        heads and the loss see the whole batch, so the loss is unchanged."""
        super().__init__()
        check_class_token(backbone, "MoCo v3")
        check_shares(momentum=momentum)
        if not temperature > 0 or chunks < 1:
            raise ValueError(f"temperature {temperature} must be above 0, chunks {chunks} at least 1")
        self.backbone, self.readout = backbone, "cls"
        self.temperature, self.momentum, self.chunks = temperature, momentum, chunks
        if freeze_patch_projection:
            backbone.patch_embed.proj.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self.projector = projector(backbone.width, hidden, hidden, dimension, generator=generator)
        self.predictor = projector(dimension, hidden, dimension, generator=generator)
        self.teacher_backbone, self.teacher_projector = frozen_copy(backbone), frozen_copy(self.projector)

    @property
    def teacher(self) -> nn.Module:
        return self.teacher_backbone

    def default_views(self, image_size: Size, channels: int) -> ContrastivePair:
        least = 0.5 if is_thumbnail(image_size) else 0.08
        return ContrastivePair(image_size, scale=(least, 1.0), color=channels in (1, 3))

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        if len(batch.views) != 2:
            raise ValueError(f"MoCo v3 needs 2 views of an image, not {len(batch.views)}")
        features = self.read(self.backbone, batch, "student")
        query_1, query_2 = (self.predictor(self.projector(x)) for x in features)
        with torch.no_grad():
            key_1, key_2 = (self.teacher_projector(x) for x in self.read(self.teacher_backbone, batch, "teacher"))
        loss_1, metrics_1 = self.contrast(query_1, key_2)
        loss_2, metrics_2 = self.contrast(query_2, key_1)
        metrics = {name: (metrics_1[name] + metrics_2[name]) / 2 for name in metrics_1}
        metrics |= {"embedding_std": deviation(query_1)} | spread(features[0])
        return loss_1 + loss_2, metrics

    def read(self, backbone: ViT, batch: Batch, name: str) -> list[Tensor]:
        """The class token of each view: b d"""

        def cls(images: Tensor, key: Tensor) -> Tensor:
            return backbone(images, key).cls

        return [
            in_chunks(cls, images, rng.fold(batch.key, name, view), chunks=self.chunks)
            for view, images in enumerate(batch.views)
        ]

    def contrast(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross entropy of each query's own key among the keys of all images."""
        # bfloat16 has three digits, and the temperature magnifies its errors.
        with torch.autocast(queries.device.type, enabled=False):
            wide = at_least_float32(queries.dtype)
            queries, keys = F.normalize(queries.to(wide), dim=-1), F.normalize(keys.to(wide), dim=-1)
            cosines = queries @ all_gather(keys).T
        own = torch.arange(len(queries), device=queries.device) + len(queries) * rank()
        loss = 2 * self.temperature * F.cross_entropy(cosines / self.temperature, own)
        with torch.no_grad():  # alignment and uniformity: https://arxiv.org/abs/2005.10242
            accuracy = (cosines.argmax(-1) == own).to(wide).mean()
            alignment = 2 - 2 * (queries * keys).sum(-1).mean()
            uniformity = (4 * cosines - 4).exp().mean().log()
        return loss, {"accuracy": accuracy, "alignment": alignment, "uniformity": uniformity}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        momentum = schedule.cosine(progress, self.momentum, 1.0)
        ema_update(self.teacher_backbone, self.backbone, momentum)
        ema_update(self.teacher_projector, self.projector, momentum)


def in_chunks(compute: Callable[[Tensor, Tensor], Tensor], images: Tensor, key: Tensor, *, chunks: int) -> Tensor:
    """compute(images, key) in chunks, which are computed again in the backward pass."""
    if chunks == 1:
        return compute(images, key)
    outputs = [
        # All draws come from the key, so the state of torch's generators need not be saved.
        checkpoint(compute, chunk, chunk_key, use_reentrant=False, preserve_rng_state=False)
        for chunk, chunk_key in zip(images.chunk(chunks), key.chunk(chunks), strict=True)
    ]
    return torch.cat(outputs)
