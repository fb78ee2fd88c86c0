"""The pages in a real browser, on a phone and a screen, light and dark: nothing runs out of the page, nothing covers
anything else, text can be read, and what can be clicked works."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PROGRAM, Browser
from made_up_comparison import comparison
from made_up_runs import made_up_run

from sslvit.experiments.gather import write as write_comparison
from sslvit.models.vit import ViT
from sslvit.reports import runs
from sslvit.reports.live import as_page
from sslvit.reports.progress import Progress
from sslvit.runs.ending import Status
from sslvit.weights.folder import save_backbone

pytestmark = [pytest.mark.browser, pytest.mark.skipif(PROGRAM is None, reason="there is no chromium")]

LOOKS = [(width, dark) for width in (390, 1280) for dark in (False, True)]
HOSTILE = "</script><img src=x onerror=alert(1)> \"q\" 'q' & \u05e9\u05dc\u05d5\u05dd \U0001f98a \u202eevil"
NAMES = ["mae", "mpp-pixels", "dino", "moco", HOSTILE.replace("/", "|"), "a-very-long-name-" * 6]
NOW = "Date.now = () => 1e15;"  # far in the future

# Texts of one chart, cells of one row and entries of a legend whose boxes overlap by more than a pixel.
OVERLAPS = """(() => {
  const found = [];
  const check = (elements) => {
    const boxes = elements.map((e) => [e.getBoundingClientRect(), e.textContent]).filter(([b]) => b.width && b.height);
    boxes.forEach(([a, s], i) => boxes.slice(i + 1).forEach(([b, t]) => {
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > 1) found.push([s, t]);
    }));
  };
  for (const one of document.querySelectorAll("svg")) check([...one.querySelectorAll("text")]);
  for (const row of document.querySelectorAll("tr")) check([...row.children]);
  for (const list of document.querySelectorAll("ul")) check([...list.children]);
  check([...document.body.children].filter((e) => !["SCRIPT", "STYLE"].includes(e.tagName)));
  return found;
})()"""

# Texts of charts that reach over their chart's edge.
CUT = """[...document.querySelectorAll("svg")].flatMap((svg) => [...svg.querySelectorAll("text")].filter((text) => {
  const [a, b] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];
  return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}).map((text) => text.textContent))"""

# Texts whose contrast with what is behind them is below WCAG's 4.5 (3 for large ones), by WCAG's formula.
FAINT = """(() => {
  const light = (color) => {
    const [r, g, b] = color.map((c) => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const parse = (text) => {
    const numbers = text.match(/[\\d.]+/g).map(Number);
    return numbers[3] === 0 ? null : numbers.slice(0, 3);
  };
  const behind = (e) => e ? parse(getComputedStyle(e).backgroundColor) || behind(e.parentElement) : [255, 255, 255];
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const e = node.parentElement, style = getComputedStyle(e);
    if (!node.textContent.trim() || !e.getBoundingClientRect().width || e.closest("script, style, option")) continue;
    const color = parse(e instanceof SVGElement ? style.fill : style.color);
    const [x, y] = [light(color), light(behind(e))], contrast = (Math.max(x, y) + .05) / (Math.min(x, y) + .05);
    if (contrast < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) found.push([node.textContent.trim(), contrast]);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def overview(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("all") / "runs"
    states = ["finished", "stopped", "diverged", "running", "failed", "finished"]
    for i, (name, state) in enumerate(zip(NAMES, states, strict=True)):
        made_up_run(folder / name, state=state, pace=0.5 + i, objective=HOSTILE if i > 3 else "MAE", data=HOSTILE)
    return runs.write(folder)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Path:
    """A page of a run half-way, with numbers as wide as they come."""
    folder = made_up_run(
        tmp_path_factory.mktemp("live") / "run", state="dead", data=HOSTILE, speed=23456.0, steps=240_000
    )
    progress = Progress(folder)
    progress.status = Status("running")
    file = folder / "report.html"
    file.write_text(as_page(progress, {}, 120.0))
    return file


@pytest.fixture(scope="module")
def ended(running, tmp_path_factory) -> Path:
    folder = shutil.copytree(running.parent, tmp_path_factory.mktemp("ended") / "run")
    progress = Progress(folder)
    progress.status = Status("diverged", "the loss was not finite at 3 steps in a row: " + HOSTILE)
    (folder / "report.html").write_text(as_page(progress, {}, 120.0))
    return folder / "report.html"


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "comparison"
    accuracies = {
        "scratch": [0.6, 0.61],
        "supervised": [0.9, 0.91],
        "mae": [0.8, 0.82],
        "mpp-target-pixels": [0.7, 0.72],
    }
    results = comparison(out, accuracies)
    results |= {"data": HOSTILE, "settings": {"methods": [], "note": HOSTILE}, "commands": [HOSTILE]}
    write_comparison(results, out)
    return out / "report.html"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    from recipes_run import TINY, run

    out = tmp_path_factory.mktemp("finished") / "run"
    run("mpp", f"{TINY} --log_every 1 --out {out}")
    return out / "report.html"


@pytest.fixture(scope="module")
def analysed(tmp_path_factory) -> Path:
    from recipes_run import run

    place = tmp_path_factory.mktemp("analysed")
    save_backbone(ViT.variant("mu/8", image_size=32), place / "model", {"readout": "cls"})
    run("analyse", f"--model {place / 'model'} --data shapes:n=20 --threads 1 --out {place / 'out'}")
    return place / "out" / "report.html"


@pytest.mark.parametrize("page", ["overview", "running", "ended", "compared", "finished", "analysed"])
def test_a_page_fits_covers_nothing_and_can_be_read(browser, request, page):
    file = request.getfixturevalue(page)
    for width, dark in LOOKS:
        browser.open(file, width=width, dark=dark)
        browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        look = f"{page} at {width} px, {'dark' if dark else 'light'}"
        assert browser.run("document.documentElement.scrollWidth") <= width, look
        assert browser.run(OVERLAPS) == [], look
        assert browser.run(CUT) == [], look
        assert browser.run(FAINT) == [], look
        assert browser.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)"
        )
        assert browser.errors() == [], look


@pytest.mark.parametrize("page", ["overview", "running", "ended", "compared"])
def test_names_are_shown_as_text(browser, request, page):
    browser.open(request.getfixturevalue(page))
    assert HOSTILE in browser.run("document.body.textContent")
    assert browser.run("document.querySelectorAll('img[src=x]').length") == 0


def column(browser: Browser, title: str) -> list[str]:
    """Of the rows that are shown."""
    script = f"""(() => {{ const heads = [...document.querySelector("#runs thead tr").cells].map((c) => c.textContent);
      return [...document.querySelectorAll("#runs tbody tr")].filter((row) => !row.hidden)
        .map((row) => row.cells[heads.indexOf({json.dumps(title)})].textContent); }})()"""
    return browser.run(script)


def sort_by(browser: Browser, title: str) -> str:
    titles = browser.run("[...document.querySelectorAll('#runs th button')].map((one) => one.textContent)")
    browser.click("#runs th button", titles.index(title))
    return browser.run(f"[...document.querySelectorAll('#runs th[aria-sort]')][{titles.index(title)}].ariaSort")


def test_a_click_sorts_by_a_column_and_marks_it(browser, overview):
    browser.open(overview)
    assert sort_by(browser, "run") == "ascending"
    assert column(browser, "run") == sorted(NAMES, key=lambda name: (name[0] != "<", name.lower()))
    assert sort_by(browser, "20-nn, %") == "descending"
    ends = [float(cell.split()[-1]) for cell in column(browser, "20-nn, %")]
    assert ends == sorted(ends, reverse=True)
    assert len(set(ends)) > 3
    assert sort_by(browser, "20-nn, %") == "ascending"
    assert [float(cell.split()[-1]) for cell in column(browser, "20-nn, %")] == ends[::-1]
    assert sort_by(browser, "FLOPs") == "descending"
    assert [cell != "" for cell in column(browser, "FLOPs")] == [True, True, False, False, False, False]  # unknown last
    marks = "[...document.querySelectorAll('#runs th button')].map((one) => getComputedStyle(one, '::after').content)"
    assert browser.run(marks).count('"\N{DOWNWARDS ARROW}"') == 1


def test_the_filter_leaves_the_rows_that_contain_its_words(browser, overview):
    browser.open(overview)
    browser.click("#filter")
    browser.call("Input.insertText", text="PIXELS stopped")
    assert column(browser, "run") == ["mpp-pixels"]
    assert browser.run("document.querySelector('#count').textContent") == "1 of 6"


LINES = "[...document.querySelectorAll('#chart polyline')].map((line) => line.textContent)"


def test_boxes_choose_runs_and_the_legend_hides_and_shows_them(browser, overview):
    browser.open(overview)
    drawn = {*NAMES} - {"dino"}  # at first without the run that has diverged
    assert sorted(browser.run(LINES)) == sorted(drawn)
    shown = "[...document.querySelectorAll('#legend bdi')].map((one) => one.textContent)"
    assert sorted(browser.run(shown)) == sorted(drawn)
    browser.click("#runs tbody input", column(browser, "run").index("dino"))
    assert sorted(browser.run(LINES)) == sorted(NAMES)
    first = column(browser, "run")[0]
    browser.click("#runs tbody input")
    assert sorted(browser.run(LINES)) == sorted(browser.run(shown)) == sorted({*NAMES} - {first})
    (other, *_) = browser.run(shown)
    browser.click("#legend button")
    assert sorted(browser.run(LINES)) == sorted({*NAMES} - {first, other})
    assert other in browser.run(shown)
    browser.click("#legend button")
    assert other in browser.run(LINES)


def test_another_metric_draws_its_own_values(browser, overview):
    browser.open(overview)
    options = browser.run("[...document.querySelector('#metric').options].map((one) => one.value)")
    assert {"loss", "lr", "gradient norm", "images per second", "20-nn, %", "20-nn of mean, %"} <= {*options}
    browser.run("metric.value = '20-nn, %'; metric.dispatchEvent(new Event('change'))")
    (values,) = [browser.run("[...document.querySelectorAll('#legend output')].map((one) => one.textContent)")]
    names = browser.run("[...document.querySelectorAll('#legend bdi')].map((one) => one.textContent)")
    last = dict(zip(column(browser, "run"), column(browser, "20-nn, %"), strict=True))
    for name, value in zip(names, values, strict=True):
        assert float(value) == pytest.approx(float(last[name].split()[-1]), abs=0.06)


def test_axes_place_values_evenly_or_by_their_logarithms(browser, overview):
    browser.open(overview)
    data = json.loads(browser.run("document.getElementById('data').textContent"))
    steps, values = next(run for run in data["runs"] if run["name"] == "mae")["metrics"]["loss"]
    for up, across in [(float, float), (math.log, float), (math.log, math.log)]:
        browser.run(f"logY.checked = {str(up is math.log).lower()}; logY.dispatchEvent(new Event('change'))")
        browser.run(f"logX.checked = {str(across is math.log).lower()}; logX.dispatchEvent(new Event('change'))")
        points = browser.run(
            "[...document.querySelectorAll('#chart polyline')].find((line) => line.textContent === 'mae')"
            ".getAttribute('points').split(' ').map((point) => point.split(',').map(Number))"
        )
        assert len(points) == len(steps)
        for place, (to, true) in enumerate([(across, steps), (up, values)]):
            pixels, exact = [point[place] for point in points], [to(value) for value in true]
            share = [(p - pixels[0]) / (pixels[-1] - pixels[0]) for p in pixels]
            assert share == pytest.approx([(e - exact[0]) / (exact[-1] - exact[0]) for e in exact], abs=0.002)


def test_a_reload_keeps_what_the_reader_chose(browser, overview):
    browser.open(overview, width=390)
    sort_by(browser, "loss")
    browser.click("#runs tbody input", 2)
    browser.run("metric.value = 'lr'; metric.dispatchEvent(new Event('change')); scrollTo(0, 321)")
    before = [column(browser, "run"), browser.run(LINES), browser.run("scrollY")]
    reload(browser)
    assert [column(browser, "run"), browser.run(LINES), browser.run("scrollY")] == before
    assert browser.run("metric.value") == "lr"
    browser.run("sessionStorage.clear()")


def reload(browser: Browser) -> None:
    browser.events.clear()
    browser.call("Page.reload")
    browser.wait_for("Page.loadEventFired")
    browser.run("new Promise(requestAnimationFrame).then(() => new Promise(requestAnimationFrame))")


def test_a_live_page_reloads_itself_and_keeps_its_place(browser, running, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(running.read_text().replace('data-every="15"', 'data-every="1.5"'))
    browser.open(file, width=390)
    browser.run("document.querySelector('details').open = true; scrollTo(0, 200); window.same = true")
    file.write_text(file.read_text().replace("step 120,000 of", "step 123,456 of"))
    browser.events.clear()
    browser.wait_for("Page.loadEventFired")
    browser.run("new Promise(requestAnimationFrame).then(() => new Promise(requestAnimationFrame))")
    assert "step 123,456 of" in browser.run("document.querySelector('.lead').textContent")
    assert browser.run("[document.querySelector('details').open, scrollY]") == [True, 200]
    browser.call("Page.navigate", url="about:blank")


def test_a_block_that_the_reader_closed_stays_closed(browser, running, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(running.read_text().replace("<details>", "<details open>", 1))
    browser.open(file)
    first = "document.querySelector('details').open"
    assert browser.run(first)
    # The page remembers it when the browser tells of it, which is a moment later.
    listen = "document.querySelector('details').addEventListener('toggle', () => setTimeout(done))"
    browser.run(f"new Promise(done => {{ {listen}; {first} = false }})")
    reload(browser)
    assert not browser.run(first)
    browser.run("sessionStorage.clear()")


def test_a_live_page_that_is_too_old_says_that_the_run_may_be_dead(browser, running, ended):
    browser.open(running)
    assert browser.run("document.getElementById('stale').hidden")
    browser.open(running, script=NOW)
    assert "it may be dead" in browser.run("document.getElementById('stale').innerText")
    assert browser.run("document.getElementById('stale').checkVisibility()")
    browser.open(ended, script=NOW)
    assert browser.run("document.getElementById('stale').hidden")
