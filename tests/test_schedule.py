"""Schedules at the points where their value is known."""

from math import cos, pi

import pytest

from sslvit.schedule import cosine, linear, warmup_cosine


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


def test_moco_v3s_momentum_is_this_cosine():
    # 1 - (1 + cos(pi e / E)) / 2 * (1 - m0), from its paper's code
    for p in (0, 0.3, 1):
        assert cosine(p, 0.99, 1) == pytest.approx(1 - 0.5 * (1 + cos(pi * p)) * (1 - 0.99))
