"""Every objective in small; a new objective is one line in OBJECTIVES."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslvit import rng
from sslvit.config import TrainConfig
from sslvit.data.labels import Labels
from sslvit.data.source import ArraySource
from sslvit.errors import DataError
from sslvit.models.resnet import BiT, BiTConfig
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.data2vec import Data2Vec
from sslvit.objectives.dino import DINO
from sslvit.objectives.dinov2 import DINOv2
from sslvit.objectives.ibot import IBOT
from sslvit.objectives.ijepa import IJEPA
from sslvit.objectives.lejepa import LeJEPA
from sslvit.objectives.mae import MAE
from sslvit.objectives.moco_v3 import MoCoV3
from sslvit.objectives.mpp import MPP
from sslvit.objectives.objective import Batch, Objective
from sslvit.objectives.segmentation import Segmentation
from sslvit.objectives.simclr import SimCLR
from sslvit.objectives.simmim import SimMIM
from sslvit.objectives.supervised import Supervised
from sslvit.objectives.vicreg import VICReg
from sslvit.processes.collectives import start
from sslvit.train import pretrain
from sslvit.views.pretraining import CropFlip


def vit(seed: int, **changes) -> ViT:
    sizes = {"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 3}
    return ViT(ViTConfig(**(sizes | {"seed": seed, "drop_path": 0.2} | changes)))


def bit(seed: int) -> BiT:
    return BiT(BiTConfig(blocks=(1, 1), width_factor=0.5, root="3x3", image_size=16, seed=seed))


class BrightPixels(Segmentation):
    """Segments the pixels of the second view that are bright, in place of a mask."""

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        images, other = batch.views
        return super().forward(batch._replace(views=(images, (other[:, :1] > 0.5) / 255)), progress)


class Case(NamedTuple):
    make: Callable[[int], Objective]  # from a seed
    views: tuple[int, ...] = (16,)  # sizes of the views that it wants


DECODER = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 4}
OUTPUTS = {"outputs": 64, "hidden": 32, "bottleneck": 16}
HEADS = {"hidden": 32, "dimension": 16}
PATCHES = {"class_token": False, "position": "sincos_mae", "drop_path": 0.0}
PREDICTOR = {"predictor_width": 24, "predictor_depth": 1}
OBJECTIVES = {
    "mpp-mean": Case(lambda seed: MPP(vit(seed), target="mean", seed=seed)),
    "mpp-downsized": Case(lambda seed: MPP(vit(seed), target="downsized", seed=seed)),
    "mpp-pixels": Case(lambda seed: MPP(vit(seed), target="pixels", seed=seed)),
    "mae": Case(lambda seed: MAE(vit(seed, position="sincos_mae"), **DECODER, seed=seed)),
    "moco_v3": Case(lambda seed: MoCoV3(vit(seed), **HEADS, seed=seed), views=(16, 16)),
    "moco_v3-in-chunks": Case(lambda seed: MoCoV3(vit(seed), **HEADS, seed=seed, chunks=2), views=(16, 16)),
    "dino": Case(lambda seed: DINO(vit(seed, drop_path=0.0), **OUTPUTS, seed=seed), views=(16, 16, 8, 8)),
    "ibot": Case(lambda seed: IBOT(vit(seed, drop_path=0.0), **OUTPUTS, seed=seed), views=(16, 16, 8, 8)),
    "dinov2": Case(
        lambda seed: DINOv2(vit(seed, drop_path=0.0), **OUTPUTS, koleo_group=4, seed=seed), views=(16, 16, 8, 8)
    ),
    "dinov2-sinkhorn": Case(
        lambda seed: DINOv2(
            vit(seed, drop_path=0.0),
            **OUTPUTS,
            patch_head=(32, 16, 48),
            assignment="sinkhorn",
            koleo_group=4,
            seed=seed,
        ),
        views=(16, 16, 8, 8),
    ),
    "simmim": Case(lambda seed: SimMIM(vit(seed), seed=seed)),
    "simclr": Case(lambda seed: SimCLR(vit(seed), **HEADS, seed=seed), views=(16, 16)),
    "vicreg": Case(lambda seed: VICReg(vit(seed), dimension=16, seed=seed), views=(16, 16)),
    "lejepa": Case(lambda seed: LeJEPA(vit(seed), **HEADS, directions=32, seed=seed), views=(16, 16, 8, 8)),
    "ijepa": Case(lambda seed: IJEPA(vit(seed, **PATCHES, patch_size=2), **PREDICTOR, seed=seed)),
    "data2vec": Case(lambda seed: Data2Vec(vit(seed, patch_size=2), seed=seed)),
    "segmentation": Case(lambda seed: BrightPixels(vit(seed), classes=2, blocks=2), views=(16, 16)),
    "segmentation-pyramid": Case(lambda seed: BrightPixels(vit(seed), classes=2, head="pyramid"), views=(16, 16)),
    "supervised": Case(lambda seed: Supervised(vit(seed), classes=3, mixup=0.2, cutmix=1.0, seed=seed)),
    "supervised-bit": Case(lambda seed: Supervised(bit(seed), classes=3, mixup=0.2, seed=seed)),
    "supervised-hybrid": Case(lambda seed: Supervised(vit(seed, hybrid="R", patch_size=8), classes=3, seed=seed)),
}


class Views:
    """As many as the case wants, of the sizes that it wants."""

    def __init__(self, case: Case, broken_at: int = 1000):
        self.case, self.calls, self.broken_at = case, 0, broken_at

    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None) -> tuple[Tensor, ...]:
        self.calls += 1
        if self.calls == self.broken_at:
            raise DataError("the machine stopped here")
        views = (
            CropFlip(size)(pixels, rng.fold(key, number), extents)[0] for number, size in enumerate(self.case.views)
        )
        return tuple(views)


def batch_of(case: Case, step: int = 0, b: int = 8, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Batch:
    """Images of three kinds, brighter to one side, that the labels tell apart; each view is a brightness of its own."""
    ids = torch.arange(b)
    views = []
    for view, size in enumerate(case.views):
        noise = rng.uniform(rng.key(0, "noise", step, view, ids), 3, size, size)
        slope = torch.linspace(0, 1, size).expand(size, size)
        slopes = torch.stack([slope, slope.T, 1 - slope])[ids % 3]
        views.append((0.6 * slopes[:, None] + 0.4 * noise).to(device, dtype))
    return Batch(tuple(views), rng.key(0, "forward", step, ids).to(device), (ids % 3).to(device))


def steps(objective: Objective, batches: list[Batch], lr: float = 2e-3, autocast: bool = False) -> list[float]:
    """Trains; returns the loss of each step."""
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step, batch in enumerate(batches):
        with torch.autocast(batch.key.device.type, torch.bfloat16, enabled=autocast):
            loss, _ = objective(batch, step / len(batches))
        loss.backward()
        for parameter in objective.frozen_parameters(step / len(batches)):
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step((step + 1) / len(batches))
        losses.append(loss.item())
    return losses


def trained(case: Case, out: Path, views: Views, threads: int = 1) -> Objective:
    """By the loop: two epochs of 16 images of noise, continued if there are any in this folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 3, 16, 16), np.uint8)
    source = ArraySource(pixels, name="noise", fingerprint="", labels=Labels(np.arange(16) % 3, None, ""))
    config = TrainConfig(out=out, epochs=2, batch_size=8, lr=1e-3, save_every=1, threads=threads, resume=True)
    objective = case.make(0)
    pretrain(objective, source, views, config, start(threads=threads))
    return objective
