"""Gram anchoring, as in DINOv3 (https://arxiv.org/abs/2508.10104): patches relate as they did in an earlier teacher.

The cosines between all patches of a large crop stay near those of that teacher, by the mean squared difference;
negative ones count too. The student's crop has hidden patches, that teacher's has none. It is the teacher as it is when
this begins, renewed at most three times. There it sees the crop at twice the resolution, here at the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslvit.models.blocks import at_least_float32
from sslvit.models.vit import ViT
from sslvit.objectives.objective import check_shares
from sslvit.objectives.teacher import ema_update, frozen_copy


def check_gram(start: float, every: float) -> None:
    if every <= 0:
        raise ValueError(f"gram_every {every} must be above 0")
    check_shares(gram_start=start)


class GramAnchor(nn.Module):
    """start, every: shares of training after which it begins, and after which its teacher is renewed, so many times."""

    def __init__(self, teacher: ViT, start: float, every: float, renewals: int):
        super().__init__()
        self.start, self.every, self.renewals = start, every, renewals
        self.backbone = frozen_copy(teacher)
        self.register_buffer("taken", torch.tensor(self.teachers(0.0)))  # how often a teacher was
        self.known_taken: int | None = None
        self.register_load_state_dict_post_hook(forget_taken)

    def teachers(self, progress: float) -> int:
        """How often a teacher has become this one by this progress; 0 before it begins."""
        since = (progress - self.start) / self.every + 1e-9  # a step's share of training is rounded
        return 1 + min(int(since), self.renewals) if since >= 0 else 0

    def forward(self, patches: Tensor, crops: Tensor) -> Tensor:
        """The loss of the student's patches of these crops."""
        with torch.no_grad():
            anchor = self.backbone(crops).patches
        return gram_loss(patches, anchor)

    @torch.no_grad()
    def follow(self, teacher: ViT, progress: float) -> None:
        """After a step: becomes the teacher when it is time to."""
        if self.known_taken is None:
            self.known_taken = int(self.taken)  # once: a device would be waited for
        if self.teachers(progress) > self.known_taken:
            ema_update(self.backbone, teacher, 0.0)
            self.known_taken = self.teachers(progress)
            self.taken.fill_(self.known_taken)


def forget_taken(anchor: GramAnchor, keys: object) -> None:
    anchor.known_taken = None


def gram_loss(patches: Tensor, anchor: Tensor) -> Tensor:
    """The mean squared difference of the cosines between the patches of each image: b n d, b n d -> ()"""
    with torch.autocast(patches.device.type, enabled=False):
        kind = at_least_float32(patches.dtype)
        ours, theirs = (F.normalize(each.to(kind), dim=-1) for each in (patches, anchor))
        return F.mse_loss(ours @ ours.mT, theirs @ theirs.mT)
