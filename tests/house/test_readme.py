"""Numbers of comparisons and studies in the README and docs/results are those of the data files that are kept."""

import json
import re
from pathlib import Path

import dense
import loss_as_rank

from sslvit.experiments.report import as_markdown, figure
from sslvit.experiments.study import STUDIES, percent, plot
from sslvit.reports import page, robustness

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "results").glob("*.md"))]
BLOCK = re.compile(r"<!-- from (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def test_every_line_of_a_comparison_in_the_readme_is_one_of_its_report():
    blocks = [block for file in PAGES for block in BLOCK.findall(file.read_text())]
    assert BLOCK.search(PAGES[0].read_text())
    assert sorted({file for file, _ in blocks}) == [
        "recipes/results/built-in.json",
        "recipes/results/cifar10/all-images.json",
        "recipes/results/cifar10/held-out-seed-0.json",
        "recipes/results/cifar10/held-out.json",
        "recipes/results/dense.json",
        "recipes/results/fashion-mnist.json",
        "recipes/results/lejepa-loss.json",
        "recipes/results/robustness.json",
    ]
    tellers = {"dense": dense.told, "robustness": robustness.as_markdown, "lejepa-loss": loss_as_rank.told}
    for file, text in blocks:
        results = json.loads((ROOT / file).read_text())
        tell = tellers.get(Path(file).stem)
        told = tell(results) if tell else as_markdown(results).splitlines()
        lines = [line for line in text.splitlines() if line]
        assert len(lines) > 3
        assert [line for line in lines if not any(quoted(line, one) for one in told)] == []


def test_the_picture_of_fine_tuning_is_that_of_its_data():
    kept = ROOT / "recipes" / "results" / "cifar10"
    assert (kept / "fine-tuning.svg").read_text() == figure(json.loads((kept / "held-out.json").read_text()))


def test_the_table_of_twice_the_steps_is_of_its_runs():
    kept = ROOT / "recipes" / "results" / "cifar10"
    written = (ROOT / "docs" / "results" / "cifar10.md").read_text()
    short = json.loads((kept / "held-out.json").read_text())["values"]["classes held out: fine-tuned 10 %"]
    for name, file in {"scratch (mean)": "scratch-2.json", "MPP": "mpp-2.json"}.items():
        longer = json.loads((kept / "longer" / file).read_text())["top1"]
        assert (
            f"| {name} | {100 * short[name][2]:.1f} | {100 * longer:.1f} | {100 * (longer - short[name][2]):+.1f} ["
            in written
        )


def test_the_pictures_of_robustness_are_those_of_its_data():
    kept = ROOT / "recipes" / "results" / "robustness"
    drawn = robustness.charts(json.loads(kept.with_suffix(".json").read_text()))
    names = {re.sub(r"\W+", "-", caption.lower()).strip("-"): page.alone(svg) for caption, svg in drawn.items()}
    assert {file.stem: file.read_text() for file in kept.glob("*.svg")} == names


def quoted(line: str, told: str) -> bool:
    """Whether a line is this one of the report; "..." stands for other pairs that it names."""
    return re.fullmatch(".*".join(map(re.escape, re.split(r" ?\.\.\.", line))), told) is not None


def test_a_quotation_leaves_out_only_where_it_says_so():
    told = "- No difference between A and B (+0.4), C and D (-1.0), E and F (+2.0)."
    assert quoted("- No difference between ... C and D (-1.0), ...", told)
    assert quoted(told, told)
    for other in ("- No difference between C and D (-1.0), ...", "- No difference ... C and D (-1.1), ...", told[:-1]):
        assert not quoted(other, told)


def test_every_accuracy_and_plot_of_a_study_in_the_readme_is_of_its_points():
    written = (ROOT / "docs" / "results" / "vit-paper-studies.md").read_text()
    kept = sorted((ROOT / "recipes/results/studies").glob("*.json"))
    assert {"amounts", "positions", "readouts", "targets"} <= {file.stem for file in kept} <= set(STUDIES)
    for study, file in ((file.stem, file) for file in kept):
        results = json.loads(file.read_text())
        assert file.with_suffix(".svg").read_text() == page.alone(plot(results))
        points = results["points"]
        rounded = {
            f"{number:.1f}"
            for point in points
            for values in (*point["values"].values(), *point["start"].values())
            for number in percent(values)
        }
        (text,) = re.findall(
            rf"^{study.capitalize()}: (.*?)(?:\n\n|(?=^[A-Z][a-z]+: ))", written, re.DOTALL | re.MULTILINE
        )
        told = re.findall(r"(?<![\w.])\d+\.\d(?![\d%]| times)", text)
        assert len(told) > 3, study
        assert [number for number in told if number not in rounded] == [], study


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
