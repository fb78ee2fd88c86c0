"""Supervised classification, to compare with: for ViTs, hybrids and BiT ResNets.

The ViT paper's (https://arxiv.org/abs/2010.11929): a head with one hidden layer and tanh on the class token
(representation = the width), dropout in the backbone, label smoothing. Plain ViT-S/16
(https://arxiv.org/abs/2205.01580): the mean patch, fixed positions, one linear layer, mixup of 0.2. BiT
(https://arxiv.org/abs/1912.11370): the mean. The linear layer starts at zero, so the first loss is ln(classes).

Mixup and cutmix mix neighbouring pairs of the batch alone: views/mixing.py says why. How crops and RandAugment differ
from the papers' codes is said in views/supervised.py and views/randaugment.py.
"""

import torch
from torch import Tensor

from sslvit import rng
from sslvit.errors import DataError
from sslvit.models.blocks import at_least_float32
from sslvit.models.readout import Classifier, Readout, logits, read
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.objectives.objective import Batch, Objective, check_shares
from sslvit.objectives.spread import spread
from sslvit.views.batching import Size
from sslvit.views.mixing import mix_pairs, targets
from sslvit.views.pretraining import is_thumbnail
from sslvit.views.supervised import SupervisedView

HEAD = ("fc_norm.", "pre_logits.", "head.")


class Supervised(Objective):
    """Classification of labelled images.

    >>> import sslvit
    >>> objective = sslvit.Supervised(sslvit.ViT.variant("mu/8", image_size=16), classes=5)
    >>> objective.readout
    'cls'
    """

    uses_labels = True

    def __init__(
        self,
        backbone: ViT | BiT,
        *,
        classes: int,
        readout: Readout | None = None,
        representation: int | None = None,
        fresh_norm: bool = False,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        class_weights: Tensor | None = None,
        seed: int = 0,
    ):
        """readout: the class token if there is one, else the mean patch. mixup, cutmix: the parameter of their Beta
        distributions, 0 for never; with both, each pair takes either, equally often. class_weights: a factor for each
        class; they should average 1 over the images, like those of `balanced`, since nothing is divided by their sum.
        """
        super().__init__()
        if classes < 2:
            raise DataError(f"{classes} class leaves nothing to classify: at least 2 are needed")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing {label_smoothing} is not in [0, 1)")
        check_shares(mixup=mixup, cutmix=cutmix)
        if class_weights is not None and class_weights.shape != (classes,):
            raise ValueError(f"class_weights of shape {tuple(class_weights.shape)} for {classes} classes")
        readout = readout or ("cls" if "cls" in backbone.readouts else "mean")
        classifier = Classifier(
            backbone, readout=readout, classes=classes, representation=representation, fresh_norm=fresh_norm, seed=seed
        )
        self.backbone, self.readout = backbone, readout
        self.fc_norm, self.pre_logits, self.head = classifier.fc_norm, classifier.pre_logits, classifier.head
        self.classes, self.label_smoothing, self.mixup, self.cutmix = classes, label_smoothing, mixup, cutmix
        self.register_buffer("class_weights", torch.ones(classes) if class_weights is None else class_weights)

    def default_views(self, image_size: Size, channels: int) -> SupervisedView:
        return (
            SupervisedView(image_size, (0.3, 1.0)) if is_thumbnail(image_size) else SupervisedView.plain_vit(image_size)
        )

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        (images,), labels = batch.views, batch.labels
        if labels is None or labels.device.type == "cpu":  # the loop checks before it sends them to a device
            self.check_labels(labels)
        assert labels is not None
        wide = at_least_float32(images.dtype)
        truth = targets(labels, self.classes, self.label_smoothing, wide)
        if self.training and (self.mixup or self.cutmix):
            images, truth = mix_pairs(images, truth, rng.fold(batch.key, "mix"), self.mixup, self.cutmix)
        features = read(self.backbone(images, rng.fold(batch.key, "backbone")), self.readout)
        scores = logits(self, features).to(wide)
        loss = -(self.class_weights * truth * scores.log_softmax(-1)).sum(-1).mean()
        with torch.no_grad():  # of mixed images, the larger part's label counts
            accuracy = (scores.argmax(-1) == truth.argmax(-1)).to(scores.dtype).mean()
        return loss, {"accuracy": accuracy} | spread(features)

    def head_state_dict(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name.startswith(HEAD)}

    def check_labels(self, labels: Tensor | None) -> None:
        if labels is None:
            raise DataError("supervised training needs labels, and these images have none")
        low, high = (int(label) for label in labels.aminmax())
        if low < 0 or high >= self.classes:
            raise DataError(f"labels from {low} to {high} of {self.classes} classes, 0 to {self.classes - 1}")


def balanced(labels: Tensor, classes: int) -> Tensor:
    """Class weights by which every class that has images counts alike: inverse to their number; 0 of the others, such
    as classes that are held out."""
    counts = torch.bincount(labels, minlength=classes)
    if len(counts) > classes:
        raise DataError(f"class weights of {classes} classes, and labels up to {len(counts) - 1}")
    return torch.where(counts > 0, len(labels) / ((counts > 0).sum() * counts.clamp(min=1)), 0.0)
