"""A comparison claims nothing where nothing was learned: one answer for all images, unequal classes, equal bests."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from made_up_comparison import comparison
from markdown_it import MarkdownIt
from sklearn.metrics import balanced_accuracy_score

from sslvit.evaluate.predictions import load_predictions
from sslvit.experiments.claims import ahead_of, notes, sentences, warnings
from sslvit.experiments.report import as_markdown, as_page
from sslvit.experiments.results import collect
from sslvit.experiments.tables import accuracy_table, balanced_table, best_of, groups
from sslvit.reports import page
from sslvit.runs.public import markdown

LABELS = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([900, 50, 50]))
HOSTILE = "a|b *c* _d_ `e` <script>f</script> [g](javascript:h) ![i][j] ~k~ # &lt; \\l"


def cells(text: str, name: str) -> list[list[str]]:
    """The rows of a Markdown file's tables that begin with this."""
    return [line.strip("| ").split(" | ")[1:] for line in text.splitlines() if line.startswith(f"| {name} |")]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """Supervised answers one class at its second seed, MAE at both."""
    given = {"scratch": [0.8, 0.8], "supervised": [0.85, 0.85], "mae": [0.9, 0.9], "mpp-target-pixels": [0.95, 0.95]}
    answers = ("supervised-1", "mae-0", "mae-1")
    return comparison(
        tmp_path_factory.mktemp("found"), given, places=("own",), labels=LABELS, one_class=answers, pixels=0.7
    )


def test_classifiers_that_predict_one_class_are_named_and_compared_with_none(found):
    assert warnings(found, ["linear 1 %"]) == [
        "Warning: by a linear probe on 1% of the labels, these predict the same class for nearly all test images (more "
        "than 95%): supervised (with 1 of 2 seeds), MAE. No difference from them is reported."
    ]
    assert len(warnings(found)) == 4  # once per column
    text = as_markdown(found)
    for column in ("fine-tuned 1 %", "linear 100 %"):
        told = sentences(found, column)
        assert any("MPP (pixels) is ahead of scratch (mean), " in one for one in told)
        assert not any("MAE" in one or "supervised" in one for one in told)
        assert list(ahead_of(found, "scratch", column)) == ["MPP (pixels)"]
    assert not re.search("ahead of (MAE|supervised),|(MAE|supervised) is ahead", text)
    assert text.index("Warning: ") < text.index("| fine-tuned, %")
    assert cells(text, "MAE")[0][:2] == ["90.0 ± 0.0 †"] * 2
    assert cells(text, "MPP (pixels)")[0][0][-1] != "†"
    assert "†: with one seed or more, the same class is predicted for nearly all test images" in " ".join(notes(found))
    html = as_page(found, {}, [])
    assert all(one in html for one in warnings(found))
    assert "90.0 ± 0.0 †" in html


def test_a_comparison_in_which_all_classifiers_predict_one_class_claims_nothing(tmp_path):
    names = ("scratch-0", "scratch-cls-0", "mae-0")
    nothing = comparison(tmp_path, {"scratch": [0.5], "mae": [0.5]}, labels=LABELS, one_class=names, pixels=0.5)
    text, html = as_markdown(nothing), as_page(nothing, {}, [])
    for one in (text, html):
        assert "is ahead of" not in one
        assert "significant" not in one
        assert "points ahead" not in one
    assert "<p>No difference is reported.</p>" in html
    for one in (text, html):
        assert "scratch (mean), scratch (cls), MAE. No difference from them is reported." in one


def test_balanced_accuracy_is_shown_where_classes_are_unequal_and_is_scikit_learns(tmp_path):
    results = comparison(tmp_path, {"scratch": [0.7], "mae": [0.8]}, places=("own",), labels=LABELS, pixels=0.6)
    _, rows, _ = balanced_table(results, "frozen features", groups(results)["frozen features"])
    assert [row[0] for row in rows] == [
        "commonest class",
        "raw pixels",
        "random start (mean)",
        "random start (cls)",
        "MAE",
    ]
    files = {"raw pixels": tmp_path / "baselines" / "own" / "pixels-1.parquet"}
    files["MAE"] = tmp_path / "probes" / "mae-0" / "own" / "pretrained-mean-1.parquet"
    for name, file in files.items():
        one = load_predictions(file)
        expected = balanced_accuracy_score(one.labels.numpy(), one.probabilities.argmax(-1).numpy())
        assert {row[0]: row[-1] for row in rows}[name] == f"{100 * expected:.1f}"
    assert rows[0] == ["commonest class", "33.3", "33.3", "33.3"]
    assert [row[1] for row in rows[1:]] == ["30.0", "35.0", "0.0", "40.0"]  # as the probes tell them
    text = as_markdown(results)
    assert "| frozen features, balanced accuracy, % | 20-nn | linear 1% | linear 100% |" in text
    assert "| fine-tuned, balanced accuracy, % | 1% | 100% |" in text
    assert "more than 1.5 times the images of the smallest" in text


def test_balanced_accuracy_of_neighbours_is_left_out_where_a_probe_has_none(tmp_path):
    file = tmp_path / "probes" / "mae-0" / "own" / "numbers.json"
    given = {"scratch": [0.7], "mae": [0.8]}
    comparison(tmp_path, given, places=("own",), labels=LABELS, pixels=0.6)
    numbers = json.loads(file.read_text())
    del numbers["pretrained/mean"]["balanced accuracy"]
    file.write_text(json.dumps(numbers))
    models = {f"{name}-0": tmp_path / "models" / f"{name}-0" for name in ("scratch", "scratch-cls", "mae")}
    results = collect(tmp_path, {"mae": "MAE"}, [0], ["own"], models)
    assert "20-nn" in results["values"]
    assert list(results["balanced"]) == ["linear 1 %", "linear 100 %", "fine-tuned 1 %", "fine-tuned 100 %"]


def test_of_equal_classes_there_is_no_balanced_accuracy(tmp_path):
    results = comparison(tmp_path, {"scratch": [0.7], "mae": [0.8]}, places=("own",), pixels=0.6)
    assert "alanced accuracy" not in as_markdown(results)
    assert "alanced accuracy" not in as_page(results, {}, [])


def test_each_table_has_the_baselines_without_a_model(found):
    text = as_markdown(found)
    (tuned, _, frozen, _), (pixels, _) = cells(text, "commonest class"), cells(text, "raw pixels")
    assert tuned == ["85.0", "85.0", "none"]  # of all test images, as fine-tuned models are read on
    assert frozen == ["90.0"] * 3 + ["none"]
    assert pixels == ["70.0"] * 3 + ["none"]
    assert "Raw pixels: the images themselves, 8 x 8 pixels" in text


def test_of_equal_bests_as_shown_all_are_bold():
    values = [[[0.9], [0.5, 0.5]], [[0.90049], [0.6, 0.4]], [[0.8], [0.4, 0.4]]]
    assert best_of(values) == {(0, 1), (1, 1), (0, 2), (1, 2)}


def test_the_page_shows_every_equal_best_in_bold(found):
    head, rows, best = accuracy_table(found, "fine-tuned", groups(found)["fine-tuned"])
    html = page.table(head, rows, best)
    shown = {row[0]: row[1] for row in rows}
    assert max(float(cell.split()[0]) for cell in shown.values()) == float(shown["MPP (pixels)"].split()[0])
    assert f'<td class="best">{shown["MPP (pixels)"]}</td>' in html


def test_all_pairs_without_a_significant_difference_are_in_one_sentence_per_column(tmp_path):
    given = {"scratch": [0.7], "supervised": [0.7], "mae": [0.7], "mpp-target-pixels": [0.7]}
    results = comparison(tmp_path, given, places=("own",), tuned=False, fractions=(1,), seed=2)
    told = sentences(results, "linear 100 %")
    level = [one for one in told if one.startswith("No significant difference, by a linear probe on 100% of the")]
    assert len(level) == 1
    assert as_markdown(results).count("No significant") == 1
    # scratch (cls) is never right; of the four others each pair is level.
    assert len(told) == 1 + 4
    assert sum(f"{a} and {b} (" in level[0] for a in results["methods"] for b in results["methods"]) == 6


def test_names_of_any_kind_stay_text_in_markdown_and_on_the_page(tmp_path):
    results = comparison(tmp_path, {"scratch": [0.6], "mae": [0.8]}, places=("own",), pixels=0.5)
    results = json.loads(json.dumps(results).replace('MAE"', f'{json.dumps(HOSTILE)[1:-1]}"'))
    results |= {"data": HOSTILE, "settings": {"transfer": [HOSTILE]}}
    text = as_markdown(results)
    tokens = [
        one
        for token in MarkdownIt("commonmark").enable("table").parse(text)
        for one in (token, *(token.children or []))
    ]
    kinds = {token.type for token in tokens}
    assert not kinds & {
        "html_inline",
        "html_block",
        "link_open",
        "image",
        "em_open",
        "strong_open",
        "code_inline",
        "s_open",
    }
    shown = ["".join(one.content for one in token.children) for token in tokens if token.type == "inline"]
    assert f"Gain from pretraining: {HOSTILE}" in shown
    assert shown.count(HOSTILE) >= 3  # in the tables, each a cell of its own
    assert f"Transfer 1 is {HOSTILE}." in shown
    widths = {
        len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith(f"| {markdown(HOSTILE)}")
    }
    assert len(widths) > 0
    html = as_page(results, {}, [])
    assert "<script>f" not in html
    assert "&lt;script&gt;f" in html


def test_random_names_of_markup_characters_stay_text_in_tables_headings_and_lists():
    """As markdown-it reads them."""
    draw, reader = random.Random(0), MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for _ in range(500):
        name = " ".join("".join(draw.choices("*_[]()<>|`~#&;:!\\ a1-+.", k=10)).split()) or "x"
        for wrap in ("| x | {} |\n|---|---|\n| {} | y |", "# A {}", "- A {} b"):
            tokens = reader.parse(wrap.replace("{}", markdown(name)))
            inline = [token for token in tokens if token.type == "inline"]
            assert {child.type for token in inline for child in token.children} <= {"text", "text_special"}, name
            assert any(name in "".join(child.content for child in token.children) for token in inline), name


@pytest.mark.parametrize(
    "text", ["MPP (pixels)", "DINO (crops 4 14)", "moco_v3", "idx:/usr/share/x-y", "[-1.5, 1.3]", "+13.4 [9.6, 17.2]"]
)
def test_ordinary_names_and_numbers_need_no_escapes(text):
    assert markdown(text) == text


def test_results_of_an_earlier_version_make_reports_that_say_what_they_lack():
    folder = Path(__file__).parents[2] / "recipes" / "results"
    for file in ("built-in.json", "fashion-mnist.json"):
        results = json.loads((folder / file).read_text())
        for name in ("pixels", "balanced", "one_class"):
            results.pop(name, None)
        for by_method in results["values"].values():
            for name in ("commonest class", "raw pixels"):
                by_method.pop(name, None)
        text, html = as_markdown(results), as_page(results, {}, [])
        for one in (text, html):
            assert (
                "An earlier version made these results: they have no rows of the commonest class and of raw pixels."
                in one
            )
            assert "do not say whether a classifier predicts the same class for all images" in one
        assert cells(text, "commonest class") == []


def test_how_little_two_seeds_say_of_a_mean_is_written_down(tmp_path):
    results = comparison(tmp_path, {"scratch": [0.40, 0.60], "mae": [0.70, 0.71]}, places=("own",), fractions=(1,))
    text = as_markdown(results)
    # Student's t of one degree of freedom is tan(0.475 pi) = 12.7; 0.40 and 0.60 give more than all there is.
    assert "with 2 seeds 12.7 standard errors to either side, and the widest here spans 100 points." in text
    assert "[0.0, 100.0]" in text
    assert "One of width 0 only means that all seeds gave the same accuracy." in text  # as scratch (cls), 0 and 0
    assert re.search(r"\[-\d+\.\d, 1\d\d\.\d", text) is None
