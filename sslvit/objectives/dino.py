"""DINO: self-distillation with no labels (Caron et al. 2021, https://arxiv.org/abs/2104.14294).

A student sees all crops of an image and a teacher the two large ones; each of the teacher's outputs is what the student
must say of every other crop. The teacher is the student's moving average. Two things keep it from saying the same of
every image: its logits are centred (no output wins everywhere) and sharpened by a low temperature (no uniform answer).

In the order of the official code (https://github.com/facebookresearch/dino), with iterations i = 0, 1, ... of T:
- The loss of iteration i is centred with what earlier iterations left. The centre then moves, towards the mean of the
  teacher's logits before the temperature divides them, over both large crops of all processes.
- After the optimizer's step i the teacher keeps the share m(i / T) of itself; m rises from 0.996 to 1 by half a cosine.
  So it is the progress of the step that was taken, not of the next, and the last step still moves the teacher a little.
- The teacher runs in training mode but without drop path; it starts as a copy of the student.

Positions of small crops are resized by the official rule, plain bicubic with 0.1 patches of offset, also where training
starts from a model that had another.

Where this differs: the teacher's temperature rises with every iteration, not with every epoch (never more than 0.001
apart for .04 to .07 in 30 epochs); images go through drop path by keys of their own; and as in all but MoCo v3 the loop
does not drop an epoch's last incomplete batch (see data/loader.py).
"""

from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from sslvit import rng, schedule
from sslvit.models.positions import PositionResize
from sslvit.models.vit import ViT
from sslvit.objectives.objective import Batch, Objective
from sslvit.objectives.spread import spread
from sslvit.objectives.teacher import ema_update, frozen_copy
from sslvit.processes import collectives

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


class Seen(NamedTuple):
    """What the forward passes of a step leave for after it. It is never saved."""

    progress: float
    total: Tensor  # k: the teacher's mean logits, summed over the passes
    passes: int  # more than one under accumulation


class DINO(Objective):
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
        """The backbone becomes the teacher's, which is what is exported; the student starts as its copy with drop path.

        teacher_temperature: at the start, and from the share temperature_warmup of training on. norm_last_layer: True
        for the paper's ViT-B; its best ViT-S is without. freeze_last_layer: the share of training, the paper's first
        epoch, in which the student's last layer stays what it is. position_resize: of both networks from here on.
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
        shares = {"temperature_warmup": temperature_warmup, "freeze_last_layer": freeze_last_layer}
        for name, value in (shares | {"momentum": momentum, "center_momentum": center_momentum}).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value} is not in [0, 1]")
        backbone.config = replace(backbone.config, position_resize=position_resize)
        backbone.position_resize = position_resize
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
        self.seen: Seen | None = None

    @property
    def learner(self) -> ViT:
        return self.student

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        large = batch.views[:LARGE]
        if len(large) < LARGE or large[0].shape != large[1].shape:
            raise ValueError(f"DINO's first 2 views are of one size, not {[tuple(view.shape) for view in batch.views]}")
        with torch.no_grad():
            logits = self.head(self.backbone(torch.cat(large)).cls)
            self.see(progress, logits)
            targets = ((logits - self.centre) / self.temperature(progress)).softmax(-1)
            targets = rearrange(targets, "(v b) k -> v b k", v=LARGE)
        features = self.encode(batch)
        logits = rearrange(
            self.student_head(features) / self.student_temperature, "(v b) k -> v b k", v=len(batch.views)
        )
        loss = cross_entropy_of_pairs(targets, logits)
        with torch.no_grad():
            sure = entropy(targets).mean()
            used = entropy(reduce(targets, "v b k -> k", "mean"))
            metrics = {"teacher_entropy": sure, "teacher_outputs": used.exp(), "teacher_information": used - sure}
            return loss, metrics | {"divergence": loss - sure} | spread(features[: len(large[0])])

    def encode(self, batch: Batch) -> Tensor:
        """The student's class tokens of all views, each size in one pass: (v b) d"""
        views = [(view, rng.fold(batch.key, "student", number)) for number, view in enumerate(batch.views)]
        groups = [zip(*group, strict=True) for _, group in groupby(views, key=lambda view: view[0].shape)]
        return torch.cat([self.student(torch.cat(images), torch.cat(keys)).cls for images, keys in groups])

    def temperature(self, progress: float) -> float:
        """The teacher's."""
        start, end = self.teacher_temperature
        return schedule.linear(progress / self.temperature_warmup, start, end) if self.temperature_warmup else end

    def frozen_parameters(self, progress: float) -> list[nn.Parameter]:
        """The last layer at first. Its gradient is computed like any other, so that processes agree on what to average.
        Since the loop drops it then, the optimizer passes over this layer: moments, step count and decay stay too."""
        return [self.student_head.weight_v, self.student_head.weight_g] if progress < self.freeze_last_layer else []

    def see(self, progress: float, logits: Tensor) -> None:
        """A step that is not taken has no after_step: what it saw is forgotten at the next, of other progress."""
        mean = logits.mean(0)
        if self.seen is None or self.seen.progress != progress:
            self.seen = Seen(progress, torch.zeros_like(mean), 0)
        self.seen = Seen(progress, self.seen.total + mean, self.seen.passes + 1)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The centre and the teacher follow, by the progress of the step that was taken."""
        assert self.seen is not None, "after_step follows a forward"
        mean = collectives.all_mean(self.seen.total / self.seen.passes)
        self.centre.lerp_(mean.to(self.centre.dtype), 1 - self.center_momentum)
        momentum = schedule.cosine(self.seen.progress, self.momentum, 1.0)
        ema_update(self.backbone, self.student, momentum)
        ema_update(self.head, self.student_head, momentum)
        self.seen = None


def cross_entropy_of_pairs(targets: Tensor, logits: Tensor) -> Tensor:
    """The mean cross entropy over all pairs of a teacher's view and another view of the student: g b k, v b k -> ()

    -sum q log softmax(s) is logsumexp(s) - q.s since q sums to 1, which spares a copy of the student's v b k numbers.
    A large crop is compared with the teacher's view of the other, a small one with both, that is, with their sum.
    """
    large, small = logits[:LARGE], logits[LARGE:]
    of_large = large.logsumexp(-1) - (targets.flip(0) * large).sum(-1)
    of_small = LARGE * small.logsumexp(-1) - (targets.sum(0) * small).sum(-1)
    return (of_large.sum(0) + of_small.sum(0)).mean() / (LARGE * (len(logits) - 1))


def entropy(probabilities: Tensor) -> Tensor:
    """In nats: ... k -> ..."""
    return torch.special.entr(probabilities).sum(-1)
