from __future__ import annotations

import math

import numpy as np
import pytest

from evollm.errors import ConfigurationError
from evollm.hpo import (
    LIKELIHOOD_FITNESSES,
    PREFERENCE_FITNESSES,
    Evaluation,
    LikelihoodEvaluation,
    best_temperature,
    fitness_named,
    log_loss_terms,
    margin_over_std,
    margin_over_std_terms,
    preference_fitness,
    rank,
    scale_free_log_loss,
)

LOG_2 = math.log(2)
RNG = np.random.default_rng(0)
# Margins of many shapes: noisy, skewed, with outliers, tiny, huge, with ties, few.
MARGINS = [
    RNG.normal(0.3, 1.0, 128),
    RNG.exponential(2.0, 100) - 1,
    RNG.standard_t(2, 300),
    RNG.normal(0.1, 1.0, 37) * 1e-160,
    RNG.normal(0.1, 1.0, 37) * 1e160,
    RNG.integers(-2, 4, 50).astype(float),
    RNG.normal(size=3),
]


def evaluation(margins: np.ndarray) -> Evaluation:
    return Evaluation(margins, np.zeros(len(margins)))


def test_margin_over_std_of_four_pairs() -> None:
    """Margins -1, 2, 0, 1: mean 0.5, variance (1.5^2 + 1.5^2 + 0.5^2 + 0.5^2) / 4 = 1.25."""
    assert margin_over_std(np.array([-1.0, 2.0, 0.0, 1.0])) == pytest.approx(0.5 / math.sqrt(1.25), rel=1e-12)


def test_the_best_temperature_of_three_right_and_one_wrong_pair_gives_odds_of_three() -> None:
    """Margins 2, 2, 2, -2: the loss is smallest where sigmoid(2 t) = 3/4, so t = log(3) / 2."""
    margins = np.array([2.0, 2.0, 2.0, -2.0])
    assert best_temperature(margins) == pytest.approx(math.log(3) / 2, rel=1e-12)


def test_each_pair_has_the_temperature_of_the_others() -> None:
    """Three folds of one pair, margins 1, 1, -1: others (1, -1) have t = 0, others (1, 1) have t at its bound of 10."""
    terms = log_loss_terms(np.array([1.0, 1.0, -1.0]), folds=3)
    assert terms.tolist() == pytest.approx([LOG_2, LOG_2, math.log1p(math.exp(10.0))], rel=1e-12)


def test_folds_go_by_the_position_of_the_pair() -> None:
    """Two folds of margins 1, 2, -1, 2: pairs 1 and 3 (1, -1) have t = 0, so pairs 2 and 4 cost log 2 each."""
    terms = log_loss_terms(np.array([1.0, 2.0, -1.0, 2.0]), folds=2)
    assert terms[[1, 3]].tolist() == [LOG_2, LOG_2]
    # The others, (2, 2), are always right: t is at its bound, 10 / 2.
    assert terms[[0, 2]].tolist() == pytest.approx([math.log1p(math.exp(-5.0)), math.log1p(math.exp(5.0))], rel=1e-12)


@pytest.mark.parametrize("margins", MARGINS)
@pytest.mark.parametrize("factor", [2.0, 1e-3, 0.037, 123.4])
@pytest.mark.parametrize("name", ["accuracy", "log_loss", "margin_over_std"])
def test_scale_free_scores_do_not_change_when_all_margins_are_stretched(
    margins: np.ndarray, factor: float, name: str
) -> None:
    fitness = PREFERENCE_FITNESSES[name]
    stretched = fitness(evaluation(margins * factor))
    assert stretched == pytest.approx(fitness(evaluation(margins)), rel=1e-9, abs=0)


@pytest.mark.parametrize("margins", MARGINS)
@pytest.mark.parametrize("name", PREFERENCE_FITNESSES)
def test_the_terms_of_the_pairs_average_to_the_score(margins: np.ndarray, name: str) -> None:
    fitness = PREFERENCE_FITNESSES[name]
    terms = fitness.terms(evaluation(margins))
    assert terms.shape == margins.shape
    assert terms.mean() == pytest.approx(fitness(evaluation(margins))[0], rel=1e-9, abs=0)


def test_the_terms_of_the_loss_average_to_the_loss_per_token() -> None:
    """Log-probs -6 and -2 of 2 and 6 tokens: 8 / 8 = 1 nat per token; terms 1 + (6 - 2) / 4 and 1 + (2 - 6) / 4."""
    measured = LikelihoodEvaluation(np.array([-6.0, -2.0]), np.array([2.0, 6.0]))
    fitness = LIKELIHOOD_FITNESSES["loss"]
    assert fitness(measured) == (-1.0,)
    assert fitness.terms(measured).tolist() == [-2.0, 0.0]


def test_the_spread_of_the_terms_is_the_sampling_error_of_mean_over_std() -> None:
    """Drawn again and again, the score varies as its terms say, which a fixed denominator would not tell."""
    rng = np.random.default_rng(1)
    draws = rng.normal(2.0, 1.0, (2000, 400))
    scores = [margin_over_std(draw) for draw in draws]
    errors = [margin_over_std_terms(draw).std() / math.sqrt(400) for draw in draws[:50]]
    assert np.mean(errors) == pytest.approx(np.std(scores), rel=0.1)
    fixed = [(draw / draw.std()).std() / math.sqrt(400) for draw in draws[:50]]
    assert np.mean(fixed) != pytest.approx(np.std(scores), rel=0.1)


@pytest.mark.parametrize("margins", MARGINS)
def test_the_smallest_log_loss_is_found(margins: np.ndarray) -> None:
    margins = margins / np.abs(margins).max()

    def loss(t: float) -> float:
        return float(np.logaddexp(0, -t * margins).mean())

    found = best_temperature(margins)
    bound = 10 / math.sqrt(np.square(margins).mean())
    assert 0 <= found <= bound * (1 + 1e-12)
    assert loss(found) <= min(loss(t) for t in np.linspace(0, bound, 5001)) + 1e-12


@pytest.mark.parametrize("margins", MARGINS[:3])
def test_a_larger_margin_of_a_pair_never_costs_accuracy_or_fitted_log_loss(margins: np.ndarray) -> None:
    def fitted(values: np.ndarray) -> float:
        return float(np.logaddexp(0, -best_temperature(values) * values).mean())

    for pair in range(0, len(margins), 17):
        better = margins.copy()
        better[pair] += 0.5
        assert evaluation(better).accuracy >= evaluation(margins).accuracy
        assert fitted(better) <= fitted(margins) + 1e-12


def test_a_shift_of_all_margins_upwards_raises_every_score() -> None:
    margins = RNG.normal(0.2, 1.0, 200)
    for name, fitness in PREFERENCE_FITNESSES.items():
        scores = [fitness(evaluation(margins + shift))[0] for shift in (0.0, 0.2, 0.4, 0.8)]
        assert scores == sorted(scores), name
        assert scores[0] < scores[-1], name


def test_margins_that_say_nothing_cost_log_2() -> None:
    for margins in (np.zeros(20), -np.ones(20), np.array([3.0]), np.array([-3.0])):
        assert scale_free_log_loss(margins) == LOG_2
    noise = np.random.default_rng(2).normal(size=5000)
    assert scale_free_log_loss(noise) == pytest.approx(LOG_2, abs=2e-3)


@pytest.mark.parametrize(
    ("margins", "ratio"),
    [([0.0], 0.0), ([0.0] * 5, 0.0), ([2.0], 1e6), ([-2.0], -1e6), ([0.1] * 3, 1e6), ([-0.1] * 7, -1e6)],
)
def test_equal_margins_have_a_finite_ratio(margins: list[float], ratio: float) -> None:
    found = np.array(margins)
    assert margin_over_std(found) == ratio
    assert margin_over_std_terms(found).tolist() == [ratio] * len(margins)
    assert math.isfinite(scale_free_log_loss(found))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_diverged_agent_is_the_worst_by_every_name(bad: float) -> None:
    diverged, other = evaluation(np.array([1.0, bad, 2.0])), evaluation(np.array([-1.0, -3.0, -2.0]))
    for name in ("log_loss", "margin_over_std", "mean_margin"):
        fitness = PREFERENCE_FITNESSES[name]
        assert rank([fitness(diverged), fitness(other)]) == [1, 0], name
    assert np.isnan(log_loss_terms(diverged.margins)).all()
    assert np.isnan(margin_over_std_terms(diverged.margins)).all()


def test_scale_free_scores_prefer_the_agent_that_is_right_to_the_one_that_has_drifted() -> None:
    """The same accuracy: the one with margins ten times as large wins by the old tie-break, and by no other score."""
    right = evaluation(np.array([1.0, 1.0, 1.0, 1.0, -0.1] * 10))
    drifted = evaluation(np.array([10.0, 10.0, 10.0, 10.0, -35.0] * 10))
    for name, winner in {"accuracy": 0, "log_loss": 0, "margin_over_std": 0, "accuracy_mean_margin": 1}.items():
        fitness = PREFERENCE_FITNESSES[name]
        assert rank([fitness(right), fitness(drifted)])[0] == winner, name
    assert preference_fitness(right)[0] == preference_fitness(drifted)[0]


def test_an_unknown_name_gets_the_nearest() -> None:
    assert fitness_named("log_loss", PREFERENCE_FITNESSES) is PREFERENCE_FITNESSES["log_loss"]
    with pytest.raises(ConfigurationError, match=r"fitness='logloss'.*nearest is 'log_loss'"):
        fitness_named("logloss", PREFERENCE_FITNESSES)
    with pytest.raises(ConfigurationError, match=r"nearest is 'loss'.*known are loss"):
        fitness_named("accuracy", LIKELIHOOD_FITNESSES)
