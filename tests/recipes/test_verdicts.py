"""What all.py --gpu asks of a GPU, judged on numbers made up, and on those of a real step."""

import runpy
from pathlib import Path

import pytest
import torch
import verdicts
from run import ALONE
from timing import compared

from sslvit.storage import sealed

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


def report(name: str, results: list) -> dict:
    return {"name": name, "results": [one._asdict() for one in results]}


def test_each_target_is_met_missed_or_not_measured():
    mpp = compared(
        "step of mpp, B/16 at 224 px, batch 128, paper heads",
        {"sslvit": [2.0, 2.0], "timm": [1.9, 1.9]},
        images=128,
        flops=1.2e15,
        rate=1e15,
        mebibytes={"sslvit": 1100.0, "timm": 1000.0},
    )  # 60% of the rate; 1.05 of timm's time; 1.1 of its memory
    mae = compared("step of mae, B/16", {"sslvit": [2.0], "transformers": [4.0]}, flops=8e14, rate=1e15)  # 40%
    runs = compared("mpp, B/16 at 224 px, end to end", {"sslvit": [1.0], ALONE: [0.94]})
    lines = verdicts.rows([report("steps", [*mpp, *mae]), report("run", runs)], seconds=541.0)
    found = {asked.removeprefix("B/16, "): (measured, verdict) for asked, measured, verdict in lines}
    assert found["mpp: a step at 50% of the matrix rate or more"] == ("0.60", "met")
    assert found["mae: a step at 45% of the matrix rate or more"] == ("0.40", "missed")
    assert found["moco_v3: a step at 45% of the matrix rate or more"] == ("", "not measured")
    assert found["mpp: 1.05 times the time of timm at most"] == ("1.05", "missed")  # 2 / 1.9 = 1.0526
    assert found["mae: 1.05 times the time of transformers at most"] == ("0.50", "met")
    assert found["mpp: 1.05 times the memory of timm at most"] == ("1.10", "missed")
    assert found["mpp: end to end 95% of a step's rate or more"] == ("1.06", "missed")  # 94%
    assert found["all of it in 9 minutes"] == ("9.0 min", "missed")  # 541 s


def test_the_numbers_of_a_real_step_are_found(tmp_path, capsys):
    pytest.importorskip("timm")
    main = runpy.run_path(str(BENCHMARKS / "steps.py"))["main"]
    main("mu/8", 32, 2, ("mpp",), rounds=1, threads=1, memory=False, heads="small", out=tmp_path)
    one = sealed.read(tmp_path / "steps.json", command=str, machine=dict, results=list)
    measured = [line for line in verdicts.rows([one], 1.0) if line[1] and line[2] != "not measured"]
    assert [asked.split(": ")[0] for asked, *_ in measured] == ["B/16, mpp", "B/16, mpp", "all of it in 9 minutes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    everything = runpy.run_path(str(BENCHMARKS / "all.py"))["everything"]
    with pytest.raises(ValueError, match="--gpu: torch sees no GPU here"):
        everything(tmp_path / "out", gpu=True)
    assert not (tmp_path / "out").exists()
