"""The report of a run that goes on: there from the first line of the log, true, cheap, and never in the run's way."""

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from recipes_run import TINY, run
from tiny_run import DEFAULTS, fingerprint, objective, source, tiny_run

from sslvit.config import TrainConfig
from sslvit.errors import Diverged, Preempted
from sslvit.processes.collectives import start
from sslvit.reports import live
from sslvit.reports.live import LiveReport
from sslvit.reports.pictures import first_views
from sslvit.reports.progress import POINTS, Progress, thinned
from sslvit.runs.ending import Status
from sslvit.runs.folder import lock
from sslvit.storage import durable
from sslvit.train import pretrain
from sslvit.views.pretraining import CropFlip


class Pages(LiveReport):
    """Keeps the page as it is after each line of the log; writes at each line."""

    def __init__(self, *args, stop_at: int = -1, **named):
        super().__init__(*args, **named)
        self.kept, self.stop_at = {}, stop_at

    def log(self, values, *, step):
        self.due = 0.0
        super().log(values, step=step)
        self.kept[step] = self.file.read_text() if self.file.exists() else ""
        if step == self.stop_at:
            raise Diverged("the loss is NaN: try a smaller --lr")


def reported(out: Path, kind: type[LiveReport] = Pages, **named) -> LiveReport:
    config = TrainConfig(out=out, **DEFAULTS)
    accelerator, trained, images, views = start(threads=1), objective(), source(), CropFlip(32)
    report = kind(config, trained, images, views, accelerator, **named)
    pretrain(trained, images, views, config, accelerator, None, report)
    return report


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Pages:
    return reported(tmp_path_factory.mktemp("live") / "run")


def text(html: str) -> str:
    return " ".join(re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL).split())


def test_the_page_is_there_from_the_first_line_and_says_how_far_the_run_is(finished):
    assert list(finished.kept) == list(range(1, 17))
    assert "running step 1 of 16, epoch 0.25 of 4" in text(finished.kept[1])
    assert "running step 8 of 16, epoch 2 of 4" in text(finished.kept[8])
    assert re.search(r"[\d,]+ images per second, about \d+ s of training left", text(finished.kept[8]))
    assert "finished step 16 of 16" in text(finished.file.read_text())
    assert 'data-every="15"' in finished.kept[8]
    last = finished.file.read_text()
    assert 'data-every="15"' in last  # the report, with pictures that take a while, takes its place
    assert 'data-patience="0"' in last  # and until then it does not say that the run may be dead


def test_the_images_of_the_reconstructions_are_read_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(live, "first_views", lambda *these: read.append(1) or first_views(*these))
    assert len(reported(tmp_path / "run").pictures) == 2
    assert len(read) == 1


def test_a_signal_while_a_page_is_written_is_not_swallowed(finished, monkeypatch):
    def stopped(*_: object, **__: object) -> None:
        raise Preempted("asked to stop")

    report = LiveReport(finished.config, finished.objective, source(), CropFlip(32), start(threads=1))
    monkeypatch.setattr(live, "as_page", stopped)
    with lock(finished.config.out), pytest.raises(Preempted):
        report.log({}, step=1)


def test_the_curves_and_the_first_and_the_latest_reconstruction_are_in_it(finished):
    html = finished.kept[8]
    labels = re.findall(r'aria-label="([^"]*)"', html)
    assert labels[:4] == [f"{y} over step" for y in ("loss", "gradient norm", "lr", "images per second")]
    points = re.search(r'<polyline points="([^"]*)"', html)[1].split()
    assert len(points) == 8  # of the loss, one for each line
    assert re.findall(r"After step (\d+):", text(html)) == ["1", "8"]
    first, latest = re.findall(r'src="(data:image/png[^"]*)"', html)
    assert first != latest
    assert first in finished.kept[1]
    assert first in finished.kept[16]


def test_the_page_is_one_file_that_names_no_other(finished):
    html = finished.kept[8]
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "http:" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in html


def test_a_run_with_a_report_is_the_run_without_bit_for_bit(finished, tmp_path):
    tiny_run(tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(finished.config.out)


def test_an_early_end_stands_in_the_page_with_the_way_out(tmp_path):
    with pytest.raises(Diverged):
        reported(tmp_path / "run", stop_at=5)
    html = (tmp_path / "run" / "report.html").read_text()
    assert "diverged step 5 of 16" in text(html)
    assert "The loss is NaN: try a smaller --lr" in text(html)
    assert 'data-every="0"' in html


def test_the_report_of_a_finished_run_survives_a_refused_continuation(finished, tmp_path):
    report = LiveReport(finished.config, finished.objective, source(), CropFlip(32), start(threads=1))
    before = report.file.read_text()
    report.ended(Status("failed", "refused"))
    assert report.file.read_text() == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "no"), KeyError("bug")])
def test_a_page_that_cannot_be_written_stops_nothing_and_is_reported_once(tmp_path, monkeypatch, caplog, error):
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(live, "as_page", failing)
    reported(tmp_path / "run")
    assert (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "report.html").exists()
    assert sum("report.html is not written" in line for line in caplog.messages) == 1


def test_a_folder_that_was_moved_away_is_not_made_again(tmp_path):
    report = LiveReport(TrainConfig(out=tmp_path / "gone"), objective(), source(), CropFlip(32), start(threads=1))
    report.log({}, step=1)
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("cost", [0.001, 0.05, 3.0])
def test_pages_take_less_than_a_hundredth_of_the_time(tmp_path, cost):
    """By a clock that only the run and the pages move on: a line each half second, for a day and a half."""
    now, spent = 0.0, []
    report = LiveReport(
        TrainConfig(out=tmp_path), objective(), source(), CropFlip(32), start(threads=1), clock=lambda: now
    )

    def write(*_: object) -> None:
        nonlocal now
        now += cost
        spent.append((now, cost))
        report.written = True

    report._write = write
    for step in range(1, 250_000):
        now += 0.5
        report.log({}, step=step)
    assert sum(seconds for _, seconds in spent) < 0.01 * now
    starts = [when - cost for when, _ in spent]
    assert starts[0] == 0.5  # at the first line
    gaps = [b - a for a, b in pairwise(starts)]
    assert min(gaps) >= 15
    assert max(gaps) < max(15, 100 * cost) + cost + 1


def test_no_page_is_synced_to_the_disk(finished, monkeypatch, tmp_path):
    monkeypatch.setattr(durable.os, "fsync", lambda _: pytest.fail("fsync"))
    durable.replace(tmp_path / "page", [b"whole"], synced=False)
    assert (tmp_path / "page").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


@pytest.mark.parametrize("main", [True, False])
def test_only_the_main_process_writes(tmp_path, main):
    accelerator = SimpleNamespace(is_main_process=main, device=start(threads=1).device)
    report = LiveReport(TrainConfig(out=tmp_path), objective(), source(), CropFlip(32), accelerator)
    report.drawn = False
    with lock(tmp_path):
        report.log({}, step=1)
    assert (tmp_path / "report.html").exists() == main


def test_a_finished_recipe_has_the_report_without_scripts(tmp_path):
    pages = {}

    class Seen(Pages):
        def finish(self):
            pages.update(self.kept)
            super().finish()

    run("mpp", f"{TINY} --log_every 1 --out {tmp_path / 'run'}", LiveReport=Seen)
    assert "running step 2 of 4" in text(pages[2])
    assert "random start 10-shot of cls" in text(pages[2])  # the monitor's table, which has one evaluation yet
    assert "<script" not in (tmp_path / "run" / "report.html").read_text()


def test_fine_tuning_shows_the_choice_of_a_rate_and_at_last_the_test(tmp_path):
    run("mpp", f"{TINY} --out {tmp_path / 'mpp'}")
    pages = []

    class Seen(Pages):
        def __init__(self, *args, **named):
            super().__init__(*args, **named)
            made.append(self)

        def log(self, values, *, step):
            super().log(values, step=step)
            pages.append(text(self.file.read_text()))
            assert 'data-every="15"' in self.file.read_text()

        def finish(self):
            ends.append("finished")
            super().finish()

        def ended(self, status):
            ends.append(status.state)
            super().ended(status)

    made, ends = [], []
    words = "--data shapes:n=32 --threads 1 --batch_size 16 --steps 1 --rates .1 .01"
    run("finetune", f"--model {tmp_path / 'mpp'} {words} --out {tmp_path / 'run'}", LiveReport=Seen)
    assert ["lr-0.1" in pages[0], "lr-0.01" in pages[1], "lr-" in pages[2][:200]] == [True, True, False]
    assert all(" running " in page for page in pages)
    assert (len(made), ends) == (3, ["finished"])  # once, of the whole
    html = (tmp_path / "run" / "report.html").read_text()
    assert "finished step 1 of 1" in text(html)
    assert 'data-every="0"' in html  # nothing follows
    top1 = Progress(tmp_path / "run").tested["top1"]
    assert f"<td>top-1</td><td>{100 * top1:.1f}</td>" in html


def test_where_every_rate_diverges_the_page_of_the_fine_tuning_says_so(tmp_path, monkeypatch):
    run("mpp", f"{TINY} --out {tmp_path / 'mpp'}")
    states = []

    class Diverging(Pages):
        def __init__(self, *args, **named):
            if self.__class__.made:
                states.append(text(self.__class__.made[-1].file.read_text()))
            super().__init__(*args, stop_at=1, **named)
            self.__class__.made.append(self)

        made: ClassVar[list] = []

    words = "--data shapes:n=32 --threads 1 --batch_size 16 --steps 2 --log_every 1 --rates .1 .01"
    with pytest.raises(SystemExit):
        run("finetune", f"--model {tmp_path / 'mpp'} {words} --out {tmp_path / 'run'}", LiveReport=Diverging)
    assert "running lr-0.1 of the rates" in states[0]  # the other rate follows
    html = (tmp_path / "run" / "report.html").read_text()
    assert "diverged lr-0.01 of the rates" in text(html)
    assert "at every learning rate" in text(html)
    assert 'data-every="0"' in html


def test_a_thinned_curve_keeps_its_spikes_and_its_ends():
    points = [(i, 1000.0 if i == 7777 else -5.0 if i == 4321 else i % 3) for i in range(10_000)]
    kept = thinned(points)
    assert len(kept) <= POINTS
    assert {points[0], points[-1], points[7777], points[4321]} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:POINTS]) == points[:POINTS]
