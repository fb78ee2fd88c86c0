"""What a comparison's report claims: a difference that is there is told, one that is not is not, with its sources."""

import re

import numpy as np
import pytest
import torch
from made_up_comparison import COST, IMAGES, LABELS, NAMES, comparison
from recipes_run import TINY, run
from scipy import stats

from sslvit.errors import DataError
from sslvit.evaluate.predictions import Predictions, save_predictions
from sslvit.evaluate.statistics import difference
from sslvit.experiments.claims import ahead_of, notes, sentences
from sslvit.experiments.report import as_markdown, as_page
from sslvit.experiments.results import collect, judge
from sslvit.experiments.tables import cost_in_short, cost_table, groups, interval_table


def test_a_difference_is_reported_with_its_interval_and_only_where_there_is_one(tmp_path):
    given = {"scratch": [0.60, 0.61, 0.59], "mae": [0.75, 0.76, 0.74], "mpp-target-pixels": [0.74, 0.75, 0.76]}
    results = comparison(tmp_path, given)
    values = {NAMES[name]: found for name, found in given.items()} | {"scratch (cls)": [0.0] * 3}
    assert results["values"]["20-nn"] == values  # of the readout that is declared
    assert results["values"]["transfer 1: 20-nn"] == values
    told = sentences(results, "fine-tuned 1 %", to_scratch=True)
    assert sentences(results, "fine-tuned 1 %")[:2] == told
    assert re.match(
        r"MAE is ahead of scratch \(mean\), fine-tuned on 1% of the labels: \+1[2-8]\.\d points, "
        r"95% CI \[\d+\.\d, \d+\.\d\]\.$",
        told[0],
    )
    assert re.match(
        r"MPP \(pixels\) is ahead of scratch \(mean\), fine-tuned on 1% of the labels: \+1[2-8]\.\d", told[1]
    )
    told = sentences(results, "fine-tuned 1 %")
    assert len(told) == 6
    assert re.match(
        r"No significant difference between MPP \(pixels\) and MAE, fine-tuned on 1% of the labels: "
        r"[+-]\d\.\d points, 95% CI \[",
        told[-1],
    )
    linear, elsewhere = (sentences(results, place + "linear 100 %") for place in ("", "transfer 1: "))
    assert linear == [one.replace("fine-tuned on 1%", "by a linear probe on 100%") for one in told]
    assert elsewhere == [one.replace("of the labels", "of the labels of transfer 1") for one in linear]
    assert sentences(results, "linear 1 %") == [one.replace("on 100%", "on 1%") for one in linear]
    assert sentences(results, "transfer 1: fine-tuned 1 %")[0] == told[0].replace("labels", "labels of transfer 1")
    assert sentences(results, "20-nn") == []  # of which no predictions are kept
    text = as_markdown(results)
    assert all(sentence in text for sentence in [*told, *linear, *elsewhere])
    assert "over 3 seeds; 95% confidence intervals (CI) are over test images and seeds." in text


def test_two_methods_are_paired_by_image_whatever_the_order_in_their_files(tmp_path):
    told, judged = torch.where(torch.arange(IMAGES) % 3 > 0, LABELS, 1 - LABELS), []
    for seed in range(2):
        order, file = (
            torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed)),
            tmp_path / f"{seed}.parquet",
        )
        probabilities = torch.nn.functional.one_hot(told, 2).float()[order]
        save_predictions(file, Predictions(order, LABELS[order], probabilities, {}))
        judged.append(judge(file))
    found = difference([judged[0].right], [judged[1].right])
    assert (found.mean, found.low, found.high) == (0, 0, 0)  # both are right at the same images


def test_a_method_is_compared_with_scratch_of_the_same_readout(tmp_path):
    results = comparison(tmp_path, {"scratch": [0.6], "supervised": [0.8], "mae": [0.8]})
    assert results["readouts"] == {
        "scratch (mean)": "mean", "scratch (cls)": "cls", "supervised": "cls", "MAE": "mean"
    }  # fmt: skip
    gains = ahead_of(results, "scratch", "linear 100 %")
    assert list(gains) == ["supervised", "MAE"]
    assert gains["supervised"].mean == pytest.approx(80, abs=5)  # scratch is never right by its class token
    assert gains["MAE"].mean == pytest.approx(20, abs=5)
    lead = sentences(results, "linear 100 %", to_scratch=True)
    assert [text.split(", ")[0] for text in lead] == [
        "supervised is ahead of scratch (cls)", "MAE is ahead of scratch (mean)"
    ]  # fmt: skip
    assert "declares: mean for scratch (mean), MAE; cls for scratch (cls), supervised." in as_markdown(results)


def test_gains_and_intervals_over_seeds_are_those_of_the_sentences_and_of_scipy(tmp_path):
    given = {"scratch": [0.60, 0.61, 0.59], "supervised": [0.90, 0.92, 0.91], "mae": [0.70, 0.72, 0.74]}
    results = comparison(tmp_path, given)
    by_scratch, by_supervised = (ahead_of(results, base, "fine-tuned 1 %") for base in ("scratch", "supervised"))
    assert list(by_supervised) == ["scratch (mean)", "scratch (cls)", "MAE"]
    one, back = by_scratch["MAE"], by_supervised["MAE"]
    told = " ".join(sentences(results, "fine-tuned 1 %"))
    assert f"fine-tuned on 1% of the labels: {one.mean:+.1f} points, 95% CI [{one.low:.1f}, {one.high:.1f}]" in told
    assert all(x.low < x.mean < x.high < 0 for x in by_supervised.values())
    assert back.mean - by_supervised["scratch (mean)"].mean == pytest.approx(one.mean)
    assert f"| MAE | {one.mean:+.1f} [{one.low:.1f}, {one.high:.1f}] |" in as_markdown(results)
    low, high = stats.t.interval(0.95, 2, np.mean([70, 72, 74]), stats.sem([70, 72, 74]))
    _, rows = interval_table(results, ["20-nn"])
    assert dict(rows)["MAE"] == f"72.0 [{low:.1f}, {high:.1f}]"
    assert "Means and their intervals" in as_page(results, {}, [])


def test_one_seed_says_in_every_sentence_that_seeds_were_not_measured(tmp_path):
    results = comparison(tmp_path, {"scratch": [0.6], "mae": [0.8], "mpp-target-pixels": [0.6]})
    told = sentences(results, "fine-tuned 1 %", to_scratch=True)
    assert [("ahead" in text, "No significant difference" in text) for text in told] == [(1, 0), (0, 1)]
    assert all(text.endswith("; seeds were not measured.") for text in sentences(results, "fine-tuned 1 %"))
    assert "One seed: the variation between seeds was not measured" in as_markdown(results)
    assert "Means and their intervals" not in as_page(results, {}, [])


def test_seeds_that_disagree_make_a_large_difference_uncertain(tmp_path):
    # Ahead by 10 points on average, but by -6, 10 and 26: Student's interval over three seeds holds zero.
    results = comparison(tmp_path, {"scratch": [0.6, 0.6, 0.6], "mae": [0.54, 0.70, 0.86]})
    (told,) = sentences(results, "fine-tuned 1 %", to_scratch=True)
    assert told.startswith(
        "No significant difference between MAE and scratch (mean), fine-tuned on 1% of the labels: +10"
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_page_stands_alone_and_holds_tables_figures_sentences_and_settings(tmp_path, seeds):
    results = comparison(tmp_path, {"scratch": [0.6] * seeds, "mae": [0.8] * seeds})
    html = as_page(results, {}, ["python recipes/mae.py --data x"])
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", html)
    for text in (
        *sentences(results, "fine-tuned 1 %"),
        "Frozen features",
        "Transfer 1, frozen features",
        "python recipes/mae.py --data x",
    ):
        assert text in html
    assert html.count("<svg") == 2 + 4  # gains; fine-tuned and linear, here and there
    assert "500, 2 s" in html
    assert "500, -" in as_markdown(results)  # whose FLOPs were not counted


@pytest.mark.parametrize("given", [{"fractions": (1,)}, {"tuned": False}, {"places": ("own",)}])
def test_less_is_reported_too(tmp_path, given):
    results = comparison(tmp_path, {"scratch": [0.6], "mae": [0.8]}, **given)
    assert "linear 100%" in as_markdown(results)
    assert "MAE is ahead of scratch (mean)" in as_page(results, {}, [])


def test_a_table_for_each_set_of_labels_and_notes_on_what_it_is(tmp_path):
    results = comparison(tmp_path, {"scratch": [0.6], "mae": [0.8]}, places=("own", "classes held out", "transfer 1"))
    kinds = ("fine-tuned", "frozen features")
    titles = [place + kind for place in ("", "classes held out, ", "transfer 1, ") for kind in kinds]
    assert list(groups(results)) == titles
    assert groups(results)["classes held out, fine-tuned"][-1] == "classes held out: fine-tuned 100 %"
    assert "| classes held out, frozen features, % | 20-nn | linear 1% | linear 100% |" in as_markdown(results)
    assert "| classes held out, fine-tuned, % | 1% | 100% |" in as_markdown(results)
    results["settings"] = {"held_out": [2, 4], "transfer": ["idx:/x"], "limit_train": 1000, "limit_test": 0}
    told = " ".join(notes(results))
    for text in ("of the classes 2, 4,", "Transfer 1 is idx:/x.", "at most 1,000 training images", "shares of these"):
        assert text in told
    assert "test images, fine" not in told
    assert "had the same number of images" in told
    results["settings"] = {"budget": "seconds"}
    assert "about the seconds that the first one needs" in notes(results)[0]


def test_a_file_of_a_job_that_cannot_be_read_is_named_with_the_way_out(tmp_path):
    comparison(tmp_path, {"scratch": [0.6], "mae": [0.8]})
    models = {f"{name}-0": tmp_path / "models" / f"{name}-0" for name in ("scratch", "scratch-cls", "mae")}
    for name in (
        "probes/mae-0/own/numbers.json",
        "probes/mae-0/own/pretrained-mean-1.parquet",
        "finetuned/mae-0/own/1/test.json",
        "finetuned/mae-0/own/1/predictions.parquet",
        "models/mae-0/cost.json",
    ):
        file = tmp_path / name
        whole = file.read_bytes()
        file.write_bytes(whole[:10])
        with pytest.raises(DataError, match=rf"{file} cannot be read .*: delete {file.parent}, and the same command"):
            collect(tmp_path, {"mae": "MAE"}, [0], ["own"], models)
        file.write_bytes(whole)
    assert collect(tmp_path, {"mae": "MAE"}, [0], ["own"], models)["seeds"] == [0]


def test_costs_are_those_of_the_dearest_device_and_of_the_mean_run(tmp_path):
    results = comparison(tmp_path, {"scratch": [0.6, 0.6], "supervised": [0.8, 0.8]})
    other = {"seconds": 4.0, "device": "H100", "peak_memory_bytes": 3 * 2**20}
    results["costs"]["supervised"][1] |= other
    _, rows = cost_table(results)
    assert rows[0] == ["scratch (mean)", "0", "-", "-", "-", "-", "-"]
    assert rows[2] == ["supervised", "500", "3 s", "167", "3.00e+09", "3 MiB", "CPU, H100"]


def test_the_time_beside_an_accuracy_is_the_mean_of_the_seeds():
    costs = [COST | {"seconds": seconds} for seconds in (2.0, 6.0)]
    assert cost_in_short(costs, timed=True) == "500, 4 s"


def test_the_page_shows_how_each_was_trained(tmp_path):
    run("mae", f"{TINY} --decoder 16 1 2 --out {tmp_path / 'run'}")
    html = as_page(comparison(tmp_path, {"scratch": [0.6], "mae": [0.8]}), {"MAE": tmp_path / "run"}, [])
    assert "What the class token attends to" in html
    assert "Environment" in html
