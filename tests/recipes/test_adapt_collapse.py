"""A model that is good at something, pulled apart by new heads and a high rate (as users of DINOv2 saw: its issue 204),
and left whole by the defaults."""

import json

import pytest
from recipes_run import run

from sslvit.runs.ending import status_of

DATA = "--data shapes:n=1600 --keep_data shapes:n=1000 --threads 1 --batch_size 16 --log_every 50"
PROVOKED = "--head_epochs 0 --ramp_epochs 0 --warmup_epochs 0 --layer_decay 1 --backbone_lr 1 --lr 0.02"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> str:
    """Trained on labels for a few seconds: it tells half of 12 shapes."""
    out = tmp_path_factory.mktemp("good") / "run"
    words = "--image_size 32 --model mu/8 --class_token --position learned_1d --batch_size 64 --base_lr 4e-3"
    run("supervised", f"--data shapes:n=2000 --epochs 16 --threads 1 {words} --out {out}")
    return str(out)


@pytest.mark.slow
def test_a_fall_is_named_within_200_steps_and_ends_the_run(good, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run("adapt", f"{DATA} {PROVOKED} --init_from {good} --epochs 10 --out {tmp_path / 'run'}")
    assert ended.value.code == 3
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    start, *_, end = [line for line in lines if "drift" in line]
    for name in ("eval/cls/20-nn", "eval/cls/20-nn (kept)"):
        assert start[name] > 0.4
        assert end[name] < 0.75 * start[name]
    assert end["step"] <= 200
    status = status_of(tmp_path / "run")
    assert status.state == "diverged"
    assert (
        f"step {end['step']}: collapsed: new images: {100 * start['eval/cls/20-nn']:.1f}% at the start"
        in status.message
    )
    assert "Start again with a third of --lr, more --head_epochs, and a lower --backbone_lr" in status.message


@pytest.mark.slow
def test_the_defaults_leave_the_same_model_whole(good, tmp_path, capsys):
    run("adapt", f"{DATA} --init_from {good} --epochs 2.5 --out {tmp_path / 'run'}")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in said] == ["step 100", "step 200", "step 250"]
    assert all(line.split(": ")[1] in ("better", "no different") for line in said)
