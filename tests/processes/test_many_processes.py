"""Many more processes than cores: with 64 the losses are those of one process, as with two in test_contract.py."""

import pytest
import torch
from objectives_zoo import OBJECTIVES, batch_of
from together import Plan, trained_together

pytestmark = [pytest.mark.processes, pytest.mark.slow]
PROCESSES, IMAGES, STEPS = 64, 256, 3
# Teachers and centres, Sinkhorn and KoLeo, batch norm, gathered keys, gathered variances, random directions.
NAMES = ("mpp-mean", "dino", "dinov2-sinkhorn", "moco_v3", "vicreg", "lejepa", "segmentation")


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, list[float]]:
    plan = Plan(NAMES, processes=PROCESSES, images=IMAGES, steps=STEPS)
    return trained_together(plan, tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("name", NAMES)
def test_64_processes_have_the_losses_of_one(name, losses):
    case = OBJECTIVES[name]
    objective = case.make(0).double()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    for step in range(STEPS):
        loss, _ = objective(batch_of(case, step, IMAGES, torch.float64), step / STEPS)
        assert losses[name][step] == pytest.approx(loss.item(), rel=1e-9), step
        loss.backward()
        for parameter in objective.frozen_parameters(step / STEPS):
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step((step + 1) / STEPS)
