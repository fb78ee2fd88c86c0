"""What a comparison's report claims: a difference that is there is told, one that is not is not, with its sources."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from sslvit.evaluate.predictions import Predictions, save_predictions
from sslvit.model_folder import save_backbone
from sslvit.results import ahead_of, collect, sentences
from sslvit.results_page import as_markdown, as_page, interval_table
from sslvit.vit import ViT

IMAGES = 1000
METHODS = {"supervised": "supervised", "scratch": "scratch", "mae": "mae", "mpp-target-pixels": "mpp:target=pixels"}


def comparison(out: Path, accuracies: dict[str, list[float]], seed: int = 0) -> dict:
    """Made up: each method's probability of being right at an image, by seed, drawn for each image by itself."""
    draw = torch.Generator().manual_seed(seed)
    models = {}
    for method, by_seed in accuracies.items():
        for number, accuracy in enumerate(by_seed):
            name = f"{method}-{number}"
            models[name] = out / "models" / name
            vit = ViT(image_size=8, patch_size=4, width=8, depth=1, heads=1)
            save_backbone(vit, models[name], {"readout": "mean"})
            right = torch.rand(IMAGES, generator=draw) < accuracy
            labels = torch.arange(IMAGES) % 2
            told = torch.where(right, labels, 1 - labels)
            order = torch.randperm(IMAGES, generator=draw)  # as another worker may have written them
            probabilities = torch.nn.functional.one_hot(told, 2).float()
            found = Predictions(torch.arange(IMAGES)[order], labels[order], probabilities[order], {})
            save_predictions(out / "finetuned" / name / "0.01" / "predictions.parquet", found)
            test = out / "finetuned" / name / "0.01" / "test.json"
            test.write_text(json.dumps({"top1": right.double().mean().item()}))
            for place in ("own", "transfer 1"):
                file = out / "probes" / name / place / "numbers.json"
                file.parent.mkdir(parents=True)
                numbers = {"20-nn": accuracy, "linear 1 %": 0.1, "linear 100 %": right.double().mean().item()}
                file.write_text(json.dumps({"pretrained/mean": numbers, "pretrained/cls": {"20-nn": 0.0}}))
                save_predictions(file.with_name("pretrained-mean-1.parquet"), found)
                save_predictions(file.with_name("pretrained-mean-0.01.parquet"), found)
    seeds = list(range(len(next(iter(accuracies.values())))))
    methods = {name: METHODS[name] for name in accuracies}
    return {"data": "made up", "settings": {}} | collect(out, methods, seeds, models)


def test_a_known_difference_is_told_with_its_interval_and_none_where_there_is_none(tmp_path):
    given = {"scratch": [0.60, 0.61, 0.59], "mae": [0.75, 0.76, 0.74], "mpp-target-pixels": [0.74, 0.75, 0.76]}
    results = comparison(tmp_path, given)
    assert results["values"]["20-nn"] == {METHODS[name]: values for name, values in given.items()}  # of mean, declared
    assert results["values"]["transfer 1: 20-nn"] == results["values"]["20-nn"]
    told = sentences(results, "fine-tuned 1 %")
    assert len(told) == 3
    assert re.match(
        r"mae is ahead of scratch by 1[2-8]\.\d points when fine-tuned with 1 % of the labels \[\d+\.\d, \d+\.\d\]\.$",
        told[0],
    )
    assert re.match(r"mpp:target=pixels is ahead of scratch by 1[2-8]\.\d points when fine-tuned with 1 % of", told[1])
    assert re.match(r"mpp:target=pixels and mae cannot be told apart when fine-tuned with 1 % of the labels", told[2])
    linear, elsewhere = (sentences(results, place + "linear 100 %") for place in ("", "transfer 1: "))
    assert linear == [one.replace("when fine-tuned with 1 %", "by a linear probe with 100 %") for one in told]
    assert elsewhere == [one.replace("of the labels", "of the labels of transfer 1") for one in linear]
    assert sentences(results, "linear 1 %") == [one.replace("with 100 %", "with 1 %") for one in linear]
    assert sentences(results, "20-nn") == []  # of which no predictions are kept
    text = as_markdown(results)
    assert all(sentence in text for sentence in [*told, *linear, *elsewhere])
    assert "Mean ± deviation of 3 seeds; intervals are of 95 %, over test images and seeds." in text


def test_gains_and_intervals_over_seeds_are_those_of_the_sentences_and_of_scipy(tmp_path):
    given = {"scratch": [0.60, 0.61, 0.59], "supervised": [0.80, 0.82, 0.81], "mae": [0.70, 0.72, 0.77]}
    results = comparison(tmp_path, given)
    by_scratch, by_supervised = (ahead_of(results, base, "fine-tuned 1 %") for base in ("scratch", "supervised"))
    assert (list(by_scratch), list(by_supervised)) == (["supervised", "mae"], ["scratch", "mae"])
    one = by_scratch["mae"]
    assert f"by {one.mean:.1f} points when fine-tuned with 1 % of the labels [{one.low:.1f}, {one.high:.1f}]" in (
        " ".join(sentences(results, "fine-tuned 1 %"))
    )
    there, back = by_scratch["supervised"], by_supervised["scratch"]
    assert (there.mean, there.low, there.high) == (-back.mean, -back.high, -back.low)
    assert by_supervised["mae"].mean == pytest.approx(one.mean - there.mean)
    low, high = stats.t.interval(0.95, 2, np.mean([70, 72, 77]), stats.sem([70, 72, 77]))
    _, rows = interval_table(results, ["20-nn"])
    assert dict(rows)["mae"] == f"73.0 [{low:.1f}, {high:.1f}]"
    assert "Means and their intervals" in as_page(results, {}, [])


def test_one_seed_says_in_every_sentence_that_seeds_were_not_measured(tmp_path):
    results = comparison(tmp_path, {"scratch": [0.6], "mae": [0.8], "mpp-target-pixels": [0.6]})
    told = sentences(results, "fine-tuned 1 %")
    assert [("ahead" in text, "cannot be told apart" in text) for text in told] == [(1, 0), (0, 1), (1, 0)]
    assert all(text.endswith("; seeds were not measured.") for text in told)
    assert "One seed: what another seed would give was not measured" in as_markdown(results)


def test_seeds_that_disagree_make_a_large_difference_uncertain(tmp_path):
    # Ahead by 10 points on average, but by -6, 10 and 26: Student's interval over three seeds holds zero.
    results = comparison(tmp_path, {"scratch": [0.6, 0.6, 0.6], "mae": [0.54, 0.70, 0.86]})
    (told,) = sentences(results, "fine-tuned 1 %")
    assert told.startswith("mae and scratch cannot be told apart")


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_page_stands_alone_and_holds_table_sentences_and_settings(tmp_path, seeds):
    results = comparison(tmp_path, {"scratch": [0.6] * seeds, "mae": [0.8] * seeds})
    html = as_page(results, {}, ["python recipes/mae.py --data x"])
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", html)
    for text in (
        *sentences(results, "fine-tuned 1 %"),
        "Frozen features",
        "Transfer 1",
        "python recipes/mae.py --data x",
    ):
        assert text in html
