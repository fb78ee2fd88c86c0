"""What must hold on a GPU, and what views cost there. Skipped without one: python -m pytest -s tests/gpu/test_gpu.py"""

import statistics

import pytest
import torch

from sslvit import rng
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.moco_v3 import MoCoV3 as Objective
from sslvit.objectives.mpp import MPP
from sslvit.objectives.objective import Batch
from sslvit.views.pretraining import ContrastivePair, CropFlip, MultiCrop
from sslvit.views.supervised import SupervisedView

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def images(count: int, side: int = 256) -> torch.Tensor:
    coarse = rng.uniform(rng.key(0, torch.arange(count)), 3, side // 8, side // 8)
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)


def test_random_numbers_are_the_same_bits():
    key = rng.key(3, torch.arange(1000))
    there = key.cuda()
    assert torch.equal(rng.uniform(key, 64), rng.uniform(there, 64).cpu())
    assert torch.equal(rng.integers(key, 1000, 64), rng.integers(there, 1000, 64).cpu())
    assert torch.equal(rng.permutation(rng.key(1), 5000), rng.permutation(rng.key(1).cuda(), 5000).cpu())


@pytest.mark.parametrize(
    "view",
    [CropFlip(64), ContrastivePair(64), MultiCrop(64, 32), SupervisedView(64)],
    ids=lambda v: type(v).__name__,
)
def test_views_are_the_cpus_up_to_rounding(view):
    pixels, key = images(16, 96), rng.key(0, "views", torch.arange(16))
    for here, there in zip(view(pixels, key), view(pixels.cuda(), key.cuda()), strict=True):
        difference = (here - there.cpu()).abs()
        # Rounding decides on which side of a threshold a solarized value falls, so a few may differ by much.
        assert difference.mean() < 1e-5
        assert (difference > 1e-4).float().mean() < 1e-4


def test_a_step_of_mpp_is_the_cpus_up_to_rounding():
    objective = MPP(ViT(ViTConfig(image_size=32, patch_size=8, width=64, depth=2, heads=2)))
    batch = Batch((images(8, 32) / 255,), rng.key(0, torch.arange(8)))
    here, _ = objective(batch, 0.0)
    there, _ = objective.cuda()(Batch((batch.views[0].cuda(),), batch.key.cuda()), 0.0)
    assert there.item() == pytest.approx(here.item(), rel=1e-4)


def test_moco_v3s_pair_at_224_costs_at_most_a_tenth_of_a_bf16_step():
    batch, pixels = 256, images(256).cuda()
    objective = Objective(ViT.variant("S-moco_v3/16", image_size=224)).cuda()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], fused=True)
    view = ContrastivePair(224)

    def step(turn: int) -> list[torch.cuda.Event]:
        """Nothing waits in between, as in training: the host plans the next views while the GPU computes."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        key = rng.key(turn, torch.arange(batch))
        marks[0].record()
        views = view(pixels, key)
        marks[1].record()
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = objective(Batch(views, key), 0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(0.5)
        marks[2].record()
        return marks

    steps = [step(turn) for turn in range(25)]
    torch.cuda.synchronize()
    shares = [one[0].elapsed_time(one[1]) / one[0].elapsed_time(one[2]) for one in steps][5:]
    print(f"the pair's share of a step: {statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})")
    assert statistics.median(shares) <= 0.10
