"""Every objective trained on a GPU as on a CPU. Skipped without a GPU.

SSLVIT_TEST_DEVICE=cpu tries the tests themselves where there is none.
"""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from objectives_zoo import OBJECTIVES, Case, Views, batch_of
from together import Plan, trained_together

from sslvit.config import TrainConfig
from sslvit.data.labels import Labels
from sslvit.data.source import ArraySource
from sslvit.errors import DataError
from sslvit.objectives.objective import Batch, Objective
from sslvit.processes.collectives import start
from sslvit.train import pretrain

DEVICE = os.environ.get("SSLVIT_TEST_DEVICE", "cuda")
STEPS, IMAGES = 20, 32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.fixture(params=OBJECTIVES)
def case(request) -> Case:
    return OBJECTIVES[request.param]


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """By default convolutions, unlike matrix products, round to ten bits (TF32)."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on(batch: Batch, device: str) -> Batch:
    return Batch(tuple(view.to(device) for view in batch.views), batch.key.to(device), batch.labels.to(device))


@cache
def losses(case: Case, device: str, dtype: torch.dtype, *, autocast: bool = False) -> np.ndarray:
    """Of each step."""
    objective = case.make(0).to(device, dtype)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for step in range(STEPS):
        batch, progress = on(batch_of(case, step, IMAGES, dtype), device), step / STEPS
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss, _ = objective(batch, progress)
        loss.backward()
        for parameter in objective.frozen_parameters(progress):
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step((step + 1) / STEPS)
        found.append(loss.item())
    return np.array(found)


def test_twenty_steps_in_float64_are_the_cpus(case):
    """So what is computed is the same, whatever rounding does."""
    np.testing.assert_allclose(losses(case, DEVICE, torch.float64), losses(case, "cpu", torch.float64), rtol=1e-6)


def test_twenty_steps_in_float32_are_the_cpus_up_to_rounding(case):
    """As near to float64 as the CPU's float32 is, ten times over, or within 1e-4."""
    exact = losses(case, "cpu", torch.float64)
    rounding = np.abs(losses(case, "cpu", torch.float32) - exact).max()
    found = losses(case, DEVICE, torch.float32)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=10 * rounding)


def test_bfloat16_is_near_float32(case):
    """The first step by bfloat16's 8 bits; all steps by a tenth of the loss."""
    exact = losses(case, DEVICE, torch.float32)
    found = losses(case, DEVICE, torch.float32, autocast=True)
    assert found[0] == pytest.approx(exact[0], rel=0.05)
    assert np.isfinite(found).all()
    assert found.mean() == pytest.approx(exact.mean(), rel=0.1)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(case, tmp_path):
    """Up to rounding: a GPU adds in an order of its own."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 3, 16, 16), np.uint8)
    source = ArraySource(pixels, name="noise", fingerprint="", labels=Labels(np.arange(16) % 3, None, ""))

    def run(out: Path, views: Views) -> Objective:
        config = TrainConfig(out=out, epochs=2, batch_size=8, lr=1e-3, save_every=1, resume=True)
        objective = case.make(0)
        pretrain(objective, source, views, config, start())
        return objective

    whole = run(tmp_path / "whole", Views(case))
    assert next(whole.parameters()).device.type == DEVICE
    with pytest.raises(DataError, match="stopped here"):
        run(tmp_path / "stopped", Views(case, broken_at=4))
    for name, value in run(tmp_path / "stopped", Views(case)).state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.processes
def test_two_processes_on_one_gpu_have_the_losses_of_one_on_a_cpu(tmp_path):
    """By gloo: NCCL wants a GPU for each."""
    names = tuple(OBJECTIVES)
    steps = 4
    here = trained_together(Plan(names, processes=1, images=IMAGES, steps=steps), tmp_path)
    (tmp_path / "there").mkdir()
    there = trained_together(Plan(names, processes=2, images=IMAGES, steps=steps, device=DEVICE), tmp_path / "there")
    for name in names:
        np.testing.assert_allclose(there[name], here[name], rtol=1e-6, err_msg=name)
