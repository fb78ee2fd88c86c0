"""DINO: self-distillation with no labels (Caron et al. 2021, https://arxiv.org/abs/2104.14294).

A student sees all crops of an image and a teacher the two large ones; from every crop the student predicts the outputs
of the teacher for the others. The teacher is the student's moving average. Two things prevent a collapse: its logits
are centred (no output wins for all images) and sharpened by a low temperature (outputs are not uniform).

In the order of the official code (https://github.com/facebookresearch/dino), with iterations i = 0, 1, ... of T:
- The loss of iteration i uses the centre of earlier iterations, which then moves towards the mean of the teacher's
  logits, before the temperature divides them, over both large crops of all processes.
- After the optimizer's step i the teacher keeps the share m(i / T) of itself; m rises from 0.996 to 1 by half a cosine.
  This is the progress of the step just taken, not of the next, so the last step still moves the teacher a little.
- The teacher runs in training mode but without drop path; it starts as a copy of the student.
- Positions of small crops are resized by plain bicubic interpolation with an offset of 0.1 patches.

Here, other than there, the teacher's temperature rises with every iteration, not every epoch (a difference of at most
0.001 for .04 to .07 in 30 epochs), and the loop keeps an epoch's last incomplete batch.
"""

import torch
from einops import rearrange
from torch import Tensor

from sslvit.models.positions import PositionResize
from sslvit.models.vit import ViT
from sslvit.objectives.distillation import Distillation, Head, about_targets, by_view, cross_entropy_of_pairs
from sslvit.objectives.objective import Batch
from sslvit.objectives.spread import spread


class DINO(Distillation):
    """Self-distillation: a student learns from a teacher, its moving average, over crops of an image.

    >>> import sslvit
    >>> objective = sslvit.DINO(sslvit.ViT.variant("mu/8", image_size=16), outputs=64, hidden=32, bottleneck=16)
    >>> objective.readout
    'cls'
    """

    def __init__(
        self,
        backbone: ViT,
        *,
        outputs: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm_last_layer: bool = True,
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        temperature_warmup: float = 0.3,
        momentum: float = 0.996,
        center_momentum: float = 0.9,
        freeze_last_layer: float = 0.01,
        drop_path: float = 0.1,
        position_resize: PositionResize = "bicubic_offset",
        seed: int = 0,
    ):
        """The backbone becomes the teacher's, which is exported; the student starts as its copy with drop path.

        teacher_temperature: at the start, and after the share temperature_warmup of training. norm_last_layer: True for
        the paper's ViT-B, False for its best ViT-S. freeze_last_layer: the share of training, the paper's first epoch,
        in which the student's last layer is not trained. position_resize: of both networks, whatever it was.
        """
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

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        large = self.large_crops(batch)
        with torch.no_grad():
            logits = self.head(self.backbone(large).cls)
            self.note(progress, centre=logits.mean(0))
            targets = by_view(((logits - self.centre) / self.temperature(progress)).softmax(-1))
        features = self.encode(batch)
        logits = self.student_head(features) / self.student_temperature
        loss = cross_entropy_of_pairs(targets, rearrange(logits, "(v b) k -> v b k", v=len(batch.views)))
        metrics = about_targets(targets)
        metrics["divergence"] = loss.detach() - metrics["teacher_entropy"]
        return loss, metrics | spread(features[: len(batch.key)])
