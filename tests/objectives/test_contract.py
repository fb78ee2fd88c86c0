"""What every objective promises to the loop, which knows no objective. A new one is one line in OBJECTIVES."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from objectives_zoo import OBJECTIVES, Case, Views, batch_of, steps, trained
from safetensors.torch import load_file, save_file
from together import Plan, trained_together
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sslvit import rng
from sslvit.config import TrainConfig
from sslvit.data.labels import Labels
from sslvit.data.loader import sample_ids
from sslvit.data.source import ArraySource
from sslvit.errors import DataError
from sslvit.objectives.objective import Batch, Objective
from sslvit.processes.collectives import start
from sslvit.storage import checkpoint
from sslvit.train import pretrain

STEPS = 20
STEPS_TOGETHER = 8
WHOLE = 32  # images of a batch over all of them. With 8, MoCo v3's batch norm makes 1e-2 of float32's 1e-7 in 20 steps


# What forward may change of what is saved: running statistics of batch norm, as in the official codes.
MOVES_IN_FORWARD = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(params=OBJECTIVES)
def case(request) -> Case:
    return OBJECTIVES[request.param]


def saved(objective: Objective) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in objective.state_dict().items()}


def test_the_loop_trains_all_that_is_not_held_and_goes_on_bit_for_bit(case, tmp_path):
    whole, before = trained(case, tmp_path / "whole", Views(case)), case.make(0).state_dict()
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            held = any(parameter is other for other in whole.frozen_parameters(0.99))
            assert torch.equal(parameter, before[name]) == held, name
    with pytest.raises(DataError, match="stopped here"):  # in the third step: the first views are for the cost
        trained(case, tmp_path / "stopped", Views(case, broken_at=4))
    for name, value in trained(case, tmp_path / "stopped", Views(case)).state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


class Seen(Objective):
    """An objective around another that remembers which images it was shown: they are of one brightness each."""

    readout = "cls"

    def __init__(self, objective: Objective):
        super().__init__()
        self.backbone, self.objective = objective.backbone, objective
        self.couples_samples, self.batches = objective.couples_samples, []

    def forward(self, batch, progress):
        self.batches.append([round(float(x) * 255) for x in batch.views[0].mean((1, 2, 3))])
        return self.objective(batch, progress)

    def after_step(self, progress):
        self.objective.after_step(progress)


def bright(images: int) -> ArraySource:
    pixels = np.arange(images, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 16, 16), np.uint8)
    return ArraySource(pixels, name="bright", fingerprint=f"{images}", labels=Labels(np.arange(images) % 3, None, ""))


def plain_views(pixels, key, extents=None):
    return (pixels / 255,) * 2


def seen_in_a_run(out: Path, images: int, batch_size: int, **changes) -> list[list[int]]:
    objective = Seen(OBJECTIVES["moco_v3"].make(0))
    config = TrainConfig(out=out, batch_size=batch_size, lr=1e-3, threads=1, **({"epochs": 6.0} | changes))
    pretrain(objective, bright(images), plain_views, config, start(threads=1))
    return objective.batches


def test_a_batch_whose_images_are_compared_never_holds_one_twice(tmp_path):
    batches = seen_in_a_run(tmp_path / "run", 20, 8)
    assert len(batches) == 6 * (20 // 8)  # where 6 * 20 / 8 would be 15
    assert all(len(set(batch)) == 8 for batch in batches)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["epoch"] == 6


def test_an_older_run_of_compared_images_resumes_in_its_own_order(tmp_path):
    """Checkpoints did not say it then: the endless row, 15 steps, and batches that may repeat an image."""
    root = tmp_path / "run" / "checkpoints"
    seen_in_a_run(tmp_path / "run", 20, 8, save_every=3)
    for folder in root.glob("step-*"):
        found = checkpoint.latest(root) if folder.name == "step-00000012" else None
        if found:
            shutil.rmtree(root)
            del found.state["progress"]["whole_batches"]
            checkpoint.save(root, 12, found.tensors, found.state)
            break
    again = seen_in_a_run(tmp_path / "run", 20, 8, resume=True)
    order = sample_ids(0, 20, 12 * 8, 15 * 8)[0].tolist()
    assert again == [order[:8], order[8:16], order[16:]]


def test_fewer_compared_images_than_a_batch_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "run").mkdir()
    for changes in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"--batch_size 8: 7 images.*--batch_size 7"):
            seen_in_a_run(tmp_path / "run", 7, 8, **changes)
        assert not (tmp_path / "run" / "model").exists()
    assert len(seen_in_a_run(tmp_path / "run", 7, 7, overwrite=True)) == 6


def test_the_least_epochs_that_an_error_names_are_those_of_whole_batches(tmp_path):
    """Of 20 images 16 are shown in an epoch: 12 steps of 8 are 6 epochs, not the 4.8 that all images would make."""
    seen_in_a_run(tmp_path / "run", 20, 8)
    with pytest.raises(ValueError, match=r"--epochs 5 is 10 steps, .* has done 12 of its 12 .* give more than 6, or"):
        seen_in_a_run(tmp_path / "run", 20, 8, epochs=5.0, resume=True)
    assert len(seen_in_a_run(tmp_path / "run", 20, 8, epochs=6.5, resume=True)) == 1


def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one(case):
    objective = case.make(0)
    steps(objective, [batch_of(case)])  # a head that starts at zero passes no gradient on
    objective(batch_of(case), 0.5)[0].backward()
    for name, p in objective.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name


def test_the_loss_falls_on_a_repeated_batch(case):
    objective = case.make(0)
    steps(objective, [batch_of(case)] * 20, lr=0.0)  # what merely follows the data settles first, such as a centre
    losses = steps(objective, [batch_of(case)] * 40)
    assert losses[-1] < 0.95 * losses[0]


def test_forward_changes_nothing_that_is_saved_except_running_statistics(case):
    objective = case.make(0)
    before = saved(objective)
    for step in range(2):
        objective(batch_of(case, step), 0.5)
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name]) or name.endswith(MOVES_IN_FORWARD), name


def test_after_step_moves_nothing_that_is_trained(case):
    objective = case.make(0)
    steps(objective, [batch_of(case)])
    objective(batch_of(case), 0.5)
    before = {name: p.clone() for name, p in objective.named_parameters() if p.requires_grad}
    objective.after_step(0.5)
    assert all(torch.equal(p, before[name]) for name, p in objective.named_parameters() if name in before)


def test_the_same_key_gives_the_same_loss_bit_for_bit_and_another_key_another(case):
    objective, batch = case.make(0), batch_of(case)
    steps(objective, [batch])
    losses = []
    for seed, key in ((1, batch.key), (2, batch.key), (2, rng.fold(batch.key, "other"))):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        losses.append(objective(batch._replace(key=key), 0.5)[0])
        assert torch.equal(torch.get_rng_state(), state)  # torch's generator is not even looked at
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_saved_and_loaded_it_has_the_same_loss_and_trains_on_the_same(case, tmp_path):
    objective, other = case.make(0), case.make(1)
    steps(objective, [batch_of(case, step) for step in range(3)])
    save_file(objective.state_dict(), tmp_path / "objective.safetensors")
    other.load_state_dict(load_file(tmp_path / "objective.safetensors"), strict=True)
    ahead = [batch_of(case, step) for step in range(3, 6)]
    assert steps(objective, ahead) == steps(other, ahead)


def test_a_seed_decides_all_that_is_drawn_at_the_start(case):
    first, second, other = (case.make(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_loss_is_finite_at_any_progress_and_metrics_are_detached_scalars(case, progress):
    loss, metrics = case.make(0)(batch_of(case), progress)
    assert loss.isfinite()
    assert loss.shape == ()
    assert loss.requires_grad
    for name, value in metrics.items():
        assert value.shape == (), name
        assert value.isfinite(), name
        assert not value.requires_grad, name


def test_the_readout_is_declared_and_the_backbone_has_it(case):
    objective = case.make(0)
    assert objective.readout in ("cls", "mean")
    assert objective.readout in objective.backbone.readouts
    assert objective.backbone in set(objective.children())


def test_whether_the_samples_of_a_batch_are_coupled_is_declared_truthfully(case):
    """Where they are not, the loss is the mean of the losses of parts, so that accumulation changes nothing."""
    objective, batch = case.make(0).double(), batch_of(case, dtype=torch.float64)
    whole, _ = objective(batch, 0.5)
    halves = [
        objective(Batch(tuple(view[part] for view in batch.views), batch.key[part], batch.labels[part]), 0.5)[0]
        for part in (slice(0, 4), slice(4, 8))
    ]
    same = torch.isclose(torch.stack(halves).mean(), whole, rtol=1e-6, atol=0)
    assert bool(same) != objective.couples_samples


def test_bfloat16_is_near(case):
    objective, batch = case.make(0), batch_of(case)
    exact, _ = objective(batch, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(batch, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


class NoMixture(TorchDispatchMode):
    """Refuses float32 numbers among float64 ones, and float64 that becomes float32, where a gradient is computed."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        given = {x.dtype for x in tree_leaves((arguments, options)) if isinstance(x, Tensor) and x.ndim}
        made = {x.dtype for x in tree_leaves(result) if isinstance(x, Tensor) and x.ndim}
        if torch.is_grad_enabled() and made != {torch.bool}:  # what is decided by a draw of float32 is no number
            assert not {torch.float32, torch.float64} <= given, f"{operation} of {given}"
            assert torch.float64 not in given or torch.float32 not in made, f"{operation} rounds to float32"
        return result


def test_in_float64_every_number_of_a_forward_is_float64(case):
    """Factors, targets and logits too: where a draw in float32 becomes a factor, it has all digits by then."""
    objective, batch = case.make(0).double(), batch_of(case, dtype=torch.float64)
    with NoMixture():
        loss, _ = objective(batch, 0.5)
    assert loss.dtype == torch.float64
    loss.backward()
    assert {p.grad.dtype for p in objective.parameters() if p.grad is not None} == {torch.float64}


@pytest.fixture(scope="module")
def losses_of_two_processes(tmp_path_factory) -> dict[str, list[float]]:
    plan = Plan(tuple(OBJECTIVES), processes=2, images=WHOLE, steps=STEPS_TOGETHER)
    return trained_together(plan, tmp_path_factory.mktemp("together"))


@pytest.mark.processes
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_have_the_losses_of_one(name, losses_of_two_processes):
    case = OBJECTIVES[name]
    batches = [batch_of(case, step, WHOLE, torch.float64) for step in range(STEPS_TOGETHER)]
    expected = steps(case.make(0).double(), batches, lr=1e-3)
    for step, (loss, one) in enumerate(zip(losses_of_two_processes[name], expected, strict=True)):
        assert loss == pytest.approx(one, rel=1e-9), step
