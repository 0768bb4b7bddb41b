from __future__ import annotations

import numpy as np
import pytest

from evollm.errors import ConfigurationError
from evollm.hpo import UNPAIRED_FITNESSES, UnpairedEvaluation
from evollm.hpo.racing_search import terms_of
from evollm.report.statistics import paired_difference, score_interval

RNG = np.random.default_rng(0)


def test_the_auc_of_five_answers() -> None:
    """Desirable 3, 1; undesirable 1, 0, 2: of six pairs 3 > 1, 0, 2 and 1 > 0 are right, 1 and 1 tie: 4.5 / 6."""
    found = UnpairedEvaluation(np.array([3.0, 1, 1, 0, 2]), np.array([1, 1, 0, 0, 0]))
    assert found.auc == pytest.approx(4.5 / 6)
    assert found.mean_margin == pytest.approx(2 - 1)


@pytest.mark.parametrize("shape", [(20, 20), (3, 40), (40, 3), (1, 1)])
def test_terms_have_the_mean_of_the_score_and_delongs_standard_error(shape: tuple[int, int]) -> None:
    high, low = (RNG.integers(-5, 6, size).astype(float) for size in shape)
    high += 1
    ratios, labels = np.concatenate([high, low]), np.repeat([1.0, 0.0], shape)
    order = RNG.permutation(len(ratios))
    found = UnpairedEvaluation(ratios[order], labels[order])
    wins = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    assert found.auc == pytest.approx(wins.mean(), rel=1e-12)
    variance = wins.mean(axis=1).var() / shape[0] + wins.mean(axis=0).var() / shape[1]
    assert found.auc_terms.var() / len(ratios) == pytest.approx(variance, rel=1e-9, abs=1e-15)
    assert found.mean_margin == pytest.approx(high.mean() - low.mean(), rel=1e-9)
    margin = high.var() / shape[0] + low.var() / shape[1]
    assert found.margin_terms.var() / len(ratios) == pytest.approx(margin, rel=1e-9, abs=1e-15)
    assert terms_of(found).tolist() == found.auc_terms.tolist()
    for name, fitness in UNPAIRED_FITNESSES.items():
        assert fitness.terms(found).mean() == pytest.approx(fitness.score(found)) == pytest.approx(found.scores[name])


def test_scores_have_intervals_and_differences() -> None:
    labels = np.tile([1.0, 0.0], 100)
    good = UnpairedEvaluation(RNG.normal(labels, 1.0), labels)
    poor = UnpairedEvaluation(RNG.normal(0.2 * labels, 1.0), labels)
    interval = score_interval(good, "auc")
    assert interval.low < good.auc < interval.high < 0.9
    assert interval.high - interval.low < 0.2
    assert paired_difference(good, poor, "auc").low > 0


def test_scale_and_shift_of_log_ratios_do_not_change_the_auc() -> None:
    labels = np.tile([1.0, 0.0], 30)
    ratios = RNG.normal(labels, 1.0)
    assert UnpairedEvaluation(1e3 * ratios - 7, labels).auc == pytest.approx(UnpairedEvaluation(ratios, labels).auc)


def test_what_has_no_auc() -> None:
    assert UnpairedEvaluation(np.array([1.0, 2.0]), np.ones(2)).scores == {"auc": 0.5, "mean_margin": 0.0}
    assert np.isnan(UnpairedEvaluation(np.array([np.nan, 2.0, 3.0]), np.array([1.0, 0.0, 1.0])).auc)
    infinite = UnpairedEvaluation(np.array([np.inf, 2.0, -np.inf]), np.array([1.0, 0.0, 1.0]))
    assert infinite.auc == 0.5
    with pytest.raises(ConfigurationError, match="desirable"):
        UnpairedEvaluation(np.zeros(2), np.array([1.0, 2.0]))
    with pytest.raises(ConfigurationError, match="shape"):
        UnpairedEvaluation(np.zeros(2), np.zeros(3))
