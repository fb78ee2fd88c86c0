"""Outputs of a backbone: named tokens, one vector per image (the readout), a classifier's scores."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from sslvit.models.init import lecun_normal

Readout = Literal["cls", "mean", "both"]


class _Encoded(NamedTuple):
    cls: Tensor | None  # b d, None without a class token
    patches: Tensor  # b n d


class Encoded(_Encoded):
    """What a backbone makes of images: the pair `cls, patches`, and beside it `registers`, `b r d`, if it has any.

    >>> import sslvit, torch
    >>> encoded = sslvit.ViT.variant("mu/8", image_size=16, class_token=False)(torch.rand(2, 3, 16, 16))
    >>> encoded.cls is None, encoded.patches.shape, encoded.registers is None
    (True, torch.Size([2, 4, 32]), True)
    """

    registers: Tensor | None = None

    def __new__(kind, cls: Tensor | None, patches: Tensor, registers: Tensor | None = None) -> "Encoded":
        self = super().__new__(kind, cls, patches)
        self.registers = registers
        return self


def read(encoded: Encoded, readout: str) -> Tensor:
    """One vector per image: the class token or the mean patch, `b d`, or both joined, `b (2 d)`."""
    if readout not in get_args(Readout):
        raise ValueError(f"readout must be one of {get_args(Readout)}, got {readout!r}")
    if readout == "mean":
        return encoded.patches.mean(1)
    if encoded.cls is None:
        raise ValueError(f"readout {readout!r} needs a class token and this backbone has none")
    return encoded.cls if readout == "cls" else torch.cat([encoded.cls, encoded.patches.mean(1)], -1)


class Classifier(nn.Module):
    """A backbone and a head: `b c H W -> b classes`. The head starts at zero, so the first loss is ln(classes).

    representation: the size of a hidden layer with tanh, which the ViT paper has in pretraining, not in fine-tuning.
    fresh_norm: a norm of the readout, for a backbone without a final norm: so MAE fine-tunes the mean patch.

    >>> import sslvit, torch
    >>> classifier = sslvit.Classifier(sslvit.ViT.variant("mu/8", image_size=16), readout="cls", classes=5)
    >>> classifier(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        readout: Readout,
        classes: int,
        representation: int | None = None,
        fresh_norm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if readout not in backbone.readouts:
            raise ValueError(f"readout {readout!r} is not one of this backbone's {backbone.readouts}")
        width = backbone.width * (2 if readout == "both" else 1)
        self.backbone, self.readout = backbone, readout
        with torch.random.fork_rng(devices=[]):  # torch's layers draw from its global generator when they are made
            self.fc_norm = nn.LayerNorm(width, 1e-6) if fresh_norm else None
            self.pre_logits = None if representation is None else nn.Linear(width, representation)
            self.head = nn.Linear(representation or width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if self.pre_logits is not None:
            lecun_normal(self.pre_logits.weight, torch.Generator().manual_seed(seed))
            nn.init.zeros_(self.pre_logits.bias)

    def forward(self, images: Tensor, key: Tensor | None = None) -> Tensor:
        # Only a ViT takes a key, and only to train with drop path or dropout.
        features = read(self.backbone(images) if key is None else self.backbone(images, key), self.readout)
        return logits(self, features)


def logits(classifier: nn.Module, features: Tensor) -> Tensor:
    """A readout through a classifier's fc_norm, pre_logits and head: `b d -> b classes`."""
    if classifier.fc_norm is not None:
        features = classifier.fc_norm(features)
    if classifier.pre_logits is not None:
        features = classifier.pre_logits(features).tanh()
    return classifier.head(features)
