"""Near-duplicates between two sets: test images that a backbone has all but seen in pretraining.

An image is compared by a thumbnail: 16 x 16 pixels, each channel as it is, its mean taken away and its length set to 1.
Two images are near-duplicates if their thumbnails, or one and the mirrored other, correlate above 0.998; or above
0.99, if the most alike image is also at most a quarter as far away as the tenth, for there are sets in which all are
alike: of Fashion-MNIST's test images a tenth are above 0.99, most of other clothes of the same cut. That survives
resizing, compression, and changes of brightness and contrast; not crops or rotations, so the count is a lower bound.
An image without contrast is compared with nothing.
"""

from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit import rng
from sslvit.config import DataConfig, ImagesConfig, as_now
from sslvit.data.spec import Source
from sslvit.errors import NoInput
from sslvit.storage import sealed
from sslvit.views.pretraining import EvalView

SIDE = 16
SURE, THRESHOLD = 0.998, 0.99
OTHERS = 10
MOST = 300_000  # images that are compared without being asked twice: they are read, and compared with each test image
FLAT = 0.5 / 255  # a deviation below which a thumbnail holds nothing but rounding


class NearDuplicates(NamedTuple):
    ids: Tensor  # m: of the test images with a near-duplicate
    twins: Tensor  # m: the most alike image of the other set
    similarity: Tensor  # m
    total: int  # test images looked at

    def __str__(self) -> str:
        share = 100 * len(self.ids) / self.total
        return f"{len(self.ids):,} of {self.total:,} test images ({share:.2f} %) have a near-duplicate in pretraining"


def near_duplicates_of_run(model: Path, seen: str, test: Source, ids: np.ndarray) -> tuple[str, NearDuplicates | None]:
    """A sentence on the test images with these ids and what the model was pretrained on: `seen`, in the words of
    --data, or else what its run says. And what was found."""
    is_run = (model / "config.json").exists() and any((model / name).exists() for name in ("model", "checkpoints"))
    run = (model if is_run else model.parent) / "config.json"
    try:
        images = DataConfig(data=seen) if seen else trained_on(run)
        source = images.some_of(images.source(image_size=2 * SIDE, channels=test.channels))
    except (ValueError, OSError, TypeError, AttributeError) as error:  # of kinds that no run writes
        return f"Near-duplicates in pretraining were not looked for: {error}", None
    if len(source) > MOST:
        why = f"{source.name} has {len(source):,} images, more than {MOST:,}"
        return f"Near-duplicates in pretraining were not looked for: {why}", None
    found = find_near_duplicates(thumbnails(source), thumbnails(test, ids))
    found = found._replace(ids=torch.from_numpy(ids)[found.ids])
    return f"{found} on {source.name}", found


def trained_on(run: Path) -> DataConfig:
    """By the configuration that a run has written down."""
    remedy = "--seen names the images that the model has seen"
    with sealed.readable(run, remedy):
        written = as_now(sealed.read(run), 0) if run.exists() else {}
        named = {field.name: written[field.name] for field in fields(ImagesConfig) if field.name in written}
        images = DataConfig(
            **named | {"only_classes": tuple(written.get("only_classes", ())), "images": written.get("images", 0)}
        )
    if "data" not in written:
        raise NoInput(remedy)
    return images


def thumbnails(source: Source, ids: np.ndarray | None = None, *, batch_size: int = 1024) -> Tensor:
    """n c 16 16, of mean 0 and length 1; zero where an image has no contrast, or cannot be read."""
    parts, ids = [], np.arange(len(source)) if ids is None else ids
    for start in range(0, len(ids), batch_size):
        samples = source.read(ids[start : start + batch_size])
        (images,) = EvalView(SIDE)(samples.pixels, rng.key(0, samples.ids), samples.extents)
        centred = images - images.mean((1, 2, 3), keepdim=True)
        flat = centred.square().mean((1, 2, 3), keepdim=True).sqrt() < FLAT
        flat |= torch.isin(samples.ids, torch.tensor([line.id for line in samples.bad]).long())[:, None, None, None]
        parts.append(F.normalize(centred.flatten(1), dim=-1).view_as(images).masked_fill(flat, 0))
    return torch.cat(parts)


def find_near_duplicates(pretraining: Tensor, test: Tensor, *, threshold: float = THRESHOLD, chunk: int = 1024) -> NearDuplicates:
    """Of thumbnails, n c h w and m c h w. Ids are their rows."""
    if pretraining.shape[1:] != test.shape[1:]:
        raise ValueError(f"thumbnails {tuple(pretraining.shape[1:])} and {tuple(test.shape[1:])} do not compare")
    best = torch.full((len(test),), -1.0)
    twins = torch.zeros(len(test), dtype=torch.int64)
    flat, others = test.flatten(1), torch.full((len(test), OTHERS), -1.0)
    for start in range(0, len(pretraining), chunk):
        piece = pretraining[start : start + chunk]
        similarity = torch.maximum(*(flat @ seen.flatten(1).T for seen in (piece, piece.flip(-1))))
        here, rows = similarity.max(-1)
        twins = torch.where(here > best, rows + start, twins)
        best = torch.maximum(here, best)
        rows = (here > others[:, -1]).nonzero().squeeze(1)  # in most pieces next to none
        several = torch.cat([others[rows], similarity[rows]], 1)
        others[rows] = several.topk(OTHERS).values
    stand_out = 1 - best < (1 - others[:, -1]) / 4
    ids = ((best > SURE) | ((best > threshold) & stand_out)).nonzero().squeeze(1)
    return NearDuplicates(ids, twins[ids], best[ids], len(test))
