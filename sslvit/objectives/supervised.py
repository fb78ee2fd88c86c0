"""Supervised classification: the other side of every comparison, for ViTs, hybrids and BiT ResNets.

The ViT paper's (https://arxiv.org/abs/2010.11929): a head with one hidden layer and tanh on the class token
(representation = the width), dropout in the backbone, label smoothing. Plain ViT-S/16 (https://arxiv.org/abs/2205.01580):
the mean patch, fixed positions, one linear layer, mixup of 0.2. BiT (https://arxiv.org/abs/1912.11370): the mean.
The linear layer starts at zero, so the first loss is ln(classes).

Mixup (https://arxiv.org/abs/1710.09412) and cutmix (https://arxiv.org/abs/1905.04899) mix every two neighbours of the
batch with each other and draw once a pair. The papers' codes draw once a batch, on each process, and mix with the batch
rolled or reversed, so that the number of processes changes the loss. In mixup a pair has both shares, s of the one and
1 - s of the other: plain ViT's rule that the larger share is a sample's own changes nothing here.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor

from sslvit import health, rng
from sslvit.data.mixing import targets
from sslvit.errors import DataError
from sslvit.objectives.objective import Batch, Objective
from sslvit.readout import Classifier, Readout, logits, read
from sslvit.resnet import BiT
from sslvit.vit import ViT

HEAD = ("fc_norm.", "pre_logits.", "head.")
TRIES = 64  # a draw of Beta(a, a), a <= 1, fails half the time at most


class Supervised(Objective):
    def __init__(
        self,
        backbone: ViT | BiT,
        *,
        classes: int,
        readout: Readout | None = None,
        representation: int | None = None,
        fresh_norm: bool = False,
        smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        class_weights: Tensor | None = None,
        seed: int = 0,
    ):
        """readout: the class token if there is one, else the mean patch. mixup, cutmix: the parameter of their Beta
        distributions, 0 for never; with both, each pair takes either, equally often. class_weights: a factor for each
        class; they should average 1 over the images, as `balanced` gives them, since nothing is divided by their sum.
        """
        super().__init__()
        if classes < 2:
            raise DataError(f"{classes} class leaves nothing to tell apart")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing {smoothing} is not in [0, 1)")
        if not (0 <= mixup <= 1 and 0 <= cutmix <= 1):
            raise ValueError(f"mixup {mixup} and cutmix {cutmix} must lie in [0, 1]")
        if class_weights is not None and class_weights.shape != (classes,):
            raise ValueError(f"class_weights of shape {tuple(class_weights.shape)} for {classes} classes")
        readout = readout or ("cls" if "cls" in backbone.readouts else "mean")
        parts = {"classes": classes, "representation": representation, "fresh_norm": fresh_norm, "seed": seed}
        classifier = Classifier(backbone, readout=readout, **parts)
        self.backbone, self.readout = backbone, readout
        self.fc_norm, self.pre_logits, self.head = classifier.fc_norm, classifier.pre_logits, classifier.head
        self.classes, self.smoothing, self.mixup, self.cutmix = classes, smoothing, mixup, cutmix
        self.register_buffer("class_weights", torch.ones(classes) if class_weights is None else class_weights)

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        (images,), labels = batch.views, self.checked(batch.labels)
        truth = targets(labels, self.classes, self.smoothing)
        if self.training and (self.mixup or self.cutmix):
            images, truth = mix_pairs(images, truth, rng.fold(batch.key, "mix"), self.mixup, self.cutmix)
        features = read(self.backbone(images, rng.fold(batch.key, "backbone")), self.readout)
        scores = logits(self, features)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        loss = -(self.class_weights * truth * scores.log_softmax(-1)).sum(-1).mean()
        with torch.no_grad():  # of mixed images, the larger part's label counts
            accuracy = (scores.argmax(-1) == truth.argmax(-1)).to(scores.dtype).mean()
        return loss, {"accuracy": accuracy} | health.spread(features)

    def kept(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name.startswith(HEAD)}

    def checked(self, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise DataError("supervised training needs labels, and these images have none")
        low, high = (int(label) for label in labels.aminmax())
        if low < 0 or high >= self.classes:
            raise DataError(f"labels from {low} to {high} of {self.classes} classes, 0 to {self.classes - 1}")
        return labels


def balanced(labels: Tensor, classes: int) -> Tensor:
    """Class weights with which every class counts alike, however many images it has: inverse to its count."""
    counts = torch.bincount(labels, minlength=classes)
    if len(counts) > classes or bool((counts == 0).any()):
        raise DataError(f"class weights need images of each of {classes} classes; the counts are {counts.tolist()}")
    return len(labels) / (classes * counts)


def mix_pairs(images: Tensor, truth: Tensor, key: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Images 0 and 1, 2 and 3, ... with each other, by the key of the first of them: b c H W, b k -> b c H W, b k"""
    if len(images) % 2:
        raise ValueError(f"{len(images)} images on one process are no pairs: mixup and cutmix need an even number")
    own = shares(key[::2], images.shape[-2:], mixup, cutmix)
    own = rearrange(own, "b H W -> b 1 1 H W")
    pairs = rearrange(images, "(b two) c H W -> b two c H W", two=2)
    images = rearrange(pairs * own + pairs.flip(1) * (1 - own), "b two c H W -> (b two) c H W")
    share = reduce(own, "b 1 1 H W -> b 1 1", "mean")
    pairs = rearrange(truth, "(b two) k -> b two k", two=2)
    return images, rearrange(pairs * share + pairs.flip(1) * (1 - share), "b two k -> (b two) k")


def shares(key: Tensor, size: tuple[int, int], mixup: float, cutmix: float) -> Tensor:
    """How much of each pixel is the image's own: b -> b H W. Mixup: the same everywhere. Cutmix: 1 but 0 in a box."""
    height, width = size
    cut = rng.uniform(rng.fold(key, "switch")) < (0.5 if mixup and cutmix else float(cutmix > 0))
    even = beta(rng.fold(key, "share"), mixup) if mixup else torch.ones(len(key), device=key.device)
    if not cutmix:
        return even[:, None, None].expand(-1, height, width)
    # A box of 1 - s of the area around a random pixel, cut off at the edges: then its share is what is left of it.
    side = (1 - beta(rng.fold(key, "box share"), cutmix)).sqrt()
    centre = rng.uniform(rng.fold(key, "centre"), 2)
    rows, columns = (
        # Distances in shares of the length, between the middles of pixels and that of the box.
        ((torch.arange(length, device=key.device) + 0.5) / length - middle[:, None]).abs() < side[:, None] / 2
        for length, middle in zip(size, centre.unbind(-1), strict=True)
    )
    box = rearrange(rows, "b H -> b H 1") & rearrange(columns, "b W -> b 1 W")
    return torch.where(cut[:, None, None], (~box).to(even.dtype), even[:, None, None])


def beta(key: Tensor, alpha: float) -> Tensor:
    """One draw of Beta(alpha, alpha), alpha <= 1, a key, by Jöhnk's rejection: the first x, y with x + y <= 1 of
    x = u^(1 / alpha), y = v^(1 / alpha) gives x / (x + y)."""
    x, y = (rng.uniform(key, TRIES, 2).double() ** (1 / alpha)).unbind(-1)
    good = (x + y <= 1) & (x + y > 0)
    first = good.to(torch.uint8).argmax(-1, keepdim=True)
    return (x / (x + y)).gather(-1, first).squeeze(-1).float()
