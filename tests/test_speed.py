"""Ratios against a peer, measured side by side in one run. Slow, and only worth believing on an idle machine."""

import statistics
import time

import pytest
import timm
import torch

from sslvit import rng
from sslvit.objectives.mpp import MPP
from sslvit.objectives.objective import Batch
from sslvit.vit import ViT


@pytest.mark.slow
def test_a_step_of_mpp_costs_at_most_a_tenth_more_than_timms_bare_backbone():
    """S/16 at 224 px: forward, backward and AdamW, in turns, median of the ratios of neighbours."""
    batch = 4
    objective = MPP(ViT.variant("S/16", image_size=224)).train()
    peer = timm.create_model("vit_small_patch16_224", num_classes=0).train()
    images, keys = torch.rand(batch, 3, 224, 224), rng.key(0, torch.arange(batch))
    ours, theirs = (torch.optim.AdamW(m.parameters(), fused=True) for m in (objective, peer))

    def step_of_ours() -> None:
        objective(Batch((images,), keys), 0.0)[0].backward()
        ours.step()
        ours.zero_grad()

    def step_of_timm() -> None:
        peer(images).mean().backward()
        theirs.step()
        theirs.zero_grad()

    def seconds(step) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    ratios = [seconds(step_of_ours) / seconds(step_of_timm) for _ in range(12)][2:]
    print(f"MPP S/16 over timm: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    assert statistics.median(ratios) < 1.10
