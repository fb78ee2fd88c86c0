"""Schedules at the points where their value is known."""

import bisect
from math import cos, pi

import numpy as np
import pytest

from sslvit.objectives.schedule import cosine, linear, warmup_cosine, warmup_steps


def test_cosine_starts_ends_and_is_half_way_in_the_middle():
    assert [cosine(p, 0.04, 0.4) for p in (0, 0.5, 1)] == pytest.approx([0.04, 0.22, 0.4])
    assert cosine(0.25, 1, 0) == pytest.approx((1 + cos(pi / 4)) / 2)


def test_linear_is_linear_and_stays_inside():
    assert [linear(p, 2, 4) for p in (-1, 0, 0.25, 1, 2)] == [2, 2, 2.5, 4, 4]


def test_warm_up_rises_linearly_and_the_cosine_spans_the_rest():
    value = [warmup_cosine(p, 3.0, warmup=0.2, end=1.0) for p in (0, 0.1, 0.2, 0.6, 1)]
    assert value == pytest.approx([0, 1.5, 3, 2, 1])


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_no_warm_up_and_nothing_but_warm_up(warmup):
    assert warmup_cosine(0.5, 1.0, warmup=warmup) == pytest.approx(0.5)


def test_a_rate_that_falls_in_steps_is_simmims():
    """Its MultiStepLRScheduler: after the warm-up base * 0.1^(milestones at or before the iteration)."""
    iterations, warmup, milestones = 80, 10, [40, 70]
    for i in range(iterations):
        expected = 2.0 * i / warmup if i < warmup else 2.0 * 0.1 ** bisect.bisect_right(milestones, i)
        shares = tuple(each / iterations for each in milestones)
        assert warmup_steps(i / iterations, 2.0, warmup=warmup / iterations, drops=shares) == pytest.approx(expected)


@pytest.mark.parametrize("least", [0.0, 1e-6])
def test_learning_rates_are_those_of_mae_and_moco_v3_at_every_iteration(least):
    """Their adjust_learning_rate: by the epoch and its fraction, i iterations of n an epoch."""
    n, epochs, warmup, peak = 13, 20, 3, 2.4e-3
    for step in range(n * epochs):
        epoch = step / n
        if epoch < warmup:
            expected = peak * epoch / warmup
        else:
            expected = least + (peak - least) * 0.5 * (1 + cos(pi * (epoch - warmup) / (epochs - warmup)))
        ours = warmup_cosine(step / (n * epochs), peak, warmup=warmup / epochs, end=least)
        assert ours == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(("n", "epochs", "warmup"), [(13, 20, 3), (1251, 100, 10)])
def test_dinos_learning_rate_is_its_array_but_for_one_in_w_while_it_warms_up(n, epochs, warmup):
    """utils.cosine_scheduler: np.linspace has its peak at the last of W iterations of warm-up, ours at the first after
    them. At the paper's sizes it is 8e-5 of the rate."""
    w, total, peak, end = warmup * n, epochs * n, 2e-3, 1e-6
    rest = np.arange(total - w)
    official = end + 0.5 * (peak - end) * (1 + np.cos(np.pi * rest / len(rest)))
    official = np.concatenate([np.linspace(0, peak, w), official])
    ours = np.array([warmup_cosine(step / total, peak, warmup=warmup / epochs, end=end) for step in range(total)])
    np.testing.assert_allclose(ours[w:], official[w:], rtol=1e-9, atol=0)
    np.testing.assert_allclose(ours[1:w] / official[1:w], 1 - 1 / w, rtol=1e-9, atol=0)


def test_moco_v3s_momentum_is_this_cosine():
    # 1 - (1 + cos(pi e / E)) / 2 * (1 - m0), from its paper's code
    for p in (0, 0.3, 1):
        assert cosine(p, 0.99, 1) == pytest.approx(1 - 0.5 * (1 + cos(pi * p)) * (1 - 0.99))
