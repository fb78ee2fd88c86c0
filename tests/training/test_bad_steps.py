"""A step that was not finite is kept: what entered it, the weights it met, and names; and it can be computed again."""

import json
import math

import pytest
import torch
from bad_step import bad_step, dino, part, vit

from sslvit.objectives.supervised import Supervised
from sslvit.training.bad_steps import MOST_SAVED, replay, save_bad_step


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_pixel_is_named_and_its_replay_is_as_bad(tmp_path, value):
    objective, parts = dino(), [part(0), part(4)]
    parts[1][1].views[3][2, 0, 1, 1] = value
    folder, loss = bad_step(objective, parts, tmp_path)
    facts = json.loads((folder / "process-0.json").read_text())
    assert not math.isfinite(loss)
    assert facts["loss"] in ("NaN", "Infinity")
    assert (facts["step"], facts["progress"], facts["seed"]) == (7, 0.25, 3)
    assert facts["not_finite"]["pixels"] == ["view 3 of sample 106"]
    assert facts["not_finite"]["weights"] == []
    assert "student.cls_token" in facts["not_finite"]["gradients"]
    found = replay(folder, dino(seed=1))
    assert not math.isfinite(found.loss)
    assert found.first == "student.patch_embed.backbone"
    assert set(found.gradients) >= set(facts["not_finite"]["gradients"])


def test_weights_that_overflow_are_met_again(tmp_path):
    objective = Supervised(vit(), classes=3)
    with torch.no_grad():
        objective.backbone.blocks[1].mlp.fc1.weight.fill_(1e38)
    ids, batch = part()
    folder, loss = bad_step(objective, [(ids, batch._replace(views=batch.views[:1]))], tmp_path, precision="no")
    assert not math.isfinite(loss)
    found = replay(folder, Supervised(vit(seed=5), classes=3))
    assert found.first == "backbone.blocks.1.mlp.fc1"
    assert not math.isfinite(found.loss)


def test_the_replay_of_a_finite_step_is_that_step(tmp_path):
    """To the bit, so that what a replay shows is what happened; ten small views are not sorted as text."""
    objective, parts = dino(), [part(0), part(4)]
    folder, loss = bad_step(objective, parts, tmp_path)
    found = replay(folder, dino(seed=1))
    assert found == (pytest.approx(loss, abs=0), None, [])


def test_only_the_first_few_are_kept_and_none_twice(tmp_path):
    objective, parts = dino(), [part()]
    kept = [save_bad_step(tmp_path, objective, parts, step=step, progress=0.0) for step in (5, 5, 6, 9, 12, 5)]
    assert [folder is not None for folder in kept] == [True, False, True, True, False, False]
    assert len(list((tmp_path / "bad_steps").iterdir())) == MOST_SAVED


def test_a_disk_that_takes_nothing_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "bad_steps").write_text("in the way")
    assert save_bad_step(tmp_path, dino(), [part()], step=5, progress=0.0) is None
    assert "step 5 was not finite and could not be saved" in caplog.text
