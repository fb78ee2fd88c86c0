"""Ratios against a peer, measured side by side in one run. Slow, and only worth believing on an idle machine."""

import statistics
import time

import pytest
import timm
import torch
from xxhash import xxh3_128

from sslvit import rng
from sslvit.models.vit import ViT
from sslvit.objectives.mpp import MPP
from sslvit.objectives.objective import Batch


@pytest.mark.timing
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


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.parametrize(("model", "size", "batch", "limit"), [("XS/8", 32, 64, 0.015), ("S/16", 224, 8, 0.01)])
def test_looking_whether_gradients_are_finite_costs_a_hundredth_of_a_step(model, size, batch, limit):
    """By their norm, as the loop does, which also clips them. XS has many small ones."""
    objective = MPP(ViT.variant(model, image_size=size)).train()
    images, keys = torch.rand(batch, 3, size, size), rng.key(0, torch.arange(batch))
    optimizer, ratios = torch.optim.AdamW(objective.parameters(), fused=True), []
    for _ in range(9):
        began = time.perf_counter()
        objective(Batch((images,), keys), 0.0)[0].backward()
        looked = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), torch.inf).item()
        took = time.perf_counter() - looked
        optimizer.step()
        ratios.append(took / (time.perf_counter() - began))
        optimizer.zero_grad()
    print(
        f"{model}: median {100 * statistics.median(ratios):.2f} %, {100 * min(ratios):.2f} to {100 * max(ratios):.2f}"
    )
    assert statistics.median(ratios) <= limit


@pytest.mark.timing
@pytest.mark.slow
def test_a_checkpoint_is_hashed_at_a_gigabyte_a_second():
    contents, rates = torch.rand(2**26).numpy().tobytes(), []
    for _ in range(5):
        began = time.perf_counter()
        xxh3_128(contents).digest()
        rates.append(len(contents) / (time.perf_counter() - began))
    print(f"{statistics.median(rates) / 1e9:.1f} GB/s")
    assert statistics.median(rates) > 1e9
