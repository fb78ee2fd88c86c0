"""Intervals are scipy's, and sentences say no more than the data supports."""

import numpy as np
import pytest
import torch
from scipy import stats

from sslvit.evaluate.statistics import (
    Difference,
    bootstrap_means,
    difference,
    holm,
    no_difference,
    over_seeds,
    p_value,
    sentence,
    t_quantile,
)


@pytest.mark.parametrize("degrees", [1, 1.5, 2, 4, 9.3, 100, 9999, 1e6])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_quantiles_are_scipys(degrees, level):
    assert t_quantile(level, degrees) == pytest.approx(stats.t.ppf((1 + level) / 2, degrees), rel=1e-3)


def test_the_interval_over_seeds_is_scipys_and_one_seed_has_none():
    values = [0.71, 0.74, 0.69]
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    actual = over_seeds(values)
    assert (actual.low, actual.high) == (pytest.approx(expected[0], rel=1e-4), pytest.approx(expected[1], rel=1e-4))
    assert over_seeds([0.7]) is None


def test_an_interval_over_two_seeds_that_leaves_0_to_100_percent_is_clipped():
    low, high = stats.t.interval(0.95, 1, 0.485, stats.sem([0.4185, 0.5515]))
    assert (low, high) == (pytest.approx(-0.36, abs=0.001), pytest.approx(1.33, abs=0.001))
    assert over_seeds([0.4185, 0.5515])[1:] == (0, 1)
    low, high = stats.t.interval(0.95, 1, 0.97, stats.sem([0.96, 0.98]))
    assert high > 1
    assert over_seeds([0.96, 0.98])[1:] == (pytest.approx(low, rel=1e-4), 1)


def test_a_difference_over_two_seeds_stays_between_minus_100_and_100_points():
    """All images right or all wrong: scipy's paired t-test has an interval far beyond either end."""
    right, wrong = torch.ones(50) > 0, torch.zeros(50) > 0
    half = torch.arange(50) < 25
    assert stats.ttest_rel([1, 1], [0, 0.5]).confidence_interval().high > 1
    actual = difference([right, right], [wrong, half])
    assert (actual.mean, actual.low, actual.high) == (pytest.approx(0.75), -1, 1)
    back = difference([wrong, half], [right, right])
    assert (back.mean, back.low, back.high) == (pytest.approx(-0.75), -1, 1)


def test_with_several_seeds_the_variance_of_images_is_that_of_pairs():
    """By hand: of 100 images the second is right on 50, the first on the same and on 10 more, at each of two seeds. The
    variance of a pair's gap is 0.1 - 0.01, of their mean 0.0009; of unpaired means it would be 0.0049."""
    first, second = torch.arange(100) < 60, torch.arange(100) < 50
    actual = difference([first, first], [second, second])
    reach = stats.norm.ppf(0.975) * 0.03
    assert (actual.low, actual.high) == (pytest.approx(0.1 - reach, abs=1e-6), pytest.approx(0.1 + reach, abs=1e-6))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_with_several_seeds_both_variances_add_and_t_has_satterthwaites_degrees(seeds):
    """Gaps are a row per seed: the variance over images of their mean gap by the number of images, and scipy's standard
    error over seeds; degrees of freedom as in Welch's test, where the images have so many that they do not count."""
    draw = np.random.default_rng(seeds)
    hard = draw.random(400)
    first, second = (
        (0.6 * hard + 0.4 * draw.random((seeds, 400))) < (skill + 0.03 * draw.standard_normal((seeds, 1)))
        for skill in (0.55, 0.45)
    )
    gaps = first.astype(float) - second
    images, luck = np.var(gaps.mean(0)) / 400, stats.sem(gaps.mean(1)) ** 2
    degrees = (seeds - 1) * ((images + luck) / luck) ** 2
    low, high = stats.t.interval(0.95, degrees, gaps.mean(), (images + luck) ** 0.5)
    actual = difference(*([torch.from_numpy(row) for row in side] for side in (first, second)))
    assert (actual.low, actual.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))


def drawn(shares: list[float], images: int = 2000, seed: int = 0) -> list[torch.Tensor]:
    """A seed each, right about these shares of the images; the hard images are the same ones for everybody."""
    draw = torch.Generator().manual_seed(seed)
    hard = torch.rand(images, generator=draw)
    return [0.7 * hard + 0.3 * torch.rand(images, generator=draw) < share for share in shares]


def test_with_one_seed_the_interval_is_scipys_paired_bootstrap():
    first, second = drawn([0.7])[0], drawn([0.6], seed=1)[0]
    actual = difference([first], [second])
    sample = (first.double().numpy(), second.double().numpy())
    oracle = stats.bootstrap(
        sample, lambda a, b, axis: (a - b).mean(axis), paired=True, method="percentile", n_resamples=10_000, rng=0
    ).confidence_interval
    assert actual.mean == pytest.approx((sample[0] - sample[1]).mean())
    assert actual.low == pytest.approx(oracle.low, abs=2e-3)
    assert actual.high == pytest.approx(oracle.high, abs=2e-3)
    error = bootstrap_means(first).std().item()
    assert error == pytest.approx(first.double().std(correction=0).item() / 2000**0.5, rel=0.05)


def test_where_seeds_decide_the_interval_is_the_paired_t_tests():
    """Predictions that differ between seeds as a whole: every image right or every image wrong."""
    shares = [(0.9, 0.5), (0.7, 0.6), (0.8, 0.4), (0.6, 0.2)]
    first, second = ([torch.arange(100_000) % 1000 < 1000 * pair[side] for pair in shares] for side in (0, 1))
    actual = difference(first, second)
    oracle = stats.ttest_rel(*zip(*shares, strict=True)).confidence_interval()
    assert actual.low == pytest.approx(oracle.low, abs=2e-3)
    assert actual.high == pytest.approx(oracle.high, abs=2e-3)


def test_intervals_cover_the_truth_about_as_often_as_their_level():
    covered = []
    for trial in range(200):
        draw = torch.Generator().manual_seed(trial)
        images, seeds = 400, 3
        common = torch.rand(images, generator=draw)  # harder and easier images, drawn anew each time
        luck = 0.03 * torch.randn(2, seeds, 1, generator=draw)
        chance = torch.rand(2, seeds, images, generator=draw)
        skill = torch.tensor([0.55, 0.50])[:, None, None]
        right = (0.5 * common + 0.5 * chance) < skill + luck
        actual = difference(list(right[0]), list(right[1]))
        # The truth: P((u + v) / 2 < s) for uniform u, v is 2 s^2 up to 1/2 and 1 - 2 (1 - s)^2 above.
        truth = (1 - 2 * 0.45**2) - 0.5
        covered.append(actual.low <= truth <= actual.high)
    assert 0.91 <= np.mean(covered) <= 0.995


def test_sentences_claim_known_differences_only_and_say_if_there_is_one_seed():
    ahead, behind, same = drawn([0.70, 0.71, 0.72]), drawn([0.60, 0.61, 0.59], seed=1), drawn([0.7, 0.71, 0.72], seed=2)
    claim = sentence("MoCo v3", "scratch", difference(ahead, behind), "at 1% of the labels")
    assert claim.startswith("MoCo v3 is ahead of scratch, at 1% of the labels: +")
    assert sentence("scratch", "MoCo v3", difference(behind, ahead), "at 1% of the labels") == claim
    assert sentence("MPP", "MAE", difference(ahead, same), "here").startswith(
        "No significant difference between MPP and MAE, here: "
    )
    lone = sentence("MPP", "MAE", difference(ahead[:1], behind[:1]), "here")
    assert lone.endswith("seeds were not measured")
    assert "seeds were not" not in claim
    few = [torch.tensor([True, True, False, True])], [torch.tensor([False, True, False, True])]
    assert "No significant difference between A and B, with 4 images: +25.0" in sentence(
        "A", "B", difference(*few), "with 4 images"
    )


def test_p_values_are_students_and_reject_where_the_interval_leaves_out_zero():
    for mean, error, degrees in ((0.02, 0.01, 2.0), (-0.02, 0.01, 7.5), (0.03, 0.01, 1e9), (0.0, 0.01, 3.0)):
        oracle = 2 * stats.t.sf(abs(mean) / error, degrees)
        assert p_value(mean, error, degrees) == pytest.approx(oracle, rel=1e-4, abs=1e-8)
    assert (p_value(0.1, 0.0, 2.0), p_value(0.0, 0.0, 2.0)) == (0.0, 1.0)
    for seed in range(20):
        first, second = drawn([0.50, 0.51, 0.52], seed=seed), drawn([0.51, 0.52, 0.53], seed=100 + seed)
        gap = difference(first, second)
        assert (gap.p < 0.05) == (gap.low > 0 or gap.high < 0)


def test_holms_correction_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 are 0.02, 0.03, 0.06, 0.04, and none is below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.4]) == pytest.approx([0.8, 0.8])
    assert holm([0.9, 0.8, 0.7]) == [1.0, 1.0, 1.0]
    assert holm([]) == []


def test_a_sentence_by_hand():
    actual = Difference(0.081, 0.069, 0.093, 3)
    expected = "MoCo v3 is ahead of scratch, at 1% of the labels: +8.1 points, 95% CI [6.9, 9.3]"
    assert sentence("MoCo v3", "scratch", actual, "at 1% of the labels") == expected
    behind = Difference(-0.081, -0.093, -0.069, 3)
    assert sentence("scratch", "MoCo v3", behind, "at 1% of the labels") == expected
    open_question = Difference(0.004, -0.011, 0.019, 2)
    expected = "No significant difference between MPP and MAE, here: +0.4 points, 95% CI [-1.1, 1.9]"
    assert sentence("MPP", "MAE", open_question, "here") == expected
    one = Difference(-0.01, -0.03, 0.01, 1)
    assert no_difference([("A", "B", open_question._replace(seeds=1)), ("C", "D", one)], "here") == (
        "No significant difference, here, between A and B (+0.4 points, 95% CI [-1.1, 1.9]), C and D (-1.0 points, "
        "95% CI [-3.0, 1.0]); seeds were not measured"
    )


def test_predictions_of_other_images_do_not_pair_up():
    with pytest.raises(ValueError, match=r"\[10\] and \[9\]"):
        difference([torch.ones(10) > 0], [torch.ones(9) > 0])
