"""Every objective trained on a GPU as on a CPU. Skipped without a GPU.

Set SSLVIT_TEST_DEVICE=cpu to run these tests on a CPU instead, to check the tests themselves.
"""

import os
from functools import cache

import numpy as np
import pytest
import torch
from objectives_zoo import OBJECTIVES, Case, Views, batch_of, steps, trained
from together import Plan, trained_together

from sslvit.errors import DataError

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


@cache
def losses(case: Case, device: str, dtype: torch.dtype, *, autocast: bool = False) -> np.ndarray:
    """The loss of each step."""
    batches = [batch_of(case, step, IMAGES, dtype, device) for step in range(STEPS)]
    return np.array(steps(case.make(0).to(device, dtype), batches, lr=1e-3, autocast=autocast))


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
    whole = trained(case, tmp_path / "whole", Views(case), threads=0)
    assert next(whole.parameters()).device.type == DEVICE
    with pytest.raises(DataError, match="stopped here"):
        trained(case, tmp_path / "stopped", Views(case, broken_at=4), threads=0)
    resumed = trained(case, tmp_path / "stopped", Views(case), threads=0)
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.processes
def test_two_processes_on_one_gpu_have_the_losses_of_one_on_a_cpu(tmp_path):
    """By gloo: NCCL wants a GPU for each."""
    names = tuple(OBJECTIVES)
    here = trained_together(Plan(names, processes=1, images=IMAGES, steps=4), tmp_path)
    (tmp_path / "there").mkdir()
    there = trained_together(Plan(names, processes=2, images=IMAGES, steps=4, device=DEVICE), tmp_path / "there")
    for name in names:
        np.testing.assert_allclose(there[name], here[name], rtol=1e-6, err_msg=name)
