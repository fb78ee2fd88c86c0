"""imagecorruptions 1.1.2, other people's ImageNet-C, in today's numpy, scipy and scikit-image, drawing our numbers.

It is no dependency of the tests (it brings OpenCV, numba and scikit-image): `pip install imagecorruptions==1.1.2`, or
its wheel and theirs on PYTHONPATH, makes the tests that need it run.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats


def corruptions() -> Any:
    """Its module. What it needs and is gone by now has stand-ins: pkg_resources, np.float_, an argument of skimage."""
    pytest.importorskip("cv2")
    filters = pytest.importorskip("skimage.filters")
    gone = types.ModuleType("pkg_resources")
    gone.resource_filename = lambda package, name: name  # of frost's photographs alone
    moved = types.ModuleType("scipy.ndimage.interpolation")
    moved.map_coordinates = scipy.ndimage.map_coordinates
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "pkg_resources", gone)
        patched.setitem(sys.modules, moved.__name__, moved)
        module = pytest.importorskip("imagecorruptions.corruptions")

    def gaussian(image: np.ndarray, sigma: Any, multichannel: bool = False, **options: Any) -> np.ndarray:
        return filters.gaussian(image, sigma, channel_axis=-1 if multichannel else None, **options)

    module.gaussian = gaussian
    return module


class Drawn:
    """Stands for a generator of numpy: what it draws are our numbers, in their order."""

    def __init__(self, uniform: Iterator[np.ndarray], normal: Iterator[np.ndarray], integers: Iterator[np.ndarray]):
        self.numbers, self.normals, self.whole = uniform, normal, integers

    def random(self, shape: Any) -> np.ndarray:
        return next(self.numbers).reshape(shape)

    def uniform(self, low: float = 0.0, high: float = 1.0, size: Any = ()) -> np.ndarray:
        return low + (high - low) * next(self.numbers).reshape(size)

    def normal(self, loc: float = 0.0, scale: float = 1.0, size: Any = ()) -> np.ndarray:
        return loc + scale * next(self.normals).reshape(size)

    def poisson(self, mean: np.ndarray) -> np.ndarray:
        return scipy.stats.poisson.ppf(next(self.numbers).reshape(mean.shape), mean)

    def randint(self, low: int, high: int, size: Any) -> np.ndarray:
        return next(self.whole)


@contextmanager
def drawing(uniform: Any = (), normal: Any = (), integers: Any = ()) -> Iterator[None]:
    drawn = Drawn(iter(uniform), iter(normal), iter(integers))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(np, "float_", np.float64, raising=False)
        for name in ("uniform", "normal", "poisson", "randint"):
            patched.setattr(np.random, name, getattr(drawn, name))
        patched.setattr(np.random, "default_rng", lambda *seed: drawn)
        yield
