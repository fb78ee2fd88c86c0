"""What the loop needs to know of an objective, and nothing more."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from sslvit.models.readout import Readout
from sslvit.models.vit import ViT


class Batch(NamedTuple):
    views: tuple[Tensor, ...]  # each b c H W, floats in [0, 1]
    key: Tensor  # b: one key a sample; all randomness of a forward comes from it
    labels: Tensor | None = None  # b; only supervised objectives look


class Objective(nn.Module, ABC):
    """A loss around a backbone. Concrete objectives are final: share functions, never super().forward()."""

    backbone: ViT  # what is evaluated and exported
    readout: Readout  # what a probe should read, in training and offline alike
    couples_samples = False  # whether the loss of an image depends on the others of its batch

    @property
    def learner(self) -> nn.Module:
        """The backbone that gradients move, whose blocks layer decay counts. DINO's `backbone` is the teacher's."""
        return self.backbone

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and detached metrics. Changes no state: teachers move in `after_step`."""

    def head_state_dict(self) -> dict[str, Tensor]:
        """What the exported model keeps besides the backbone, by timm's names: a classifier's head."""
        return {}

    def reconstructed(self, batch: Batch) -> tuple[Tensor, ...]:
        """For the eye: what the objective was shown of the first view, and what it made of that; b c H W in [0, 1].
        Nothing, for one that predicts no images."""
        return ()

    def frozen_parameters(self, progress: float) -> list[nn.Parameter]:
        """What is not moved at this progress: the loop drops its gradients, so the optimizer passes over it."""
        return []

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step that was taken, with the progress that the next one will have."""
