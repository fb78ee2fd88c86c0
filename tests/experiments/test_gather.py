"""A comparison's and a study's reports are written anew from what their folders keep, or say what is missing."""

import json
import shutil
import sys
from pathlib import Path

import preloaded
import pytest
from made_up_comparison import comparison

from sslvit.errors import DataError, NoInput
from sslvit.evaluate.robustness.corruptions import NAMES
from sslvit.experiments.compare import ComparisonConfig
from sslvit.experiments.gather import gather, report_again, write
from sslvit.storage import sealed

KEPT = Path(__file__).parents[2] / "recipes" / "results"


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """A comparison's folder with all that its jobs leave, made up, but no report."""
    out = tmp_path_factory.mktemp("ended") / "compare"
    comparison(out, {"scratch": [0.6, 0.6], "mae": [0.8, 0.8]}, places=("own",), pixels=0.5)
    for model in (out / "models").iterdir():
        folder = out / ("starts" if model.name.startswith("scratch") else "runs") / model.name
        folder.parent.mkdir(exist_ok=True)
        model.rename(folder)
        (folder / "report.md").write_text("")
    (out / "compare.json").write_text(json.dumps({"data": "made up", "methods": ["mae"], "seeds": 2}))
    return out


@pytest.fixture
def folder(ended, tmp_path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "compare"))


def reported(folder: Path) -> str:
    """By the command, in a process of its own."""
    command = [sys.executable, "-m", "sslvit", "report", str(folder)]
    done = preloaded.run(command, text=True, check=True)
    assert done.stdout == f"{folder / 'report.html'}\n"
    return (folder / "report.md").read_text()


def test_a_comparison_whose_jobs_are_done_but_whose_report_is_missing_gets_it(folder):
    report_again(folder)
    text = (folder / "report.md").read_text()
    assert "MAE is ahead of scratch (mean), " in text
    assert "| raw pixels | 50.0 |" in text
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert json.loads((folder / "results.json").read_text())["methods"] == ["scratch (mean)", "scratch (cls)", "MAE"]


def test_what_is_known_of_robustness_is_part_of_the_report_and_nothing_is_where_it_is_not(folder):
    report_again(folder)
    assert "obustness" not in (folder / "report.md").read_text() + (folder / "results.json").read_text()
    interval, kinds = [0.5, 0.4, 0.6], ("clean", "mean of corruptions", "shuffle 2")
    strengths, drops = [f"strength {one}" for one in range(1, 6)], [f"random drop {n / 10:g}" for n in range(1, 10)]
    means = [f"{name} mean" for name in NAMES]
    models = {"scratch (mean)": interval, "MAE": [0.75, 0.7, 0.8]}
    numbers = {
        "data": "made up", "images": 100, "size": [32, 32], "grid": [4, 4], "parameters": "CIFAR-10-C",
        "read by": dict.fromkeys(models, "logistic regression of mean"),
        "accuracy": dict.fromkeys((*kinds, *strengths, *drops, *means), models),
        "ahead of the first": {key: {"MAE": [0.25, 0.2, 0.3]} for key in kinds[:2]},
        "mean corruption error": models, "outline against colour": {},
        "calibration error": {str(strength): dict.fromkeys(models, 0.125) for strength in range(6)},
    }  # fmt: skip
    (folder / "robustness").mkdir()
    sealed.write(folder / "robustness" / "numbers.json", numbers)
    (folder / "results.json").unlink()
    report_again(folder)
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    assert "## Robustness" in text
    assert "| corrupted | 50.0 [40.0, 60.0] | 75.0 [70.0, 80.0] |" in text
    assert "MAE against scratch (mean): +25.0 points, 95% CI [20.0, 30.0]; corrupted +25.0 points" in text
    assert "<h2>Robustness</h2>" in page
    assert "Dropped patches: random." in page


@pytest.mark.processes
def test_the_report_is_the_same_when_it_is_written_from_kept_results_alone(folder):
    config = ComparisonConfig(out=folder, methods=("mae",), seeds=2)
    write(gather(config, json.loads((folder / "compare.json").read_text()), ["python recipes/mae.py"]), folder)
    before = {name: (folder / name).read_bytes() for name in ("report.md", "report.html", "results.json")}
    for name in ("probes", "finetuned", "baselines", "starts", "runs"):
        shutil.rmtree(folder / name)
    (folder / "report.md").unlink()
    (folder / "report.html").unlink()
    assert reported(folder) == before["report.md"].decode()
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.processes
@pytest.mark.parametrize("name", ["built-in.json", "fashion-mnist.json"])
def test_results_that_an_earlier_version_kept_make_a_report(tmp_path, name):
    shutil.copy(KEPT / name, tmp_path / "results.json")
    assert "MPP is ahead of scratch (mean)" in reported(tmp_path)


def test_a_studys_table_and_plot_are_written_again(tmp_path):
    shutil.copy(KEPT / "studies" / "targets.json", tmp_path / "results.json")
    assert report_again(tmp_path) == tmp_path / "results.md"
    assert (tmp_path / "study.svg").read_text() == (KEPT / "studies" / "targets.svg").read_text()
    assert "| mean colour, 50 % |" in (tmp_path / "results.md").read_text()


def test_what_is_missing_or_damaged_is_named_with_the_way_out(folder, tmp_path):
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with pytest.raises(NoInput, match=f"{nothing} contains no finished run, no comparison, and no finished study"):
        report_again(nothing)
    (folder / "runs" / "mae-1" / "report.md").unlink()
    with pytest.raises(NoInput, match=r"compare is an unfinished comparison: .*mae-1 is missing"):
        report_again(folder)
    (folder / "runs" / "mae-1" / "report.md").write_text("")
    shutil.rmtree(folder / "finetuned" / "mae-1" / "own" / "0.01")
    with pytest.raises(DataError, match="fine-tuned 1 % of MAE is missing; the comparison's command adds it"):
        report_again(folder)
    (folder / "results.json").write_text("{")
    with pytest.raises(DataError, match=r"results.json cannot be read \(.*\): delete it, and the command that made it"):
        report_again(folder)
    assert not (folder / "report.md").exists()


def test_a_damaged_file_of_a_run_is_named_and_not_the_results_that_are_whole(folder):
    report_again(folder)
    run = folder / "runs" / "mae-0"
    (run / "model").mkdir()
    (run / "metrics.jsonl").write_text("")
    (run / "environment.json").write_text("{")
    (run / "config.json").write_text('{"image_size": 8}')
    with pytest.raises(DataError, match=r"^\S*mae-0/environment.json cannot be read") as raised:
        report_again(folder)
    assert "results.json" not in str(raised.value)
