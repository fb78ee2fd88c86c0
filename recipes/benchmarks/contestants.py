"""What all contestants of a training step have in common: sizes, heads, views; and our own contestants."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.vit import ViT
from sslvit.objectives.data2vec import Data2Vec
from sslvit.objectives.dino import DINO
from sslvit.objectives.dinov2 import DINOv2
from sslvit.objectives.ibot import IBOT
from sslvit.objectives.ijepa import IJEPA
from sslvit.objectives.lejepa import LeJEPA
from sslvit.objectives.mae import MAE
from sslvit.objectives.moco_v3 import MoCoV3
from sslvit.objectives.mpp import MPP
from sslvit.objectives.objective import Batch
from sslvit.objectives.simclr import SimCLR
from sslvit.objectives.simmim import SimMIM
from sslvit.objectives.supervised import Supervised
from sslvit.objectives.vicreg import VICReg

CLASSES = 1000
PROGRESS = 0.5  # of training, at which all steps are taken
PATCHES_ALONE = {"class_token": False, "position": "sincos_mae"}  # I-JEPA's backbone
PAIR, CROPS = (2, 0), (2, 8)
VIEWS = {"moco_v3": PAIR, "simclr": PAIR, "vicreg": PAIR, "dino": CROPS, "ibot": CROPS, "dinov2": CROPS}
VIEWS |= {"lejepa": (2, 4)}  # how many large and small ones; of the others one large one


class Heads(NamedTuple):
    moco_v3: int  # hidden
    dino: tuple[int, int, int]  # hidden, bottleneck, outputs; DINOv2 has the same
    ibot: tuple[int, int, int]
    decoder: tuple[int, int, int]  # MAE's width, depth, heads
    simclr: tuple[int, int]  # hidden, output
    vicreg: int  # of all three layers
    lejepa: tuple[int, int, int]  # hidden, output, and the directions of its loss
    predictor: tuple[int, int]  # I-JEPA's width, depth


HEADS = {
    "paper": Heads(
        4096, (2048, 256, 65536), (2048, 256, 8192), (512, 8, 16), (2048, 128), 8192, (2048, 64, 1024), (384, 6)
    ),
    "small": Heads(512, (512, 64, 1024), (512, 64, 1024), (128, 2, 4), (512, 128), 512, (512, 64, 256), (96, 3)),
}


class Sizes(NamedTuple):
    model: str
    image_size: int
    batch_size: int
    heads: Literal["paper", "small"] = "paper"

    @property
    def vit(self) -> ViT:
        return self.changed_vit()

    def changed_vit(self, **changes: Any) -> ViT:
        return ViT.variant(self.model, image_size=self.image_size, **changes)

    @property
    def small_crop(self) -> int:
        """Whole patches, of at most three sevenths, as DINO's 96 of 224."""
        patch = self.vit.patch_size[0]
        return max(self.image_size * 3 // 7 // patch, 1) * patch

    def views(self, objective: str, device: str) -> tuple[Tensor, ...]:
        large, small = VIEWS.get(objective, (1, 0))
        sizes = [self.image_size] * large + [self.small_crop] * small
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.rand(self.batch_size, 3, s, s, generator=generator).to(device) for s in sizes)

    def keys(self, device: str) -> Tensor:
        return rng.key(0, torch.arange(self.batch_size, device=device))


class Contestant(NamedTuple):
    trained: nn.Module
    loss: Callable[[tuple[Tensor, ...]], Tensor]
    after: Callable[[], None] = lambda: None


def ours(name: str, sizes: Sizes, device: str) -> Contestant:
    vit, heads = sizes.vit, HEADS[sizes.heads]

    def named(names: str, values: tuple[int, ...]) -> dict[str, int]:
        return dict(zip(names.split(), values, strict=True))

    dino, ibot = (named("hidden bottleneck outputs", widths) for widths in (heads.dino, heads.ibot))
    decoder = named("decoder_width decoder_depth decoder_heads", heads.decoder)
    predictor = named("predictor_width predictor_depth", heads.predictor)
    objective = {
        "supervised": lambda: Supervised(vit, classes=CLASSES),
        "mpp": lambda: MPP(vit),
        "mae": lambda: MAE(sizes.changed_vit(position="sincos_mae"), **decoder),
        "simmim": lambda: SimMIM(vit),
        "data2vec": lambda: Data2Vec(vit),
        "ijepa": lambda: IJEPA(sizes.changed_vit(**PATCHES_ALONE), **predictor),
        "moco_v3": lambda: MoCoV3(vit, hidden=heads.moco_v3),
        "simclr": lambda: SimCLR(vit, **named("hidden dimension", heads.simclr)),
        "vicreg": lambda: VICReg(vit, dimension=heads.vicreg),
        "lejepa": lambda: LeJEPA(vit, **named("hidden dimension directions", heads.lejepa)),
        "dino": lambda: DINO(vit, drop_path=0.0, **dino),
        "ibot": lambda: IBOT(vit, drop_path=0.0, **ibot),
        "dinov2": lambda: DINOv2(vit, drop_path=0.0, **dino),
    }[name]()
    objective.to(device).train()
    keys, labels = sizes.keys(device), torch.arange(sizes.batch_size, device=device)
    return Contestant(
        objective,
        lambda views: objective(Batch(views, keys, labels), PROGRESS)[0],
        lambda: objective.after_step(PROGRESS),
    )
