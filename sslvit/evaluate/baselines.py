"""Baselines without a model: the commonest class, and raw pixels."""

from math import isqrt
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from sslvit.data.spec import Source
from sslvit.evaluate.balance import commonest
from sslvit.evaluate.features import Features, extract
from sslvit.models.readout import Encoded
from sslvit.views.batching import to_pair
from sslvit.views.pretraining import EvalView

COMMONEST, PIXELS = "commonest class", "raw pixels"  # names of rows
SIDE = 32  # pixels; larger images are reduced to it
MOST = 1 << 28  # values of all training images (1 GiB): with millions of images each has fewer pixels
READOUT = "mean"  # of an image's only patch


class Pixels(nn.Module):
    """In the place of a backbone: an image is one patch, whose token is its pixels, reduced to this side:
    b c H W -> b 1 (c s s)."""

    readouts = (READOUT,)

    def __init__(self, side: int):
        super().__init__()
        self.size = side, side

    def forward(self, images: Tensor) -> Encoded:
        if images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return Encoded(None, images.flatten(1)[:, None])


class Baselines(NamedTuple):
    train: Features  # raw pixels
    test: Features
    side: int  # pixels of the images
    commonest: float  # accuracy on these test images of always predicting the commonest class
    commonest_of_all: float  # and the same on all images


def baselines(
    train: Source, test: Source, ids: tuple[np.ndarray, np.ndarray], view: EvalView, accelerator: Accelerator
) -> Baselines:
    """Baselines on two labelled sources. ids: the training and the test images; view: the evaluations'."""
    side = min(*to_pair(view.size), SIDE, max(1, isqrt(MOST // (len(ids[0]) * train.channels))))
    pixels = Pixels(side)
    x, y = (extract(pixels, s, view, accelerator, ids=i) for s, i in zip((train, test), ids, strict=True))
    of_all = commonest(*(torch.from_numpy(s.required_labels()) for s in (train, test)))
    return Baselines(x, y, side, commonest(x.labels, y.labels), of_all)
