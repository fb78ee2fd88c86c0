"""Near-duplicates: test images that a backbone has all but seen in pretraining.

An image is compared by a thumbnail: 16 x 16 pixels, each channel as it is, of mean 0 and length 1. Two images are
near-duplicates if their thumbnails, or one and the mirrored other, correlate above 0.998; or above 0.99, if the most
similar image is also at most a quarter as far away as the tenth. For in some datasets all images are alike: of
Fashion-MNIST's test images a tenth are above 0.99, most of other clothes of the same cut. Resizing, compression, and
changes of brightness and contrast are recognised, crops and rotations are not, so the count is a lower bound. An image
without contrast has no near-duplicates.
"""

from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit import rng
from sslvit.config import DataConfig, ImagesConfig
from sslvit.data.spec import Source
from sslvit.data.subset import saved_ids
from sslvit.errors import NoInput
from sslvit.runs.settings import as_now
from sslvit.storage import sealed
from sslvit.views.pretraining import EvalView

SIDE = 16
SURE, THRESHOLD = 0.998, 0.99
OTHERS = 10
MOST = 300_000  # pretraining images that are read and compared with each test image
FLAT = 0.5 / 255  # a deviation below which a thumbnail is rounding noise
CHUNK = 1024  # images at a time


class NearDuplicates(NamedTuple):
    ids: Tensor  # m: of the test images with a near-duplicate
    twins: Tensor  # m: the most similar pretraining image
    similarity: Tensor  # m
    total: int  # test images that were compared

    def __str__(self) -> str:
        share = len(self.ids) / self.total
        return f"{len(self.ids):,} of {self.total:,} test images ({share:.2%}) have a near-duplicate in pretraining"


def near_duplicates_of_run(model: Path, seen: str, test: Source, ids: np.ndarray) -> tuple[str, NearDuplicates | None]:
    """A sentence, and the near-duplicates among the test images with these ids. The model was pretrained on `seen`, in
    the words of --data, or else on what its run has recorded."""
    is_run = (model / "config.json").exists() and any((model / name).exists() for name in ("model", "checkpoints"))
    run = (model if is_run else model.parent) / "config.json"
    try:
        images = DataConfig(data=seen) if seen else trained_on(run)
        source = images.some_of(images.source(image_size=2 * SIDE, channels=test.channels))
        if len(source) > MOST:
            raise ValueError(f"{source.name} has {len(source):,} images, more than {MOST:,}")
    except (ValueError, OSError, TypeError, AttributeError) as error:  # the last two of kinds that no run writes
        return f"Near-duplicates in pretraining were not looked for: {error}", None
    duplicates = find_near_duplicates(thumbnails(source), thumbnails(test, ids))
    duplicates = duplicates._replace(ids=saved_ids(test, torch.from_numpy(ids)[duplicates.ids]))
    return f"{duplicates} on {source.name}", duplicates


def trained_on(run: Path) -> DataConfig:
    """The pretraining images, from a run's config.json."""
    remedy = "--seen names the images that the model has seen"
    with sealed.readable(run, remedy):
        written = as_now(sealed.read(run), 0) if run.exists() else {}
        options = {field.name: written[field.name] for field in fields(ImagesConfig) if field.name in written}
        options |= {"only_classes": tuple(written.get("only_classes", ())), "images": written.get("images", 0)}
        images = DataConfig(**options)
    if "data" not in written:
        raise NoInput(remedy)
    return images


def thumbnails(source: Source, ids: np.ndarray | None = None) -> Tensor:
    """n c 16 16, of mean 0 and length 1; zero if an image has no contrast or cannot be read."""
    ids = np.arange(len(source)) if ids is None else ids
    batches = []
    for start in range(0, len(ids), CHUNK):
        samples = source.read(ids[start : start + CHUNK])
        (images,) = EvalView(SIDE)(samples.pixels, rng.key(0, samples.ids), samples.extents)
        centered = images - images.mean((1, 2, 3), keepdim=True)
        flat = centered.square().mean((1, 2, 3), keepdim=True).sqrt() < FLAT
        flat |= torch.isin(samples.ids, torch.tensor([line.id for line in samples.bad]).long())[:, None, None, None]
        batches.append(F.normalize(centered.flatten(1), dim=-1).view_as(images).masked_fill(flat, 0))
    return torch.cat(batches)


def find_near_duplicates(pretraining: Tensor, test: Tensor) -> NearDuplicates:
    """Compares thumbnails, n c h w and m c h w. Ids are their rows."""
    if pretraining.shape[1:] != test.shape[1:]:
        raise ValueError(f"thumbnails of shapes {tuple(pretraining.shape[1:])} and {tuple(test.shape[1:])} differ")
    flat, twins = test.flatten(1), torch.zeros(len(test), dtype=torch.int64)
    highest = torch.full((len(test), OTHERS), -1.0)  # similarities, largest first
    for number, chunk in enumerate(pretraining.split(CHUNK)):
        similarity = torch.maximum(*(flat @ seen.flatten(1).T for seen in (chunk, chunk.flip(-1))))
        here, places = similarity.max(-1)
        twins = torch.where(here > highest[:, 0], places + number * CHUNK, twins)
        rows = (here > highest[:, -1]).nonzero().squeeze(1)  # in most chunks next to none
        highest[rows] = torch.cat([highest[rows], similarity[rows]], 1).topk(OTHERS).values
    best = highest[:, 0]
    stand_out = 1 - best < (1 - highest[:, -1]) / 4
    ids = ((best > SURE) | ((best > THRESHOLD) & stand_out)).nonzero().squeeze(1)
    return NearDuplicates(ids, twins[ids], best[ids], len(test))
