"""iBOT (Zhou et al. 2021, https://arxiv.org/abs/2111.07832): DINO, and the same for hidden patches.

The student sees the large crops with blocks of their patches hidden, the teacher sees them whole; the student predicts
the teacher's outputs for the other crops by its class token, as in DINO (dino.py has what the two share), and for its
own hidden patches by these patches. As in the official code (https://github.com/bytedance/ibot):
- Of each large crop nothing is hidden in half of all cases, else blocks of 10 to 50% of it; nothing of small crops. The
  student's class token is that of the crop with its hidden patches.
- The mask token, zeros at the start, stands for a patch before positions are added.
- One head reads class tokens and patches. Each has a centre; that of patches follows all patches of the large crops.
- The patches' loss is the mean over crops of the mean over a crop's hidden patches; a crop without any counts as 0.

Here, other than there, temperatures rise with every iteration, one pair of them is for class tokens and patches (the
code's default leaves that of class tokens at .04), and the loop keeps an epoch's last incomplete batch.
"""

from math import prod

import torch
from einops import rearrange
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.positions import PositionResize
from sslvit.models.vit import ViT
from sslvit.objectives.block_mask import Hidden, block_mask, check_masks, wanted_by_image
from sslvit.objectives.distillation import (
    LARGE,
    Distillation,
    Head,
    about_targets,
    by_view,
    cross_entropy_of_hidden,
    cross_entropy_of_pairs,
    encode_hidden,
)
from sslvit.objectives.objective import Batch
from sslvit.objectives.spread import spread
from sslvit.processes.device import send_together


class IBOT(Distillation):
    """Self-distillation of class tokens and of hidden patches.

    >>> import sslvit
    >>> objective = sslvit.IBOT(sslvit.ViT.variant("mu/8", image_size=32), outputs=64, hidden=32, bottleneck=16)
    >>> objective.readout
    'cls'
    """

    small_crops = (10, 0.05, 0.25)

    def __init__(
        self,
        backbone: ViT,
        *,
        outputs: int = 8192,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm_last_layer: bool = False,
        mask_ratios: tuple[float, float] = (0.1, 0.5),
        patch_weight: float = 1.0,
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        temperature_warmup: float = 0.0375,
        momentum: float = 0.996,
        center_momentum: float = 0.9,
        freeze_last_layer: float = 0.00125,
        drop_path: float = 0.1,
        position_resize: PositionResize = "bicubic_offset",
        seed: int = 0,
    ):
        """As of DINO. mask_ratios: the least and the largest share of a crop that is hidden, where anything is.
        patch_weight: of the patches' loss; the class tokens' has 1. Shares of training are those of 800 epochs."""
        head = Head(
            backbone.width,
            hidden=hidden,
            bottleneck=bottleneck,
            outputs=outputs,
            norm_last_layer=norm_last_layer,
            seed=seed,
        )
        super().__init__(
            backbone,
            head,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            temperature_warmup=temperature_warmup,
            momentum=momentum,
            center_momentum=center_momentum,
            freeze_last_layer=freeze_last_layer,
            drop_path=drop_path,
            position_resize=position_resize,
        )
        check_masks(backbone.grid, mask_ratios)
        self.mask_ratios, self.patch_weight = mask_ratios, patch_weight
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.width))
        self.register_buffer("patch_centre", torch.zeros(outputs))

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        crops, temperature = self.large_crops(batch), self.temperature(progress)
        hidden = send_together(self.hidden(batch.key, self.student.grid_of(crops)), crops.device)
        with torch.no_grad():
            seen = self.backbone(crops)
            logits, embeddings = self.head(seen.cls), self.head.embed(seen.patches)
            # The last layer is linear, so the mean of the logits of all patches is the logits of their mean.
            means = {"centre": logits.mean(0), "patch_centre": self.head.logits(embeddings.mean((0, 1)))}
            self.note(progress, **means)
            targets = by_view(((logits - self.centre) / temperature).softmax(-1))
            patch_logits = self.head.logits(hidden.of(embeddings))
            patch_targets = ((patch_logits - self.patch_centre) / temperature).softmax(-1)
        large, features = encode_hidden(self, crops, hidden, self.mask_token, batch)
        logits = self.student_head(features) / self.student_temperature
        loss = cross_entropy_of_pairs(targets, rearrange(logits, "(v b) k -> v b k", v=len(batch.views)))
        patch_logits = self.student_head(hidden.of(large.patches)) / self.student_temperature
        patch_loss = cross_entropy_of_hidden(patch_targets, patch_logits, hidden)
        metrics = about_targets(targets) | about_targets(patch_targets.unsqueeze(0), "patch_teacher")
        metrics |= {"divergence": loss.detach() - metrics["teacher_entropy"], "patch_loss": patch_loss.detach()}
        metrics["hidden"] = hidden.mask.to(logits.dtype).mean()
        return loss + self.patch_weight * patch_loss, metrics | spread(features[: len(batch.key)])

    def hidden(self, key: Tensor, grid: tuple[int, int]) -> Hidden:
        """What is hidden of the large crops, those of the first view first: b -> (v b) n"""
        key = torch.cat([rng.fold(key, "hidden", view) for view in range(LARGE)])
        wanted = wanted_by_image(rng.fold(key, "ratio"), prod(grid), self.mask_ratios)
        return block_mask(key, wanted, grid, least=(min(grid) // 3) ** 2)
