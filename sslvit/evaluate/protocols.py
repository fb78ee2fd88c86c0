"""Linear probes by name, with the settings of the released code.

MoCo v3 (main_lincls.py), DINO (eval_linear.py), MAE (main_linprobe.py, util/lars.py) and DINOv2 (eval/linear.py), from
github.com/facebookresearch. Theirs read newly augmented images every epoch, ours cached features of plain images or of
a few augmented versions: the numbers compare backbones with each other, not with the papers'.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Protocol:
    """Every rate with every decay is a head, with momentum 0.9."""

    rates: tuple[float, ...]  # learning rates for a batch of 256, scaled by batch_size / 256
    batch_size: int
    epochs: int
    decays: tuple[float, ...] = (0.0,)
    optimizer: Literal["sgd", "lars"] = "sgd"
    warmup: int = 0  # epochs
    moves: Literal["epoch", "step"] = "step"  # how often the cosine schedule does
    norm: bool = False  # batch norm without scale and shift, eps 1e-6, before the heads
    readouts: tuple[str, ...] = ("cls",)  # as in the paper; each is probed separately


MOCO_V3 = Protocol(rates=(3.0,), batch_size=1024, epochs=90, moves="epoch")
DINO_S = Protocol(rates=(0.001,), batch_size=1024, epochs=100, moves="epoch", readouts=("cls:4",))
DINO_B = replace(DINO_S, readouts=("both",))
# 50 epochs for L and H.
MAE = Protocol(rates=(0.1,), batch_size=16384, epochs=90, optimizer="lars", warmup=10, norm=True)
# The code's 12,500 batches are ten epochs of ImageNet.
DINOV2 = Protocol(
    rates=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
    batch_size=1024,
    epochs=10,
    readouts=("cls", "cls:4", "both", "both:4"),
)
# Ours, for small datasets: standardised features, and rates from too low to too high.
GRID = Protocol(
    rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0), decays=(0.0, 1e-4, 1e-3), batch_size=1024, epochs=30, norm=True
)
PROTOCOLS = {"grid": GRID, "moco_v3": MOCO_V3, "dino_s": DINO_S, "dino_b": DINO_B, "mae": MAE, "dinov2": DINOV2}
