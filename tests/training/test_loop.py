"""The loop's numbers against arithmetic: rates, means, seconds, and what counts as a spike or as too many overflows."""

import json
import math
import os
import signal
import statistics
import time
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_run import DEFAULTS, losses, objective, source

from sslvit.config import TrainConfig
from sslvit.errors import Diverged, Preempted
from sslvit.objectives.objective import Objective
from sslvit.processes.collectives import start
from sslvit.storage import checkpoint
from sslvit.train import pretrain
from sslvit.training import optim
from sslvit.training.guard import OVERFLOWS
from sslvit.training.watch import LONGEST_HISTORY, Watch
from sslvit.views.pretraining import CropFlip


class Steady(Objective):
    """A loss of 5 with a metric of 3 at each step, and a gradient of norm 8 times that step's factor."""

    readout = "mean"

    def __init__(self, *, factors: dict[int, float] | None = None, plus: dict[int, float] | None = None):
        super().__init__()
        self.backbone, self.calls = objective().backbone, count()
        self.factors, self.plus = factors or {}, plus or {}  # by step, counted from 0

    def forward(self, batch, progress):
        step, weight = next(self.calls), self.backbone.norm.weight  # 64 numbers
        nothing = (weight - weight.detach()).sum()
        nothing.register_hook(lambda gradient: gradient * self.factors.get(step, 1.0))
        return nothing + 5 + self.plus.get(step, 0.0), {"three": torch.tensor(3.0)}


def steady_run(out: Path, made: Steady, accelerator: Accelerator | None = None, **changes) -> list[dict]:
    config = TrainConfig(out=out, **(DEFAULTS | {"clip": 0.0} | changes))
    pretrain(made, source(), CropFlip(32), config, accelerator or start(threads=1))
    return losses(out)


@pytest.mark.parametrize("final", [1e-4, 0.0])
def test_rates_and_weight_decay_of_every_step_end_where_they_were_told_to(tmp_path, monkeypatch, final):
    """16 steps, of which the first quarter warms up; half a cosine from the peak to the end."""
    rates, decays = [], []

    def note(optimizer, *given) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        decays.append([group["weight_decay"] for group in optimizer.param_groups])

    def noted(*given):
        made = adamw(*given)
        made.register_step_pre_hook(note)
        return made

    adamw = optim.adamw
    monkeypatch.setattr("sslvit.training.optim.adamw", noted)
    changes = {"lr": 1e-3, "final_lr": final, "warmup_epochs": 1.0, "weight_decay": 0.04, "final_weight_decay": 0.4}
    logged = [line["lr"] for line in steady_run(tmp_path / "run", Steady(), **changes)]

    def cosine(progress: float, start: float, end: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    expected = [1e-3 * step / 4 for step in range(4)] + [cosine(step / 12, 1e-3, final) for step in range(12)]
    assert logged == pytest.approx(expected)
    assert rates == pytest.approx(expected)
    assert [decay for decay, _ in decays] == pytest.approx([cosine(step / 16, 0.04, 0.4) for step in range(16)])
    assert {spared for _, spared in decays} == {0.0}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_is_logged_of_a_step_is_the_mean_of_its_parts(tmp_path, accumulation):
    for line in steady_run(tmp_path / "run", Steady(), accumulation=accumulation):
        assert (line["loss"], line["three"]) == (5.0, 3.0)
        assert line["gradient_norm"] == pytest.approx(8.0)


def test_what_is_logged_of_several_steps_is_their_mean(tmp_path):
    lines = steady_run(tmp_path / "run", Steady(plus={step: float(step) for step in range(16)}), log_every=4)
    assert [line["loss"] for line in lines] == pytest.approx([5 + 1.5, 5 + 5.5, 5 + 9.5, 5 + 13.5])


def test_seconds_hold_no_evaluation(tmp_path):
    began, ended = [], []

    def evaluate(backbone) -> dict[str, float]:
        began.append(time.perf_counter())
        time.sleep(1)
        ended.append(time.perf_counter())
        return {"eval/mean/x": 0.0}

    config = TrainConfig(out=tmp_path / "run", **(DEFAULTS | {"evaluate_every": 1.0}))
    start_of_all = time.perf_counter()
    pretrain(objective(), source(), CropFlip(32), config, start(threads=1), evaluate)
    assert len(began) == 5  # of the start, and after each pass
    training = (
        time.perf_counter() - start_of_all - sum(after - before for before, after in zip(began, ended, strict=True))
    )
    seconds = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    assert 0 < seconds <= training


@pytest.mark.parametrize(("factor", "told", "left_out"), [(14.9, 0, 0), (15.1, 0, 1), (19.9, 0, 1), (20.1, 1, 1)])
def test_a_norm_is_told_above_20_times_the_median_and_left_out_above_what_was_asked(
    tmp_path, capsys, factor, told, left_out
):
    moved, made = [], Steady(factors={12: factor})
    made.after_step = lambda progress: moved.append(round(progress * 16))
    steady_run(tmp_path / "run", made, skip_spikes=15.0)
    text = f"warning: step 13: the gradient norm is {factor:.3g} times the usual"
    assert capsys.readouterr().out.count(text) == told
    assert moved == [step for step in range(1, 17) if step != 13 or not left_out]


def test_no_norm_is_a_spike_before_there_are_ten_to_compare_it_with():
    watch = Watch()
    assert [watch.spike(norm) for norm in [1.0] * 9 + [100.0]] == [0.0] * 10
    assert watch.spike(100.0) == 100.0


def test_spikes_are_judged_by_the_last_64_norms():
    watch = Watch()
    for norm in [1.0] * 100 + [10.0] * 64:
        watch.spike(norm)
    assert watch.spike(100.0) == 10.0
    recent = [*[10.0] * 63, 100.0]
    for norm in range(1, 200):
        assert watch.spike(float(norm)) == pytest.approx(norm / statistics.median(recent))
        recent = [*recent, float(norm)][-64:]
    assert len(watch.norms) == LONGEST_HISTORY == 64


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("under_fp16", [False, True])
def test_a_loss_that_is_not_finite_moves_nothing_though_its_gradients_are(tmp_path, monkeypatch, value, under_fp16):
    accelerator, moved, made = start(threads=1), [], Steady(plus={5: value})
    if under_fp16:
        with_scaler(accelerator, monkeypatch)
    before = []
    weight = made.backbone.norm.weight
    made.after_step = lambda progress: moved.append(round(progress * 16))
    made.register_forward_pre_hook(lambda *given: before.append(weight.detach().clone()))
    steady_run(tmp_path / "run", made, accelerator)
    assert moved == [step for step in range(1, 17) if step != 6]
    still = [torch.equal(one, other) for one, other in zip(before[-16:], [*before[-15:], weight], strict=True)]
    assert still == [step == 5 or step == 0 for step in range(16)]  # the first has a rate of 0


def with_scaler(accelerator: Accelerator, monkeypatch) -> None:
    """fp16's, on a CPU, which Accelerate would use with fp16 only."""
    scaler = torch.amp.GradScaler("cpu")
    monkeypatch.setattr(accelerator, "scaler", scaler)

    def unscale(optimizer=None) -> None:
        for one in accelerator._optimizers:
            scaler.unscale_(one.optimizer)

    monkeypatch.setattr(accelerator, "unscale_gradients", unscale)


@pytest.mark.parametrize("good", [39, None])
def test_forty_overflows_in_a_row_end_a_run_and_a_good_step_between_forgets_them(tmp_path, monkeypatch, good):
    accelerator, bad = start(threads=1), set(range(79)) - {good}
    with_scaler(accelerator, monkeypatch)
    made = Steady(factors=dict.fromkeys(bad, math.inf))
    assert OVERFLOWS == 40
    if good is None:
        with pytest.raises(Diverged, match="overflowed at 40 steps in a row, up to step 39") as stopped:
            steady_run(tmp_path / "run", made, accelerator, epochs=20.0, save_every=1000)
        assert "No checkpoint had been saved yet" in str(stopped.value)
    else:
        assert len(steady_run(tmp_path / "run", made, accelerator, epochs=20.0)) == 80


def test_two_steps_in_a_row_that_are_not_finite_stop_no_run_however_often_it_happens(tmp_path):
    made = Steady(plus=dict.fromkeys([2, 3, 5, 6, 8, 9, 11, 12], math.nan))
    assert len(steady_run(tmp_path / "run", made)) == 16


@pytest.mark.parametrize("save_every", [2, 1000])
def test_a_run_that_diverges_says_which_checkpoint_there_is(tmp_path, save_every):
    out, made = tmp_path / "run", Steady(plus=dict.fromkeys(range(5, 16), math.nan))
    with pytest.raises(Diverged, match="3 steps in a row, up to step 7") as stopped:
        steady_run(out, made, save_every=save_every)
    sentence, saved = str(stopped.value), checkpoint.latest(out / "checkpoints")
    if save_every == 2:
        assert saved.step == 6  # the sixth step was not finite and moved nothing
        assert f"The newest checkpoint in {out} is of step 6; " in sentence
    else:
        assert saved is None
        assert "No checkpoint had been saved yet; " in sentence
    assert f"the inputs of the first of these steps are in {out / 'bad_steps' / 'step-00000005'}, for" in sentence


class Noted:
    """An evaluation that notes what it was called with: a number that tells weights apart."""

    def __init__(self, done: list) -> None:
        self.done = done

    def __call__(self, backbone) -> dict[str, float]:
        number = sum(p.double().sum().item() for p in backbone.parameters())
        self.done.append(number)
        return {"eval/mean/sum": number}


def test_the_start_is_evaluated_after_the_first_steps_with_the_weights_from_before_them(tmp_path):
    made, done = Steady(), []
    began = Noted([])(made.backbone)["eval/mean/sum"]
    made.after_step = lambda progress: done.append("step")
    moved = Noted(done)
    config = TrainConfig(out=tmp_path / "run", **(DEFAULTS | {"log_every": 5, "save_every": 2, "weight_decay": 0.5}))
    lines = pretrain(made, source(), CropFlip(32), config, start(threads=1), moved)
    assert done[:5] == ["step"] * 5  # until a line of the log is due, also past a checkpoint
    assert done[5] == began
    assert done[6:-1] == ["step"] * 11
    assert [(line["step"], line["eval/mean/sum"]) for line in lines] == [(0, began), (16, done[-1])]
    assert done[-1] != began
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 5, 10, 15, 16]


@pytest.mark.parametrize("stopped_at", [2, 3, 4])
def test_a_run_that_is_stopped_before_its_start_was_evaluated_evaluates_that_start_when_it_resumes(
    tmp_path, stopped_at
):
    """As the whole run, to the last digit. Step 4 is a line's, and an evaluation's."""
    changes = {"log_every": 4, "save_every": 2, "evaluate_every": 1.0, "resume": True}

    def run(out: Path, stop: int = 0) -> list:
        made, done = objective(), []

        def ask(module: Objective, inputs: tuple) -> None:
            if stop and round(inputs[1] * 16) == stop - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        made.register_forward_pre_hook(ask)
        config = TrainConfig(out=out, **(DEFAULTS | changes))
        with pytest.raises(Preempted, match=f"at step {stop} of 16") if stop else nullcontext():
            pretrain(made, source(), CropFlip(32), config, start(threads=1), Noted(done))
        return done

    whole = run(tmp_path / "whole")
    assert run(tmp_path / "run", stopped_at) == []  # a stop does not wait for it
    assert run(tmp_path / "run") == whole
    lines = [line for line in losses(tmp_path / "run") if line["step"] % 4 == 0]
    expected = losses(tmp_path / "whole")
    if stopped_at == 4:
        assert lines == expected
    assert [line["eval/mean/sum"] for line in lines] == [line["eval/mean/sum"] for line in expected]


def test_a_run_that_resumes_with_weights_that_have_moved_does_not_take_them_for_its_start(tmp_path, capsys):
    """As in a notebook, where the objective of the stopped run is still there."""
    made, done = objective(), []

    def ask(module: Objective, inputs: tuple) -> None:
        if round(inputs[1] * 16) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = made.register_forward_pre_hook(ask)
    config = TrainConfig(out=tmp_path / "run", **(DEFAULTS | {"log_every": 4, "resume": True}))
    with pytest.raises(Preempted):
        pretrain(made, source(), CropFlip(32), config, start(threads=1), Noted(done))
    hook.remove()
    lines = pretrain(made, source(), CropFlip(32), config, start(threads=1), Noted(done))
    assert "the objective does not have its weights any more" in capsys.readouterr().out
    assert [line["step"] for line in lines] == [16]
    assert len(done) == 1


def test_a_run_that_is_killed_after_its_start_was_evaluated_and_before_the_next_checkpoint_resumes(tmp_path):
    """The checkpoint says that the start is to be evaluated, and the log has that line and another already."""
    config = TrainConfig(out=tmp_path / "run", **(DEFAULTS | {"log_every": 4, "save_every": 3, "resume": True}))
    made, done = objective(), []

    def die(module: Objective, inputs: tuple) -> None:
        if round(inputs[1] * 16) == 4:
            raise KeyboardInterrupt

    made.register_forward_pre_hook(die)
    with pytest.raises(KeyboardInterrupt):
        pretrain(made, source(), CropFlip(32), config, start(threads=1), Noted(done))
    assert [line["step"] for line in losses(tmp_path / "run")] == [0, 4]
    pretrain(objective(), source(), CropFlip(32), config, start(threads=1), Noted(done))
    assert [line["step"] for line in losses(tmp_path / "run")] == [0, 4, 8, 12, 16]
    assert done[0] == done[1]
