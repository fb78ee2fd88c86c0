"""The view of training on masks: one random scale, crop and flip for an image and its mask.

The linear protocol of DINOv2 and DINOv3 (and mmsegmentation before them): the shorter side becomes the view's size
times a random factor, a square of that size is cut out, and half of them are flipped. Pixels are interpolated, classes
are those of the nearest pixel. Where an image is smaller than the view, its border is repeated and its mask is ignored
(there the image is padded with its mean). Brightness, contrast, saturation and hue change too, in an order drawn for
each image (there contrast comes second or last).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sslvit import rng
from sslvit.data.masks import IGNORED
from sslvit.views.batching import Size, apply_to_rows, checked, to_pair
from sslvit.views.resample import Axis
