"""What an accuracy is held against where no model has a part in it: the commonest class, and raw pixels."""

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
SIDE = 32  # pixels of an image that is read as it is; larger ones are reduced to it
MOST = 1 << 28  # pixels of all training images (1 GiB): of millions of images each has fewer
READOUT = "mean"  # of the one patch that an image is


class Pixels(nn.Module):
    """In the place of a backbone: an image is one patch, whose token holds its pixels, reduced to a side that is not
    longer than its own: b c H W -> b 1 (c s s)."""

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
    side: int  # pixels that the images were read at
    commonest: float  # accuracy of the commonest class on these test images
    commonest_of_all: float  # and on all, answering the commonest class of all


def baselines(
    train: Source,
    test: Source,
    ids: tuple[np.ndarray, np.ndarray],
    view: EvalView,
    accelerator: Accelerator,
) -> Baselines:
    """Of labelled sources. ids: the training and the test images that are read; view: that of evaluations."""
    side = min(*to_pair(view.size), SIDE, max(1, isqrt(MOST // (len(ids[0]) * train.channels))))
    pixels = Pixels(side)
    x, y = (extract(pixels, s, view, accelerator, ids=i) for s, i in zip((train, test), ids, strict=True))
    of_all = commonest(*(torch.from_numpy(s.required_labels()) for s in (train, test)))
    return Baselines(x, y, side, commonest(x.labels, y.labels), of_all)
