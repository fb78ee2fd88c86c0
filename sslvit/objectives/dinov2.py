"""DINOv2 (Oquab et al. 2023, https://arxiv.org/abs/2304.07193): DINO and iBOT together, and features kept apart.

dino.py describes student and teacher, ibot.py the hidden patches. What differs from these is as in the official code
(https://github.com/facebookresearch/dinov2):
- Exactly half of the large crops, here of all processes together, have hidden patches. Their shares come from equal
  bins of 10 to 50%, one each; a block aims at 4 patches or more while as many are left.
- The patches' centre follows the hidden patches alone. Class tokens and patches share a head, or have one each.
- Instead of centred and sharpened the teacher's outputs may be assigned by Sinkhorn and Knopp, over all processes.
- KoLeo, -log of the distance of a class token, l2-normalised, before the head, to the nearest other one of the same
  crop, is summed over both large crops. There the others are those of a GPU. Here they are those of its group of
  koleo_group (64) consecutive images, so that the number of processes does not matter as long as a group is in one.
- The patch embedding has a fifth of the learning rate (with layer decay: besides).
- With gram_weight, Gram anchoring as in DINOv3, there with a weight of 2: gram.py.

Here, other than there:
- The optimizer leaves out the last layer at first, where theirs has a rate of 0 for it.
- Without small crops the loss of class tokens is not multiplied by 2/3.
- Gradients are clipped together or one by one, not by network; the mask token has no layer decay.
- Drop path grows linearly over the blocks and is drawn for each crop; there it is the same in all blocks and leaves out
  a fixed share of a batch.
- The patches' centre weighs processes by their hidden patches.
- Crops are blurred as in DINO; their code blurs the first large one never, and the second in nine of ten cases.
"""

from math import prod

import torch
from einops import rearrange
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.positions import PositionResize
from sslvit.models.vit import ViT
from sslvit.objectives.block_mask import Hidden, block_mask, check_masks, wanted_by_batch
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
from sslvit.objectives.gram import GramAnchor, check_gram
from sslvit.objectives.koleo import nearest
from sslvit.objectives.objective import Batch
from sslvit.objectives.sinkhorn import sinkhorn
from sslvit.objectives.spread import spread
from sslvit.objectives.teacher import frozen_copy
from sslvit.processes import collectives
from sslvit.processes.device import send_together


class DINOv2(Distillation):
    """Self-distillation of class tokens and of hidden patches, with features spread apart.

    >>> import sslvit
    >>> objective = sslvit.DINOv2(sslvit.ViT.variant("mu/8", image_size=32), outputs=64, hidden=32, bottleneck=16)
    >>> objective.readout
    'cls'
    """

    couples_samples = True
    small_crops = (8, 0.05, 0.32)

    def __init__(
        self,
        backbone: ViT,
        *,
        outputs: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        patch_head: tuple[int, int, int] | None = None,
        norm_last_layer: bool = False,
        assignment: str = "centering",
        mask_ratios: tuple[float, float] = (0.1, 0.5),
        mask_probability: float = 0.5,
        patch_weight: float = 1.0,
        koleo_weight: float = 0.1,
        koleo_group: int = 64,
        gram_weight: float = 0.0,
        gram_start: float = 0.5,
        gram_every: float = 0.1,
        gram_renewals: int = 3,
        patch_rate: float = 0.2,
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        temperature_warmup: float = 0.3,
        momentum: float = 0.992,
        center_momentum: float = 0.9,
        freeze_last_layer: float = 0.01,
        drop_path: float = 0.3,
        position_resize: PositionResize = "bicubic_offset",
        seed: int = 0,
    ):
        """As of DINO and iBOT, with the numbers of its short schedule on ImageNet. patch_head: widths of the patches'
        own head, its hidden layers, bottleneck and output. assignment: centering or sinkhorn. koleo_group: how many
        images are compared. gram_start, gram_every: shares of training after which Gram anchoring begins, and after
        which its teacher is renewed, as often as gram_renewals. patch_rate: what the patch embedding's learning rate is
        multiplied by."""
        if assignment not in ("centering", "sinkhorn"):
            raise ValueError(f"assignment must be centering or sinkhorn, got {assignment!r}")
        if koleo_group < 2:
            raise ValueError(f"koleo_group {koleo_group}: an image is compared with others of a group of 2 or more")
        if gram_weight < 0:
            raise ValueError(f"gram_weight {gram_weight} must be at least 0")
        check_masks(backbone.grid, mask_ratios)
        check_gram(gram_start, gram_every)

        def head(hidden: int, bottleneck: int, outputs: int, seed: int) -> Head:
            sizes = {"hidden": hidden, "bottleneck": bottleneck, "outputs": outputs}
            return Head(backbone.width, **sizes, norm_last_layer=norm_last_layer, seed=seed)

        super().__init__(
            backbone,
            head(hidden, bottleneck, outputs, seed),
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            temperature_warmup=temperature_warmup,
            momentum=momentum,
            center_momentum=center_momentum,
            freeze_last_layer=freeze_last_layer,
            drop_path=drop_path,
            position_resize=position_resize,
        )
        self.student_patch_head = head(*patch_head, seed + 1) if patch_head else None
        self.patch_head = frozen_copy(self.student_patch_head) if self.student_patch_head else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.width))
        self.register_buffer("patch_centre", torch.zeros(patch_head[2] if patch_head else outputs))
        self.assignment, self.mask_ratios, self.mask_probability = assignment, mask_ratios, mask_probability
        self.patch_weight, self.koleo_weight, self.koleo_group = patch_weight, koleo_weight, koleo_group
        self.gram_weight, self.patch_rate = gram_weight, patch_rate
        self.gram = GramAnchor(self.backbone, gram_start, gram_every, gram_renewals) if gram_weight else None

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        own = [(self.patch_head, self.student_patch_head)] if self.patch_head and self.student_patch_head else []
        return [*super().pairs(), *own]

    def rate_factor(self, name: str) -> float:
        return self.patch_rate if name.startswith("patch_embed.") else 1.0

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        crops, temperature = self.large_crops(batch), self.temperature(progress)
        hidden = send_together(self.hidden(batch.key, self.student.grid_of(crops), crops.device), crops.device)
        with torch.no_grad():
            seen = self.backbone(crops)
            logits, patch_logits = self.head(seen.cls), (self.patch_head or self.head)(hidden.of(seen.patches))
            targets = by_view(self.assigned(logits, self.centre, temperature))
            patch_targets = self.assigned(patch_logits, self.patch_centre, temperature)
            self.note_centres(logits, patch_logits, progress)
        large, features = encode_hidden(self, crops, hidden, self.mask_token, batch)
        logits = self.student_head(features) / self.student_temperature
        loss = cross_entropy_of_pairs(targets, rearrange(logits, "(v b) k -> v b k", v=len(batch.views)))
        patch_logits = (self.student_patch_head or self.student_head)(hidden.of(large.patches))
        patch_loss = cross_entropy_of_hidden(patch_targets, patch_logits / self.student_temperature, hidden)
        distances = torch.cat([nearest(crop, self.koleo_group) for crop in features[: len(crops)].chunk(LARGE)])
        koleo = -LARGE * (distances + 1e-8).log().sum() / len(crops)
        metrics = about_targets(targets) | about_targets(patch_targets.unsqueeze(0), "patch_teacher")
        metrics |= {"divergence": loss.detach() - metrics["teacher_entropy"], "patch_loss": patch_loss.detach()}
        metrics |= {"koleo": koleo.detach(), "nearest_distance": distances.detach().sum() / len(crops)}
        total = loss + self.patch_weight * patch_loss + self.koleo_weight * koleo
        if self.gram is not None and self.gram.teachers(progress):
            gram = self.gram(large.patches, crops)
            total, metrics = total + self.gram_weight * gram, metrics | {"gram": gram.detach()}
        return total, metrics | spread(features[: len(batch.key)])

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        if self.gram is not None:
            self.gram.follow(self.backbone, progress)

    def hidden(self, key: Tensor, grid: tuple[int, int], device: torch.device = collectives.CPU) -> Hidden:
        """What is hidden of the large crops, those of the first view first: b -> (v b) n. device: where processes can
        exchange numbers."""
        key = torch.cat([rng.fold(key, "hidden", view) for view in range(LARGE)])
        wanted = wanted_by_batch(key, prod(grid), self.mask_ratios, self.mask_probability, device)
        return block_mask(key, wanted, grid, least=4)

    def assigned(self, logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
        """The teacher's outputs: m k -> m k"""
        if self.assignment == "sinkhorn":
            return sinkhorn(logits, temperature)
        return ((logits - centre) / temperature).softmax(-1)

    def note_centres(self, logits: Tensor, patch_logits: Tensor, progress: float) -> None:
        if self.assignment == "sinkhorn":
            return self.note(progress)
        counted = torch.cat([patch_logits.sum(0), patch_logits.new_full((1,), len(patch_logits))])
        total, count = collectives.all_mean(counted).tensor_split([-1])
        mean = torch.where(count > 0, total / count.clamp(min=1e-6), self.patch_centre)
        self.note(progress, centre=logits.mean(0), patch_centre=mean)
