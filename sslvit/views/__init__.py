"""Batched augmentation: a uint8 batch -> float batches in [0, 1]. What one needs to choose other views:

>>> import sslvit, torch
>>> view = sslvit.views.CropFlip(16, scale=(0.5, 1.0))
>>> (images,) = view(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4))  # a key per image
>>> images.shape
torch.Size([4, 3, 16, 16])
"""

from sslvit.views.pretraining import ContrastivePair, ContrastiveView, CropFlip, EvalView, MultiCrop, eval_view
from sslvit.views.randaugment import RandAugment
from sslvit.views.supervised import SupervisedView

__all__ = [
    "ContrastivePair",
    "ContrastiveView",
    "CropFlip",
    "EvalView",
    "MultiCrop",
    "RandAugment",
    "SupervisedView",
    "eval_view",
]
