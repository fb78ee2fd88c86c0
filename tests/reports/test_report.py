"""The report of a run says what its log says, needs no other file, and escapes what it is given."""

import json
import re
import shutil
from html import unescape
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from recipes_run import TINY, run

from sslvit.reports import page
from sslvit.reports.charts import HEIGHT, LEFT, RIGHT, WIDTH, Line, apart, line_chart, nice_ticks
from sslvit.reports.run import write_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "run"
    run("mpp", f"{TINY} --out {out}")
    return out


def test_the_table_holds_the_logged_numbers_and_the_summary_the_cost(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    text, html = (finished / "report.md").read_text(), (finished / "report.html").read_text()
    first, last = lines[0], lines[-1]
    names = [name for name in last if name.startswith("eval/")]
    assert names
    for name in names:
        _, readout, protocol = name.split("/")
        mark = " *" if readout == "mean" else ""
        cells = f"{protocol} of {readout}{mark}", f"{100 * first[name]:.1f}", f"{100 * last[name]:.1f}"
        assert f"| {' | '.join(cells)} |" in text
        assert "".join(f"<td>{cell}</td>" for cell in cells) in html
    cost = json.loads((finished / "cost.json").read_text())
    assert f"{cost['images']:,} images of 16 px" in text
    assert "Its features did not collapse." in text
    card = (finished / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "The readout to use is mean." in card


def test_a_run_that_began_with_a_model_is_called_by_that_model_s_name(finished):
    text = f"--init_from {finished} --overwrite --out {finished}-again"
    run("mpp", f"{TINY} {text}".replace("--model XS/8", ""))
    for folder in (finished, Path(f"{finished}-again")):
        assert "trained XS/8, 1.2 million" in (folder / "report.md").read_text()


def test_the_page_is_one_file_and_each_picture_is_in_it(finished):
    html = (finished / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "http" not in re.sub(r"base64,[^\"]*", "", html).replace("http://www.w3.org/2000/svg", "")
    pictures = sorted(path.stem for path in (finished / "pictures").glob("*.png"))
    assert pictures == [
        *("attention", "filters", "heads", "neighbours", "patches", "positions", "reconstructions", "views")
    ]
    assert html.count("data:image/png;base64,") == len(pictures)


def test_what_it_sees_is_a_part_of_the_page_where_there_are_pictures_of_it(finished, tmp_path):
    assert "<h2>What it sees</h2>" in (finished / "report.html").read_text()
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in ("patches", "heads"):  # as of a BiT
        (out / "pictures" / f"{name}.png").unlink()
    write_report(out)
    assert "What it sees" not in (out / "report.html").read_text()


def test_the_report_is_made_of_the_folder_alone_and_again_the_same(finished):
    before = (finished / "report.html").read_bytes()
    write_report(finished)
    assert (finished / "report.html").read_bytes() == before


def test_what_comes_from_files_cannot_become_markup():
    hostile = "<script>alert(1)</script>"
    sections = [
        page.paragraph(hostile),
        page.bullets([hostile]),
        page.table([hostile], [[hostile]]),
        page.code(hostile),
    ]
    sections += [
        page.folded(hostile, page.heading(hostile)),
        line_chart([Line(hostile, [1, 2], [1, 2])], x=hostile, y="y"),
    ]
    assert "<script" not in page.page(hostile, sections)


def test_a_chart_puts_values_where_they_belong():
    svg = ElementTree.fromstring(line_chart([Line("a", [0, 5, 10], [0.0, 0.5, 1.0])], x="x", y="y"))
    line = next(element for element in svg.iter() if element.tag.endswith("polyline"))
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert points[0][0] == LEFT
    assert points[2][0] == WIDTH - RIGHT
    assert points[1] == pytest.approx([(points[0][i] + points[2][i]) / 2 for i in (0, 1)], abs=0.1)
    assert points[0][1] > points[2][1]  # higher values are higher up
    logarithmic = line_chart([Line("a", [0.01, 0.1, 1.0], [1, 2, 3])], x="x", y="y", logarithmic=True, ticks=[0.01, 1])
    points = re.search(r'points="([^"]*)"', logarithmic)[1].split()
    xs = [float(point.split(",")[0]) for point in points]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.123, 0.124), (-5, 7e6), (3, 3), (0.0, 0.0)])
def test_ticks_are_round_few_and_cover_the_range(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 1 <= len(ticks) <= 7


def test_what_cannot_be_drawn_is_left_out_and_labels_do_not_cover_each_other():
    assert line_chart([Line("a", [], [])], x="x", y="y") == ""
    assert "nan" not in line_chart([Line("a", [1, 2, 3], [1, float("nan"), 2])], x="x", y="y")
    moved = sorted(apart([100.0, 101.0, 102.0, HEIGHT]))
    assert all(b - a >= 16 for a, b in pairwise(moved))


HOSTILE = "a*b*_c_`d`<script>alert(1)</script>|[x](http://evil)\n# ~~h~~ &lt; $x$"


def test_names_in_a_report_are_shown_as_they_are_in_markdown_and_html(finished, tmp_path):
    """By another's Markdown renderer and HTML parser."""
    markdown_it = pytest.importorskip("markdown_it")
    out = shutil.copytree(finished, tmp_path / "run")
    for file, change in (("model/config.json", "sslvit"), ("cost.json", None)):
        content = json.loads((out / file).read_text())
        del content["seal"]
        (content[change] if change else content).update({"data": HOSTILE, "objective": HOSTILE, "device": HOSTILE})
        (out / file).write_text(json.dumps(content))
    write_report(out)
    rendered = (
        markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).render((out / "report.md").read_text())
    )
    plain = " ".join(HOSTILE.split())
    for page_ in (rendered, (out / "report.html").read_text()):
        assert "<script" not in page_
        assert not re.search(r"<(em|strong|code|s|del)>|href=", page_)
        assert page_.count("<h1>") == 1
        texts = " ".join(unescape(re.sub(r"<[^>]*>", " ", page_)).split())
        assert texts.count(plain) >= 3  # in the title, in the sentence, in the table of costs
    assert rendered.count("<table>") == 2
    assert all(row.count("<td") == 2 for row in rendered.split("<table>")[2].split("<tr>")[2:])


def test_damaged_lines_of_a_log_are_left_out_of_its_report(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines.insert(1, '{"stdp": 2, "loss": 6.2}')  # of a flipped bit
    name = next(name for name in json.loads(lines[-1]) if name.startswith("eval/"))
    assert name in lines[0]
    lines[0] = lines[0].replace(name, name.replace("eval/", "eval/q", 1))
    (run / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    write_report(run)
    _, readout, protocol = name.split("/")
    assert f"{protocol} of {readout}" not in (run / "report.md").read_text()
    assert (run / "report.md").read_text().count(" of ") > 2
