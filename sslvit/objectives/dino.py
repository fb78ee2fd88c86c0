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
0.001 for .04 to .07 in 30 epochs), and as in all but MoCo v3 the loop keeps an epoch's last incomplete batch.
"""

from dataclasses import replace
from itertools import groupby

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.positions import PositionResize
from sslvit.models.vit import ViT
from sslvit.objectives import schedule
from sslvit.objectives.objective import Batch, Objective, check_shares
from sslvit.objectives.spread import spread
from sslvit.objectives.teacher import ema_update, frozen_copy
from sslvit.processes import collectives
from sslvit.views.batching import Size, to_pair
from sslvit.views.pretraining import MultiCrop, is_thumbnail

LARGE = 2  # the first two views of a batch are the large crops, which the teacher sees too


class Head(nn.Module):
    """Three layers, l2 normalisation, then a layer without bias whose rows have lengths of their own: b d -> b k

    Row k of the last layer is weight_g[k] * weight_v[k] / |weight_v[k]|. The lengths start at 1 and, with
    norm_last_layer, stay there: then the logits are cosines.
    """

    def __init__(self, width: int, *, hidden: int, bottleneck: int, outputs: int, norm_last_layer: bool, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):  # torch's layers draw from its global generator when they are made
            layers = [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        bound = bottleneck**-0.5  # torch's own rule, which the official code leaves to this layer alone
        self.weight_v = nn.Parameter(torch.empty(outputs, bottleneck).uniform_(-bound, bound, generator=generator))
        self.weight_g = nn.Parameter(torch.ones(outputs, 1), requires_grad=not norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        embeddings = self.mlp(features)
        # bfloat16 has three digits: a cosine would be off by 0.002, and by 0.05 once divided by a temperature of 0.04.
        with torch.autocast(features.device.type, enabled=False):
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            embeddings = F.normalize(embeddings, dim=-1)
            return F.linear(embeddings, self.weight_g * F.normalize(self.weight_v, dim=-1))


class DINO(Objective):
    """Self-distillation: a student learns from a teacher, its moving average, over crops of an image.

    >>> import sslvit
    >>> objective = sslvit.DINO(sslvit.ViT.variant("mu/8", image_size=16), outputs=64, hidden=32, bottleneck=16)
    >>> objective.readout
    'cls'
    """

    readout = "cls"

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
        super().__init__()
        if "cls" not in backbone.readouts:
            raise ValueError("DINO reads the class token and this backbone has none: build it with class_token=True")
        if backbone.drop_path or backbone.dropout:
            raise ValueError(
                f"the backbone becomes the teacher, from which nothing is dropped, but it has drop_path "
                f"{backbone.drop_path} and dropout {backbone.dropout}: build it without (DINO's is the student's)"
            )
        if min(student_temperature, *teacher_temperature) <= 0:
            raise ValueError(f"temperatures {student_temperature} and {teacher_temperature} must be above 0")
        check_shares(
            temperature_warmup=temperature_warmup,
            freeze_last_layer=freeze_last_layer,
            momentum=momentum,
            center_momentum=center_momentum,
        )
        backbone.config = replace(backbone.config, position_resize=position_resize)
        self.student = type(backbone)(replace(backbone.config, drop_path=drop_path))
        self.student.load_state_dict(backbone.state_dict())
        self.student_head = Head(
            backbone.width,
            hidden=hidden,
            bottleneck=bottleneck,
            outputs=outputs,
            norm_last_layer=norm_last_layer,
            seed=seed,
        )
        self.backbone, self.head = backbone.requires_grad_(False), frozen_copy(self.student_head)
        self.register_buffer("centre", torch.zeros(outputs))
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.temperature_warmup, self.freeze_last_layer = temperature_warmup, freeze_last_layer
        self.momentum, self.center_momentum = momentum, center_momentum
        # From the forward passes of a step, several under accumulation, for `after_step`. Never saved.
        self.seen_progress: float | None = None
        self.seen_logits: list[Tensor] = []  # k each: the teacher's mean

    @property
    def learner(self) -> ViT:
        return self.student

    def default_views(self, image_size: Size, channels: int) -> MultiCrop:
        """Small crops have half the side of large ones, and 96 of 224 px above thumbnails, in whole patches."""
        small = is_thumbnail(image_size)
        sides = [side * (1 / 2 if small else 96 / 224) for side in to_pair(image_size)]
        height, width = (max(round(s / p), 1) * p for s, p in zip(sides, self.student.patch_size, strict=True))
        count, (least, middle) = (4, (0.25, 0.6)) if small else (8, (0.05, 0.4))
        return MultiCrop(
            image_size, scale=(middle, 1.0), color=channels in (1, 3),
            small=count, small_size=(height, width), small_scale=(least, middle),
        )  # fmt: skip

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        large = batch.views[:LARGE]
        if len(large) < LARGE or large[0].shape != large[1].shape:
            shapes = [tuple(view.shape) for view in batch.views]
            raise ValueError(f"DINO's first 2 views must have one size, got {shapes}")
        with torch.no_grad():
            logits = self.head(self.backbone(torch.cat(large)).cls)
            if progress != self.seen_progress:  # what a step that was not taken left is dropped
                self.seen_progress, self.seen_logits = progress, []
            self.seen_logits.append(logits.mean(0))
            targets = ((logits - self.centre) / self.temperature(progress)).softmax(-1)
            targets = rearrange(targets, "(v b) k -> v b k", v=LARGE)
        features = self.encode(batch)
        logits = self.student_head(features) / self.student_temperature
        loss = cross_entropy_of_pairs(targets, rearrange(logits, "(v b) k -> v b k", v=len(batch.views)))
        with torch.no_grad():
            per_image = entropy(targets).mean()
            overall = entropy(reduce(targets, "v b k -> k", "mean"))
            metrics = {
                "teacher_entropy": per_image,
                "teacher_outputs": overall.exp(),
                "teacher_information": overall - per_image,
                "divergence": loss - per_image,
            }
            return loss, metrics | spread(features[: len(large[0])])

    def encode(self, batch: Batch) -> Tensor:
        """The student's class tokens of all views, each size in one pass: (v b) d"""
        views = [(view, rng.fold(batch.key, "student", number)) for number, view in enumerate(batch.views)]
        groups = [zip(*group, strict=True) for _, group in groupby(views, key=lambda view: view[0].shape)]
        return torch.cat([self.student(torch.cat(images), torch.cat(keys)).cls for images, keys in groups])

    def temperature(self, progress: float) -> float:
        """The teacher's temperature."""
        start, end = self.teacher_temperature
        return schedule.linear(progress / self.temperature_warmup, start, end) if self.temperature_warmup else end

    def frozen_parameters(self, progress: float) -> list[nn.Parameter]:
        """The last layer at first. Its gradient is computed and averaged like any other, but the loop drops it, so the
        optimizer skips this layer: its moments and step count do not change, nor is weight decay applied."""
        return [self.student_head.weight_v, self.student_head.weight_g] if progress < self.freeze_last_layer else []

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Moves the centre and the teacher, by the progress of the step just taken."""
        assert self.seen_progress is not None, "after_step follows a forward"
        mean = collectives.all_mean(sum(self.seen_logits) / len(self.seen_logits))
        self.centre.lerp_(mean.to(self.centre.dtype), 1 - self.center_momentum)
        momentum = schedule.cosine(self.seen_progress, self.momentum, 1.0)
        ema_update(self.backbone, self.student, momentum)
        ema_update(self.head, self.student_head, momentum)
        self.seen_progress = None


def cross_entropy_of_pairs(targets: Tensor, logits: Tensor) -> Tensor:
    """The mean cross entropy over all pairs of a teacher's view and another view of the student: g b k, v b k -> ()

    -sum q log softmax(s) is logsumexp(s) - q.s since q sums to 1, which saves a copy of the student's v b k numbers.
    A large crop is compared with the teacher's view of the other one, a small crop with both, that is, with their sum.
    """
    large, small = logits[:LARGE], logits[LARGE:]
    of_large = large.logsumexp(-1) - (targets.flip(0) * large).sum(-1)
    of_small = LARGE * small.logsumexp(-1) - (targets.sum(0) * small).sum(-1)
    return (of_large.sum(0) + of_small.sum(0)).mean() / (LARGE * (len(logits) - 1))


def entropy(probabilities: Tensor) -> Tensor:
    """In nats: ... k -> ..."""
    return torch.special.entr(probabilities).sum(-1)
