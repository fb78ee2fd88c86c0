"""The interface between the training loop and an objective."""

import struct
from abc import ABC, abstractmethod
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.partial import train_only
from sslvit.models.readout import Readout
from sslvit.models.vit import ViT
from sslvit.views.batching import Size
from sslvit.views.pretraining import CropFlip


class Batch(NamedTuple):
    """What an objective is given of some images.

    >>> import sslvit, torch
    >>> batch = sslvit.Batch(views=(torch.rand(2, 3, 16, 16),), key=torch.arange(2))
    >>> loss, metrics = sslvit.MPP(sslvit.ViT.variant("mu/8", image_size=16))(batch, progress=0.0)
    >>> loss.shape
    torch.Size([])
    """

    views: tuple[Tensor, ...]  # each b c H W, floats in [0, 1]
    key: Tensor  # b: one key per sample, from which all randomness of a forward comes; the loop's is on the CPU
    labels: Tensor | None = None  # b; for supervised objectives alone


class Objective(nn.Module, ABC):
    """A loss around a backbone. Concrete objectives are final: share functions, never super().forward().

    >>> import sslvit
    >>> class Brightness(sslvit.Objective):
    ...     def __init__(self, backbone):
    ...         super().__init__()
    ...         self.backbone, self.readout = backbone, "cls"
    ...     def forward(self, batch, progress):
    ...         (images,) = batch.views
    ...         loss = (self.backbone(images).cls.mean(1) - images.mean((1, 2, 3))).square().mean()
    ...         return loss, {}
    >>> objective = Brightness(sslvit.ViT.variant("mu/8", image_size=16))
    >>> run = sslvit.pretrain(
    ...     objective, "shapes:n=64", out="runs/mine", epochs=1, evaluate=False
    ... )  # doctest: +ELLIPSIS
    shapes (64 labelled by shape)...
    """

    backbone: ViT  # is evaluated and exported
    readout: Readout  # for probes, in training and offline alike
    couples_samples = False  # whether the loss of an image depends on the others of its batch
    uses_labels = False  # whether the loss depends on labels: then no image that it is trained on is evaluated on

    @property
    def learner(self) -> nn.Module:
        """The backbone that gradients move, whose blocks layer decay counts. DINO's `backbone` is the teacher's."""
        return self.backbone

    @property
    def teacher(self) -> nn.Module | None:
        """The backbone that is the learner's moving average, if there is one: by default what is exported instead."""
        return None if self.learner is self.backbone else self.backbone

    def default_views(self, image_size: Size, channels: int) -> Any:
        """The views of an image that it is trained on if nothing else is asked for. Those of the objectives here are of
        their recipes: of the preset small up to images of THUMBNAIL pixels, of the paper's above."""
        return CropFlip(image_size)

    def train_only(self, part: str, *, seed: int) -> None:
        """Trains this part of the backbone, as `--train` names it. A teacher has adapters of its own, which follow the
        learner's."""
        train_only(self.learner, part, seed=seed)
        if self.teacher:
            train_only(self.teacher, part, seed=seed)
            self.teacher.requires_grad_(False)

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and detached metrics. Changes no state: teachers move in `after_step`."""

    def check_labels(self, labels: Tensor | None) -> None:
        """Raises DataError for labels that it cannot be trained on. Called where they are read, on the CPU, since a
        look at them on a device would wait for it."""

    def head_state_dict(self) -> dict[str, Tensor]:
        """Exported with the backbone, by timm's names: a classifier's head."""
        return {}

    def reconstructed(self, batch: Batch) -> tuple[Tensor, ...]:
        """To look at, b c H W in [0, 1]: the objective's input from the first view, and its prediction. Empty for an
        objective that predicts no images."""
        return ()

    def frozen_parameters(self, progress: float) -> list[nn.Parameter]:
        """Not trained at this progress: the loop drops their gradients, so that the optimizer skips them."""
        return []

    def rate_factor(self, name: str) -> float:
        """What the learning rate of this parameter is multiplied by, besides layer decay; its name in the learner, or
        in the objective if it is of a head."""
        return 1.0

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step that was taken, with the progress that the next one will have."""


def class_tokens(backbone: ViT, views: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of views with their keys, those of one size that follow each other in one pass: (v b) d"""
    groups = [zip(*group, strict=True) for _, group in groupby(views, key=lambda view: view[0].shape)]
    return torch.cat([backbone(torch.cat(images), torch.cat(keys)).cls for images, keys in groups])


def step_key(name: str, progress: float) -> Tensor:
    """For what is drawn once per step, the same for all images and processes."""
    return rng.key(name, *struct.unpack("<q", struct.pack("<d", progress)))


def check_class_token(backbone: ViT, name: str) -> None:
    if "cls" not in backbone.readouts:
        raise ValueError(f"{name} reads the class token and this backbone has none: build it with class_token=True")


def check_vit(backbone: object, name: str) -> None:
    if not isinstance(backbone, ViT):
        raise ValueError(f"{name} hides patches of a ViT, and {type(backbone).__name__} has none")


def check_views(batch: Batch, number: int, size: tuple[int, int] | None = None) -> None:
    """Raises ValueError unless there are so many views, all of one size, or of this one."""
    sizes = [tuple(view.shape[-2:]) for view in batch.views]
    if len(sizes) != number or set(sizes) != {size or sizes[0]}:
        wanted = f"{number} view{'s' * (number > 1)} of {' x '.join(map(str, size)) if size else 'one size'}"
        raise ValueError(f"the objective needs {wanted}, and got {sizes}")


def check_shares(**shares: float) -> None:
    """Raises ValueError for an argument of an objective that is not in [0, 1]."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value} must lie in [0, 1]")
