"""All runs below a folder, whatever state they are in: a table, and one page."""

import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_runs import made_up_run

from sslvit.cli.parse import parse
from sslvit.errors import CannotWrite, NoInput
from sslvit.reports import runs
from sslvit.reports.progress import Progress
from sslvit.reports.run_rows import read
from sslvit.runs import ending
from sslvit.runs.folder import lock

HOSTILE = "</script><script>alert(1)</script> \"q\" 'q' & \u05e9\u05dc\u05d5\u05dd \U0001f98a \u202eevil"


@pytest.fixture
def folder(tmp_path) -> Path:
    made_up_run(tmp_path / "mae", pace=2.0)
    made_up_run(tmp_path / "deep" / "er" / "mpp", objective="MPP", state="stopped", message="--resume continues")
    made_up_run(tmp_path / "dino", objective="DINO", state="diverged", message="try a smaller --lr")
    dead = made_up_run(tmp_path / "moco", objective="MoCoV3", state="dead")
    made_up_run(tmp_path / "mae" / "choice" / "lr-0.1")
    for name in ("metrics.jsonl", "run.lock"):
        os.utime(dead / name, (time.time() - ending.SILENT - 60,) * 2)
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "config.json").write_text("{}")
    return tmp_path


class Page(HTMLParser):
    """The cells of the table, the links, and the data, by an independent parser."""

    def __init__(self, file: Path):
        super().__init__()
        self.rows, self.links, self.inside, self.scripts, self.data = [], [], [], 0, ""
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        self.inside.append(tag)
        self.scripts += tag == "script"
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "a":
            self.links.append(dict(attributes)["href"])

    def handle_endtag(self, tag):
        while tag in self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if {"td", "th"} & {*self.inside[-6:]} and self.inside[-1] not in ("script", "style"):
            self.rows[-1][-1] += data
        elif self.inside and self.inside[-1] == "script" and data.startswith('{"colors"'):
            self.data = data

    def column(self, title: str) -> dict[str, str]:
        head, *rest = self.rows
        return {row[head.index("run")]: row[head.index(title)] for row in rest}


def test_the_page_and_the_terminal_say_what_the_folders_say(folder, capsys):
    page = Page(runs.write(folder))
    states = {"mae": "finished", "deep/er/mpp": "stopped", "dino": "diverged", "moco": "dead"}
    assert page.column("state") == states
    assert page.column("objective")["deep/er/mpp"] == "MPP"
    lines = [json.loads(line) for line in (folder / "mae" / "metrics.jsonl").read_text().splitlines()]
    first, last = (f"{100 * lines[i]['eval/cls/20-nn']:.1f}" for i in (0, -1))
    assert page.column("20-nn, %")["mae"] == f"{first} \N{RIGHTWARDS ARROW} {last}"
    assert page.column("images")["mae"] == f"{400 * 64:,}"
    assert page.column("images")["dino"] == f"{200 * 64:,}"
    assert page.column("images/s")["mae"] == "2,000"
    assert page.column("FLOPs") == {"mae": f"{1e9 * 400 * 64:.1e}", "deep/er/mpp": "", "dino": "", "moco": ""}
    assert page.column("note")["dino"] == "try a smaller --lr"
    assert page.links == ["mae/report.html"]
    printed = capsys.readouterr().out
    for name, state in states.items():
        assert re.search(rf"^{name} +{state} ", printed, re.MULTILINE)
    (summary,) = re.findall(r"^4 runs: (.*)$", printed, re.MULTILINE)
    assert sorted(summary.split(", ")) == ["1 dead", "1 diverged", "1 finished", "1 stopped"]
    assert str(folder / "runs.html") in printed


def test_links_lead_from_the_page_to_the_reports_wherever_it_lies(folder, tmp_path):
    page = Page(runs.write(folder, tmp_path / "elsewhere" / "page.html"))
    assert [(tmp_path / "elsewhere" / link).resolve() for link in page.links] == [folder / "mae" / "report.html"]


def test_curves_hold_the_logged_values_thinned_with_all_evaluations(tmp_path):
    made_up_run(tmp_path / "long", lines=5000, steps=5000, evaluated=20)
    data = json.loads(Page(runs.write(tmp_path)).data)
    (run,) = data["runs"]
    steps, values = run["metrics"]["loss"]
    assert 290 < len(steps) <= 500
    lines = {}
    for text in (tmp_path / "long" / "metrics.jsonl").read_text().splitlines():
        lines[json.loads(text)["step"]] = json.loads(text)
    assert values == pytest.approx([lines[step]["loss"] for step in steps], rel=1e-4)
    assert steps[-1] == 5000
    steps, values = run["metrics"]["20-nn, %"]
    assert steps == [0, *range(250, 5001, 250)]
    assert values == pytest.approx([100 * lines[step]["eval/cls/20-nn"] for step in steps], rel=1e-4)
    assert "20-nn of mean, %" in run["metrics"]


def test_names_are_text_in_the_page_and_in_its_data(tmp_path):
    name = HOSTILE.replace("/", "|")
    made_up_run(tmp_path / name, objective=HOSTILE, data=HOSTILE)
    page = Page(runs.write(tmp_path))
    assert page.scripts == 3  # the data and the two programs
    assert page.column("data") == {name: HOSTILE}
    assert json.loads(page.data)["runs"][0]["name"] == name


def test_names_cannot_rewrite_the_terminal(tmp_path, capsys):
    made_up_run(tmp_path / "a\x1b[2Jb")
    runs.write(tmp_path)
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "broken", ["config.json", "environment.json", "metrics.jsonl", "cost.json", "model/config.json"]
)
@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00{", b"[1, 2]", b'{"step": "x", "steps": "y", "batch_size": [], "sslvit": 3}\n']
)
def test_a_broken_folder_is_listed_and_hides_no_other(folder, broken, content):
    (folder / "mae" / broken).write_bytes(content)
    states = Page(runs.write(folder)).column("state")
    assert set(states) == {"mae", "deep/er/mpp", "dino", "moco"}
    assert states["mae"] in ("finished", "running", "dead", "broken")


def test_what_cannot_be_read_is_called_broken_with_a_reason(folder):
    (folder / "mae" / "metrics.jsonl").unlink()
    (folder / "mae" / "metrics.jsonl").mkdir()
    page = Page(runs.write(folder))
    assert page.column("state")["mae"] == "broken"
    assert "cannot be read (Is a directory)" in page.column("note")["mae"]


def test_a_page_refreshes_itself_only_while_something_runs(tmp_path):
    made_up_run(tmp_path / "runs" / "mae")
    assert 'data-every="0"' in runs.write(tmp_path / "runs").read_text()
    with lock(tmp_path / "runs" / "mae"):
        assert 'data-every="30"' in runs.write(tmp_path / "runs").read_text()
    assert 'data-every="60"' in runs.write(tmp_path / "runs", watch=60).read_text()


def test_watching_writes_again_until_ctrl_c(folder, monkeypatch, capsys):
    def sleep(seconds: float) -> None:
        naps.append(seconds)
        (folder / "runs.html").unlink()
        if len(naps) == 3:
            raise KeyboardInterrupt

    naps: list[float] = []
    monkeypatch.setattr(runs.time, "sleep", sleep)
    runs.main(parse(runs.Config, args=[str(folder), "--watch", "7"]))
    assert naps == [7, 7, 7]
    assert capsys.readouterr().out.count("finished") == 2  # one table with its summary


def test_watching_outlives_a_failure_and_says_it(folder, monkeypatch, capsys):
    def sleep(_: float) -> None:
        naps.append(1)
        if len(naps) == 1:
            folder.rename(folder.with_name("away"))
        elif len(naps) == 2:
            folder.with_name("away").rename(folder)
            (folder / "runs.html").unlink()
        else:
            raise KeyboardInterrupt

    naps: list[int] = []
    monkeypatch.setattr(runs.time, "sleep", sleep)
    runs.main(parse(runs.Config, args=[str(folder), "--watch", "7"]))
    assert f"No page was written: there is no folder {folder}" in capsys.readouterr().out
    assert (folder / "runs.html").exists()  # written at the second nap


def test_a_run_whose_log_is_not_open_yet_is_not_called_damaged(tmp_path):
    out = made_up_run(tmp_path / "run", state="dead")
    (out / "config.json").unlink()
    with lock(out):
        assert [(row.state, row.note) for row in read(tmp_path)] == [("running", "")]
    made_up_run(tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text("{")
    assert {row.name: row.note for row in read(tmp_path)}["torn"] == "its config.json is damaged"


def test_epochs_are_written_out(tmp_path):
    made_up_run(tmp_path / "long", steps=1600 * 1000 // 64)
    assert Page(runs.write(tmp_path)).column("epochs") == {"long": "1,600 of 1,600"}
    assert "epoch 1,600 of 1,600," in Progress(tmp_path / "long").sentence()


def test_bad_input_is_one_sentence(folder, tmp_path):
    with pytest.raises(NoInput, match="no folder"):
        runs.main(parse(runs.Config, args=[str(tmp_path / "none")]))
    with pytest.raises(NoInput, match="no run is below"):
        runs.main(parse(runs.Config, args=[str(folder / "no-run")]))
    with pytest.raises(ValueError, match=r"is one run, whose page is \S*report.html"):
        runs.main(parse(runs.Config, args=[str(folder / "mae")]))
    with pytest.raises(ValueError, match="--watch -1"):
        runs.main(parse(runs.Config, args=[str(folder), "--watch", "-1"]))
    with pytest.raises(ValueError, match=r"--watch 0\.5: .* must be 1 or more"):
        runs.main(parse(runs.Config, args=[str(folder), "--watch", "0.5"]))
    with pytest.raises(CannotWrite, match="choose another --out"):
        runs.main(parse(runs.Config, args=[str(folder), "--out", str(folder / "mae" / "config.json" / "x.html")]))


@pytest.mark.timing
def test_a_thousand_long_runs_take_less_than_a_minute(tmp_path):
    first = made_up_run(tmp_path / "run-0", lines=10_000, steps=10_000)
    for i in range(1, 1000):
        made_up_run(tmp_path / f"run-{i}", lines=1)
        (tmp_path / f"run-{i}" / "metrics.jsonl").unlink()
        (tmp_path / f"run-{i}" / "metrics.jsonl").symlink_to(first / "metrics.jsonl")
    began = time.perf_counter()
    file = runs.write(tmp_path)
    assert time.perf_counter() - began < 60
    assert file.stat().st_size < 16 << 20
    assert len(read(tmp_path)) == 1000
