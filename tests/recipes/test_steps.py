"""The benchmark of training steps: each objective has a contestant, and its peers do as much as ours."""

import random

import pytest
from contestants import Sizes, ours
from objectives_zoo import OBJECTIVES as ZOO
from peers import BY, PEERS
from steps import OBJECTIVES, counted, stepper
from timing import OURS

TINY, SIZES = Sizes("mu/8", 32, 4, "small"), Sizes("XS/8", 32, 8, "small")
FAITHFUL = [(who, name) for who, names in PEERS.items() for name in names if name != "mpp"]


def test_every_objective_that_trains_on_images_is_timed():
    zoo = {name.split("-")[0] for name in ZOO} - {"segmentation"}
    assert {*OBJECTIVES} == zoo


@pytest.mark.parametrize("name", OBJECTIVES)
def test_our_contestant_takes_a_step(name):
    contestant = ours(name, TINY, "cpu")
    loss = contestant.loss(TINY.views(name, "cpu"))
    loss.backward()
    contestant.after()
    assert loss.isfinite()
    assert all(p.grad is not None for p in contestant.trained.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # lightly's
@pytest.mark.parametrize(("who", "name"), FAITHFUL)
def test_a_peer_has_our_parameters_and_does_our_operations(who, name):
    """But for a head's biases, for pixels that are not hidden, and for how many patches are hidden of iBOT's crops."""
    pytest.importorskip(who, exc_type=ImportError)
    theirs, mine = BY[who](name, SIZES, "cpu"), ours(name, SIZES, "cpu")
    trained = [sum(p.numel() for p in one.trained.parameters() if p.requires_grad) for one in (theirs, mine)]
    assert trained[0] == pytest.approx(trained[1], rel=1e-3)
    random.seed(0)  # lightly's masks
    operations = [counted(stepper(one, name, SIZES, "cpu")) for one in (who, OURS)]
    assert operations[0] == pytest.approx(operations[1], rel=0.06)
