"""What a report says about accuracy as fine-tuning goes on, by hand."""

import pytest

from sslvit.experiments import learning
from sslvit.experiments.report import figure

RESULTS = {
    "methods": ["scratch (mean)", "scratch (cls)", "MPP", "DINO"],
    "readouts": {"scratch (mean)": "mean", "scratch (cls)": "cls", "MPP": "mean", "DINO": "cls"},
    "curves": {
        "fine-tuned 10 %": {
            "scratch (mean)": [[[250, 0.3], [1000, 0.5], [4000, 0.60]], [[250, 0.3], [1000, 0.5], [4000, 0.64]]],
            "MPP": [[[250, 0.4], [1000, 0.6], [4000, 0.64]], [[250, 0.4], [1000, 0.6], [4000, 0.64]]],
            "scratch (cls)": [[[250, 0.3], [1000, 0.5], [4000, 0.60]], [[250, 0.3], [1000, 0.5], [4000, 0.60]]],
            "DINO": [[[250, 0.2], [1000, 0.5], [4000, 0.59]], [[250, 0.2], [1000, 0.5], [4000, 0.59]]],
        }
    },
}


def test_the_steps_to_an_accuracy_are_read_on_a_logarithmic_axis():
    curve = [(100, 0.2), (400, 0.4), (1600, 0.5)]
    assert learning.reaches(curve, 0.3) == pytest.approx(200)  # halfway between 100 and 400
    assert learning.reaches(curve, 0.4) == pytest.approx(400)
    assert learning.reaches(curve, 0.1) == 100
    assert learning.reaches(curve, 0.51) is None
    assert learning.reaches([(100, 0.3), (200, 0.2), (400, 0.4)], 0.35) == pytest.approx(400 * 2**-0.25)


def test_a_sentence_says_where_scratch_ends_and_when_each_method_is_there():
    mean, cls = learning.sentences(RESULTS, "fine-tuned 10 %")
    # MPP's 62% lies halfway from 60% at 1,000 to 64% at 4,000 steps.
    assert mean == (
        "Fine-tuned on 10% of the labels, scratch (mean) ends at 62.0%, after 4,000 steps. "
        "MPP is as high after about 2,000 steps (by seed 1,000, 4,000)."
    )
    assert cls == (
        "Fine-tuned on 10% of the labels, scratch (cls) ends at 60.0%, after 4,000 steps. Never as high: DINO."
    )


def test_the_table_has_the_means_over_seeds_in_the_order_of_the_methods():
    head, rows = learning.table(RESULTS, "fine-tuned 10 %")
    assert head == ["fine-tuned 10%, % after steps", "250", "1,000", "4,000"]
    assert rows[0] == ["scratch (mean)", "30.0", "50.0", "62.0"]
    assert [row[0] for row in rows] == RESULTS["methods"]
    assert "MPP" in learning.chart(RESULTS, "fine-tuned 10 %")


def test_rates_that_were_chosen_are_told():
    rates = {"fine-tuned 10 %": {"scratch (mean)": [0.1, 0.3], "MPP": [0.03, 0.03]}}
    assert learning.tried(RESULTS | {"rates": rates, "settings": {"finetune_rates": [0.03, 0.3]}}) == [
        "Learning rates of fine-tuning, chosen on held-out training labels. 10%: scratch (mean) 0.1 and 0.3, MPP 0.03."
    ]
    assert learning.tried(RESULTS) == []


def test_a_rate_at_the_end_of_three_or_more_candidates_is_told():
    rates = {"fine-tuned 10 %": {"scratch (mean)": [0.1, 0.1], "MPP": [0.1, 0.03]}}
    told = learning.tried(RESULTS | {"rates": rates, "settings": {"finetune_rates": [0.03, 0.1, 0.3]}})
    assert told[0].endswith("The lowest or the highest candidate was the best at least once for MPP.")


def test_with_several_seeds_the_steps_of_each_are_told():
    curves = {
        "scratch (mean)": [[[10, 0.1], [100, 0.4]], [[10, 0.1], [100, 0.2]]],
        "MPP": [[[10, 0.3], [100, 0.5]], [[10, 0.1], [100, 0.15]]],
    }
    results = RESULTS | {"curves": {"fine-tuned 10 %": curves}}
    (told,) = learning.sentences(results, "fine-tuned 10 %")
    # By seed: halfway from 30% to 50%, and never; of the means, 30% lies at 0.1 / 0.125 of the way from 20% to 32.5%.
    assert told.endswith("MPP is as high after about 63 steps (by seed 32, never).")


def test_results_of_an_earlier_version_have_no_curves():
    assert learning.columns_of({"curves": {}}) == learning.columns_of({}) == []


def test_the_figure_is_that_of_the_largest_share_of_the_labels():
    few = {"fine-tuned 1 %": {"MPP": [[[10, 0.1], [20, 0.2]]]}}
    results = RESULTS | {"curves": few | RESULTS["curves"]}
    assert all(text in figure(results) for text in ("scratch (cls)", "4,000"))
    assert figure({"curves": {}}) == ""
