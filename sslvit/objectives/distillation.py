"""What DINO, iBOT and DINOv2 share: the head, a student and its teacher, and the losses of crops and of hidden patches.

How the teacher is made and when it and the centres move is described in dino.py.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.positions import PositionResize
from sslvit.models.readout import Encoded
from sslvit.models.vit import ViT
from sslvit.objectives import schedule
from sslvit.objectives.block_mask import Hidden
from sslvit.objectives.objective import Batch, Objective, check_class_token, check_shares, class_tokens
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
        return self.logits(self.embed(features))

    def embed(self, features: Tensor) -> Tensor:
        """Of length 1: ... d -> ... e"""
        embeddings = self.mlp(features)
        # bfloat16 has three digits: a cosine would be off by 0.002, and by 0.05 once divided by a temperature of 0.04.
        with torch.autocast(features.device.type, enabled=False):
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            return F.normalize(embeddings, dim=-1)

    def logits(self, embeddings: Tensor) -> Tensor:
        """The last layer, which is linear: ... e -> ... k"""
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(embeddings, self.weight_g * F.normalize(self.weight_v, dim=-1))


class Distillation(Objective):
    """A student, which sees all crops, and a teacher, its moving average, which sees the large ones."""

    readout = "cls"
    small_crops: ClassVar[tuple[int, float, float]] = (8, 0.05, 0.4)  # of the paper: how many, shares of an image

    def __init__(
        self,
        backbone: ViT,
        head: Head,
        *,
        student_temperature: float,
        teacher_temperature: tuple[float, float],
        temperature_warmup: float,
        momentum: float,
        center_momentum: float,
        freeze_last_layer: float,
        drop_path: float,
        position_resize: PositionResize,
    ):
        super().__init__()
        name = type(self).__name__
        check_class_token(backbone, name)
        if backbone.drop_path or backbone.dropout:
            raise ValueError(
                f"the backbone becomes the teacher, from which nothing is dropped, but it has drop_path "
                f"{backbone.drop_path} and dropout {backbone.dropout}: build it without ({name}'s is the student's)"
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
        self.student_head = head
        self.backbone, self.head = backbone.requires_grad_(False), frozen_copy(head)
        self.register_buffer("centre", torch.zeros(len(head.weight_v)))
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.temperature_warmup, self.freeze_last_layer = temperature_warmup, freeze_last_layer
        self.momentum, self.center_momentum = momentum, center_momentum
        # From the forward passes of a step, several under accumulation, for `after_step`. Never saved.
        self.seen_progress: float | None = None
        self.seen: dict[str, list[Tensor]] = {}  # by centre, what it moves towards: k each

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]: ...

    @property
    def learner(self) -> ViT:
        return self.student

    def default_views(self, image_size: Size, channels: int) -> MultiCrop:
        """Small crops have half the side of large ones, and 96 of 224 px above thumbnails, in whole patches."""
        small = is_thumbnail(image_size)
        sides = [side * (1 / 2 if small else 96 / 224) for side in to_pair(image_size)]
        height, width = (max(round(s / p), 1) * p for s, p in zip(sides, self.student.patch_size, strict=True))
        count, least, middle = (4, 0.25, 0.6) if small else self.small_crops
        return MultiCrop(
            image_size, scale=(middle, 1.0), color=channels in (1, 3),
            small=count, small_size=(height, width), small_scale=(least, middle),
        )  # fmt: skip

    def large_crops(self, batch: Batch) -> Tensor:
        """Those of the first view, then those of the second: (v b) c H W"""
        large = batch.views[:LARGE]
        if len(large) < LARGE or large[0].shape != large[1].shape:
            shapes = [tuple(view.shape) for view in batch.views]
            raise ValueError(f"{type(self).__name__}'s first 2 views must have one size, got {shapes}")
        return torch.cat(large)

    def keys(self, batch: Batch) -> list[Tensor]:
        """For the student's drop path in each view: b each"""
        return [rng.fold(batch.key, "student", number) for number, _ in enumerate(batch.views)]

    def encode(self, batch: Batch, first: int = 0) -> Tensor:
        """The student's class tokens of the views from this one on, each size in one pass: (v b) d"""
        views = list(zip(batch.views, self.keys(batch), strict=True))[first:]
        return class_tokens(self.student, views)

    def temperature(self, progress: float) -> float:
        """The teacher's temperature."""
        start, end = self.teacher_temperature
        return schedule.linear(progress / self.temperature_warmup, start, end) if self.temperature_warmup else end

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each network of the teacher, and that of the student."""
        return [(self.backbone, self.student), (self.head, self.student_head)]

    def frozen_parameters(self, progress: float) -> list[nn.Parameter]:
        """The last layer at first. Its gradient is computed and averaged like any other, but the loop drops it, so the
        optimizer skips this layer: its moments and step count do not change, nor is weight decay applied."""
        heads = [student for _, student in self.pairs() if isinstance(student, Head)]
        last = [parameter for head in heads for parameter in (head.weight_v, head.weight_g)]
        return last if progress < self.freeze_last_layer else []

    def note(self, progress: float, **means: Tensor) -> None:
        """Remembers what the centres are to move towards, if the step of this progress is taken."""
        if progress != self.seen_progress:  # what a step that was not taken left is dropped
            self.seen_progress, self.seen = progress, {}
        for name, mean in means.items():
            self.seen.setdefault(name, []).append(mean)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Moves the centres and the teacher, by the progress of the step just taken."""
        assert self.seen_progress is not None, "after_step follows a forward"
        for name, means in self.seen.items():
            mean, centre = collectives.all_mean(sum(means) / len(means)), getattr(self, name)
            centre.lerp_(mean.to(centre.dtype), 1 - self.center_momentum)
        momentum = schedule.cosine(self.seen_progress, self.momentum, 1.0)
        for teacher, student in self.pairs():
            ema_update(teacher, student, momentum)
        self.seen_progress = None


def encode_hidden(
    objective: Distillation, crops: Tensor, hidden: Hidden, mask_token: Tensor, batch: Batch
) -> tuple[Encoded, Tensor]:
    """The student's large crops, whose hidden patches are the mask token with their positions; and its class tokens of
    all views: (v b) d"""
    student = objective.student
    tokens, grid = student.embed(crops), student.grid_of(crops)
    tokens = torch.where(hidden.mask.unsqueeze(-1), mask_token.to(tokens.dtype), tokens)
    key = torch.cat(objective.keys(batch)[:LARGE])
    large = student.encode(student.add_positions(tokens, grid), grid, key)
    assert large.cls is not None
    small = [objective.encode(batch, first=LARGE)] if len(batch.views) > LARGE else []
    return large, torch.cat([large.cls, *small])


def cross_entropy_of_pairs(targets: Tensor, logits: Tensor) -> Tensor:
    """The mean cross entropy over all pairs of a teacher's view and another view of the student: g b k, v b k -> ()

    -sum q log softmax(s) is logsumexp(s) - q.s since q sums to 1, which saves a copy of the student's v b k numbers.
    A large crop is compared with the teacher's view of the other one, a small crop with both, that is, with their sum.
    """
    large, small = logits[:LARGE], logits[LARGE:]
    of_large = large.logsumexp(-1) - (targets.flip(0) * large).sum(-1)
    of_small = LARGE * small.logsumexp(-1) - (targets.sum(0) * small).sum(-1)
    return (of_large.sum(0) + of_small.sum(0)).mean() / (LARGE * (len(logits) - 1))


def cross_entropy_of_hidden(targets: Tensor, logits: Tensor, hidden: Hidden) -> Tensor:
    """The mean over crops of the mean cross entropy over the hidden patches of each, 0 without any: m k, m k -> ()"""
    each = logits.logsumexp(-1) - (targets * logits).sum(-1)
    return (each * hidden.weights.to(each.dtype)).sum() / len(hidden.mask)


def by_view(logits: Tensor) -> Tensor:
    """(v b) k -> v b k, of the large crops"""
    return rearrange(logits, "(v b) k -> v b k", v=LARGE)


def entropy(probabilities: Tensor) -> Tensor:
    """In nats: ... k -> ..."""
    return torch.special.entr(probabilities).sum(-1)


@torch.no_grad()
def about_targets(targets: Tensor, prefix: str = "teacher") -> dict[str, Tensor]:
    """Metrics of a teacher's outputs, which show a collapse (training/watch.py): v b k. Zeros if there are none."""
    if not len(targets.flatten(0, 1)):
        return {f"{prefix}_{name}": targets.new_zeros(()) for name in ("entropy", "outputs", "information")}
    per_image = entropy(targets).mean()
    overall = entropy(reduce(targets, "v b k -> k", "mean"))
    return {
        f"{prefix}_entropy": per_image,
        f"{prefix}_outputs": overall.exp(),
        f"{prefix}_information": overall - per_image,
    }
