"""A teacher follows the formula, gets no gradient, and keeps its own buffers."""

import pytest
import torch
from torch import nn

from sslvit.objectives.teacher import ema_update, frozen_copy


def test_the_teacher_follows_the_formula():
    student = nn.Linear(3, 2)
    teacher = frozen_copy(student)
    start = teacher.weight.clone()
    with torch.no_grad():
        student.weight.add_(1.0)
    ema_update(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight, 0.9 * start + 0.1 * student.weight)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert student.weight.requires_grad


def test_momentum_1_stands_still_and_0_copies():
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    before = teacher.weight.clone()
    ema_update(teacher, student, 1.0)
    assert torch.equal(teacher.weight, before)
    ema_update(teacher, student, 0.0)
    assert torch.equal(teacher.weight, student.weight)


def test_buffers_are_each_networks_own():
    student = nn.BatchNorm1d(2)
    teacher = frozen_copy(student)
    student(torch.randn(8, 2) + 5)
    ema_update(teacher, student, 0.5)
    assert torch.equal(teacher.running_mean, torch.zeros(2))


def test_a_student_with_more_than_the_teacher_is_fine_but_not_with_less():
    teacher = nn.Sequential(nn.Linear(2, 2))
    ema_update(teacher, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), 0.5)
    with pytest.raises(ValueError, match=r"1\.weight"):
        ema_update(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), teacher, 0.5)
