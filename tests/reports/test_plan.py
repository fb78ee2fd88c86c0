"""The plan for GPUs that are not here: its counts against torch's profiler, its arithmetic by hand."""

import re

import pytest
import torch
from objectives_zoo import OBJECTIVES, batch_of
from torch.profiler import ProfilerActivity, profile

from sslvit.config import TrainConfig
from sslvit.reports.plan import (
    GB,
    SIZES,
    Alive,
    Machine,
    Memory,
    Parts,
    fits,
    largest,
    machine,
    memory_of,
    parabola,
    told,
)
from sslvit.training import optim


def profiled_peak(step) -> int:
    """The most bytes at any time beyond those at the start, by torch's own records of its allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    now = most = 0
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("name", ["mpp-mean", "mae", "dino", "supervised"])
def test_bytes_that_live_are_those_that_torch_records(name):
    case = OBJECTIVES[name]
    objective = case.make(0).train()
    optimizer = optim.new_optimizer(objective, TrainConfig(lr=1e-3))
    batch = batch_of(case, b=64)

    def step():
        loss, _ = objective(batch, 0.5)
        loss.backward()
        optimizer.step()
        objective.after_step(0.5)
        del loss
        optimizer.zero_grad()

    step()
    recorded = profiled_peak(step)
    with Alive() as alive:
        alive.ignore([*objective.parameters(), *objective.buffers()])
        step()
    assert alive.peak == pytest.approx(recorded, rel=0.05)


@pytest.mark.parametrize("name", ["mpp-mean", "moco_v3", "dinov2", "vicreg"])
def test_small_steps_tell_the_peak_of_a_larger_one(name, monkeypatch):
    case = OBJECTIVES[name]
    objective, config = case.make(0), TrainConfig(lr=1e-3)
    monkeypatch.setattr("sslvit.reports.plan.SIZES", (8, 12, 16))
    memory = memory_of(objective, config, lambda images: batch_of(case, b=images))
    monkeypatch.setattr("sslvit.reports.plan.SIZES", (64, 65, 66))
    larger = memory_of(objective, config, lambda images: batch_of(case, b=images))
    assert memory.step(64) == pytest.approx(larger.step(64), rel=0.05)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    assert memory.gradients == 4 * trained
    assert memory.moments == pytest.approx(8 * trained, rel=0.01)
    assert memory.weights >= 4 * sum(p.numel() for p in objective.parameters())


def test_gpus_by_name():
    assert machine(("h100",)) == Machine("h100", 80 * GB, 1, 989e12)
    assert machine(("h100:94GB", "x", "8")) == machine(("H100:94gb x 8",)) == Machine("h100", 94 * GB, 8, 989e12)
    assert machine(("mine:12.5GB",)) == Machine("mine", 12.5 * GB, 1, None)
    for wrong in (("mine",), ("h100:80",), ("h100", "x", "0"), ("",)):
        with pytest.raises(ValueError, match="--plan"):
            machine(wrong)


# After the forward pass there are no gradients yet, but 10 n + n^2 / 2 bytes of activations; at the end 4,000 and 100.
LATE_AND_EARLY = torch.tensor([[100.0, 4_100.0], [10.0, 0.0], [0.5, 0.0]], dtype=torch.float64)
BY_HAND = Memory(
    weights=4_000, moments=8_000, gradients=4_000, largest_block=500, inputs=5, forward=1, coefficients=LATE_AND_EARLY
)  # fmt: skip


def test_the_arithmetic_by_hand():
    assert BY_HAND.step(10) == 4_100
    assert BY_HAND.step(100) == 100 + 1_000 + 5_000
    assert BY_HAND.peak(100, Parts()) == 12_000 + 6_100
    # Of 16,000 bytes an eighth, the weights once more, the largest block twice, and the end of the forward pass.
    assert BY_HAND.peak(100, Parts(8, shards=8)) == 2_000 + 4_000 + 1_000 + 6_100
    # With few images the end of a step is the peak, of which 4,000 bytes are gradients.
    assert BY_HAND.peak(0, Parts(8, shards=8)) == 2_000 + 4_000 + 1_000 + 100
    assert BY_HAND.peak(100, Parts(8)) == 12_000 + 6_100 + 4_000  # DDP's buckets
    assert BY_HAND.peak(100, Parts(accumulation=3)) == 12_000 + 6_100 + 4_000 + 2 * 500
    assert BY_HAND.peak(100, Parts(8, shards=8, accumulation=3)) == 13_100 + 500 + 2 * 500
    n = torch.tensor(SIZES, dtype=torch.float64)[:, None]
    a, b, c = LATE_AND_EARLY
    assert torch.allclose(parabola(a + b * n + c * n**2), LATE_AND_EARLY)
    assert parabola(torch.tensor([[100.0], [110.0], [115.0]], dtype=torch.float64))[2] == 0


def test_the_largest_batch_just_fits():
    on = Machine("small", 1 * GB + 1.1 * 50_000, 1, None)
    most = largest(BY_HAND, on, Parts())
    assert fits(BY_HAND, on, most, Parts())
    assert not fits(BY_HAND, on, most + 1, Parts())
    assert largest(BY_HAND, Machine("none", 1 * GB, 1, None), Parts()) == 0


def test_the_verdict_names_the_batch_and_the_way_out():
    on = Machine("h100", 1 * GB + 1.1 * 50_000, 2, 1e12)
    lines = " ".join(told(BY_HAND, on, TrainConfig(batch_size=100), flops=4e9))
    most = largest(BY_HAND, on, Parts(2))
    assert f"the largest batch that fits: {most:,} images per GPU, --batch_size {2 * most}" in lines
    assert ": fits." in lines
    assert "about 0.5 s" in lines  # 100 images of 4e9 at 40% of 2e12
    lines = " ".join(told(BY_HAND, Machine("h100", 1 * GB, 2, None), TrainConfig(), flops=None))
    assert re.search("DOES NOT FIT.*not one image fits; --shard", lines)


@pytest.mark.slow
def test_s16_keeps_what_the_documentation_says():
    """docs/scaling.md: a step of MPP S/16 keeps 32 MiB for each image at 224 px in bf16."""
    from sslvit.models.vit import ViT
    from sslvit.objectives.mpp import MPP
    from sslvit.objectives.objective import Batch

    objective = MPP(ViT.variant("S/16", image_size=224))
    batch = lambda images: Batch((torch.rand(images, 3, 224, 224),), torch.arange(images))  # noqa: E731
    memory = memory_of(objective, TrainConfig(lr=1e-3, precision="bf16"), batch)
    assert (memory.step(1001) - memory.step(1000)) / 2**20 == pytest.approx(32, rel=0.15)
