"""Candidates of finalists as plain data, and the test by which one of them may win."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evollm import ConfigurationError
from evollm.hpo import FinalCandidates, Recipe, final_candidates_of
from evollm.hpo.finalists import COMBINATIONS, Comparison, compare_pairwise, winning_candidate
from evollm.models.adapters import combining


def test_the_names_of_combinations_are_those_of_the_adapters() -> None:
    assert COMBINATIONS == combining.COMBINATIONS


def test_the_recipes_combine_the_best_and_scale_the_very_best() -> None:
    asked = FinalCandidates(finalists=2, combinations=("cat", "ties"), factors=(1.0, 1.5), density=0.3)
    assert asked.recipes([7, 3, 5]) == [
        Recipe((7, 3), "cat", density=0.3),
        Recipe((7, 3), "ties", density=0.3),
        Recipe((7,), factor=1.5),
    ]
    assert asked.recipes([7]) == [Recipe((7,), factor=1.5)]
    assert [str(one) for one in asked.recipes([-1, 3])] == [
        "cat of the best of earlier steps, agent 3",
        "ties of the best of earlier steps, agent 3",
        "the best of earlier steps x 1.5",
    ]


def test_a_candidate_no_better_wins_at_most_as_often_as_the_level_says() -> None:
    rng = np.random.default_rng(0)
    wins = 0
    for _ in range(1000):
        best = rng.normal(size=60)
        comparisons = [compare_pairwise(best + rng.normal(size=60), best) for _ in range(5)]
        wins += winning_candidate(comparisons, 0.1) is not None
    assert 0.02 < wins / 1000 < 0.12


def test_the_better_candidate_wins_and_one_that_is_not_finite_never() -> None:
    rng = np.random.default_rng(0)
    best = rng.normal(size=200)
    better, much = (best + shift + 0.1 * rng.normal(size=200) for shift in (0.1, 0.2))
    broken = np.full(200, np.inf)
    comparisons = [compare_pairwise(one, best) for one in (better, broken, much, best)]
    assert winning_candidate(comparisons, 0.05) == 2
    assert comparisons[3].difference == 0
    assert comparisons[3].p_value == 0.5
    assert winning_candidate([Comparison(1.0, float("nan"))], 0.05) is None
    assert winning_candidate([], 0.05) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cat", "must be true"),
        ({"finalist": 3}, "finalists"),
        ({"finalists": 0}, "merge.finalists"),
        ({"combinations": ["tyes"]}, "mean 'ties'"),
        ({"combinations": "cat"}, "must be a list"),
        ({"factors": [float("nan")]}, "merge.factors"),
        ({"level": 0.5}, "below 0.5"),
        ({"density": 0}, "merge.density"),
        ({"combinations": [], "greedy": False, "factors": []}, "no candidate"),
    ],
)
def test_what_cannot_be_made_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        final_candidates_of(given)


def test_the_ways_to_ask() -> None:
    assert final_candidates_of(None) is None
    assert final_candidates_of(False) is None
    assert final_candidates_of(True) == FinalCandidates()
    asked = FinalCandidates(factors=[2])
    assert final_candidates_of(asked) is asked
    assert final_candidates_of(asked.to_dict()) == asked
