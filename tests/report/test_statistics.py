from __future__ import annotations

import numpy as np
import pytest

from evollm import ConfigurationError
from evollm.hpo import Evaluation, LikelihoodEvaluation
from evollm.report import Interval, paired_difference, score_interval
from evollm.report.statistics import ratio_interval, wilson


def pairs(margins) -> Evaluation:
    return Evaluation(margins, np.zeros(len(margins)))


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # Newcombe 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilsons_interval_is_the_published_one(right, count, low, high) -> None:
    interval = wilson(right / count, count)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_the_interval_of_a_mean_is_the_one_worked_out_by_hand() -> None:
    """1..5: mean 3, variance 2.5, standard error sqrt(2.5 / 5) = 0.70711, times 1.95996 = 1.38590."""
    interval = score_interval(pairs([1.0, 2, 3, 4, 5]), "mean_margin")
    assert (interval.value, interval.low) == (3, pytest.approx(3 - 1.38590, abs=1e-5))
    assert interval.high - interval.value == pytest.approx(interval.value - interval.low)


def test_a_loss_is_over_tokens_and_so_is_its_interval() -> None:
    """Two examples, 1 and 3 tokens, log-probs -1 and -6: loss 7/4; residuals 1 - 7/4 and 6 - 21/4, +-3/4.

    Standard error sqrt(2 * 9/16 * 2/1) / 4 = 0.375.
    """
    interval = score_interval(LikelihoodEvaluation([-1.0, -6.0], [1, 3]), "loss")
    assert interval.value == 1.75
    assert interval.high - 1.75 == pytest.approx(1.959964 * 0.375, abs=1e-6)
    exact = ratio_interval(np.array([2.0, 4.0, 10.0]), np.array([1.0, 2.0, 5.0]))
    assert exact == Interval(2, 2, 2)


def test_a_paired_bootstrap_of_zeros_and_ones_has_the_quantiles_of_the_binomial() -> None:
    """50 of 100 pairs are won: the mean of a draw is Binomial(100, 1/2) / 100, whose quantiles are 40 and 60."""
    first, second = pairs([1.0] * 100), pairs([1.0, -1.0] * 50)
    difference = paired_difference(first, second, "accuracy")
    assert difference == Interval(0.5, pytest.approx(0.4, abs=0.011), pytest.approx(0.6, abs=0.011))
    assert not difference.includes_zero


def test_pairing_cancels_what_makes_a_pair_hard() -> None:
    hard = np.random.default_rng(0).normal(0, 100, 50)
    difference = paired_difference(pairs(hard + 1), pairs(hard), "mean_margin")
    assert (difference.value, difference.low, difference.high) == pytest.approx((1, 1, 1))
    assert paired_difference(pairs(hard), pairs(hard), "accuracy") == Interval(0, 0, 0)
    assert paired_difference(pairs(hard), pairs(hard), "accuracy").includes_zero


def test_a_difference_of_losses_is_over_tokens() -> None:
    tokens = np.array([1, 3, 10] * 2)
    first, second = (LikelihoodEvaluation(-per_token * tokens, tokens) for per_token in (1.5, 2.5))
    difference = paired_difference(first, second, "loss")
    assert (difference.value, difference.low, difference.high) == pytest.approx((-1, -1, -1))
    third = LikelihoodEvaluation([-1.0, -2, -3] * 2, tokens)
    assert paired_difference(third, second, "loss").value == pytest.approx(third.loss - second.loss)


def test_too_few_pairs_have_no_interval_even_if_all_agree() -> None:
    assert not paired_difference(pairs(np.ones(5)), pairs(np.zeros(5)), "accuracy").is_finite
    assert paired_difference(pairs(np.ones(6)), pairs(np.zeros(6)), "accuracy") == Interval(0.5, 0.5, 0.5)


def test_the_bootstrap_covers_what_it_promises() -> None:
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        interval = paired_difference(pairs(rng.normal(0.3, 1, 60)), pairs(np.zeros(60)), "mean_margin", resamples=500)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.9 <= covered / 200 <= 0.985


def test_the_same_seed_gives_the_same_interval() -> None:
    rng = np.random.default_rng(2)
    first, second = pairs(rng.normal(size=30)), pairs(rng.normal(size=30))
    found = [paired_difference(first, second, "mean_margin", seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_an_untuned_model_ties_whatever_the_pairs() -> None:
    assert score_interval(pairs(np.zeros(8)), "accuracy") == Interval(0.5, 0.5, 0.5)


def test_what_is_not_finite_has_no_interval_and_decides_nothing() -> None:
    broken = pairs([1.0, np.nan, np.inf])
    for score in ("accuracy", "mean_margin"):
        for interval in (score_interval(broken, score), paired_difference(broken, pairs(np.ones(3)), score)):
            assert not interval.is_finite
            assert interval.includes_zero
    assert not score_interval(pairs([3.0]), "mean_margin").is_finite


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="same 3 rows"):
        paired_difference(pairs(np.ones(3)), pairs(np.ones(2)), "accuracy")
    with pytest.raises(ConfigurationError, match="kind of Evaluation"):
        paired_difference(pairs(np.ones(3)), LikelihoodEvaluation(np.ones(3), np.ones(3)), "accuracy")
    with pytest.raises(ConfigurationError, match="score='loss'"):
        score_interval(pairs(np.ones(3)), "loss")
