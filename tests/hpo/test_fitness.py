from __future__ import annotations

import math

import numpy as np
import pytest

from evollm.errors import ConfigurationError
from evollm.hpo import Evaluation, as_fitness, is_finite, preference_fitness, rank

INF, NAN = math.inf, math.nan


def evaluation(margins: list[float]) -> Evaluation:
    return Evaluation(np.array(margins), np.zeros(len(margins)))


def test_accuracy_is_the_share_of_positive_margins_and_a_tie_counts_half() -> None:
    """Margins 1-2, 3-1, 0-0, 2-1 = -1, 2, 0, 1: accuracy (0 + 1 + 0.5 + 1) / 4, mean (-1 + 2 + 0 + 1) / 4."""
    measured = Evaluation(np.array([1.0, 3.0, 0.0, 2.0]), np.array([2.0, 1.0, 0.0, 1.0]))
    assert measured.margins.tolist() == [-1.0, 2.0, 0.0, 1.0]
    assert preference_fitness(measured) == (0.625, 0.5)


def test_an_untuned_model_has_half_the_accuracy() -> None:
    assert evaluation([0.0] * 7).accuracy == 0.5


def test_one_nan_margin_makes_the_whole_fitness_nan() -> None:
    accuracy, margin = preference_fitness(evaluation([1.0, NAN, 2.0]))
    assert math.isnan(accuracy)
    assert math.isnan(margin)


@pytest.mark.filterwarnings("error")
def test_a_diverged_agent_is_measured_without_a_warning() -> None:
    both = Evaluation(np.array([INF, 1.0]), np.array([INF, 0.0]))
    assert math.isnan(both.accuracy)
    assert not is_finite(preference_fitness(evaluation([INF, -INF])))
    assert not is_finite(preference_fitness(evaluation([-INF, 1.0])))


def test_an_evaluation_keeps_its_own_numbers() -> None:
    chosen = np.ones(2)
    measured = Evaluation(chosen, [0.0, 0.0])  # type: ignore[arg-type]
    chosen[:] = -1
    assert measured.accuracy == 1.0
    assert Evaluation(np.ones(2, dtype=np.float32), chosen).margins.dtype == np.float64  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read-only"):
        measured.chosen_logratios[0] = 5.0


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        ([], [], r"chosen_logratios.shape=\(0,\).*n >= 1"),
        ([1.0, 2.0], [1.0], r"chosen_logratios.shape=\(2,\).*\(1,\)"),
        ([[1.0]], [[1.0]], r"chosen_logratios.shape=\(1, 1\)"),
    ],
)
def test_an_evaluation_of_no_pairs_or_unequal_sides_is_refused(chosen: list, rejected: list, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Evaluation(np.array(chosen), np.array(rejected))


@pytest.mark.parametrize(
    ("value", "fitness"),
    [
        (0.5, (0.5,)),
        (1, (1.0,)),
        (np.float32(0.5), (0.5,)),
        (np.array(0.25), (0.25,)),
        ((0.5, np.float64(2.0), np.array(3)), (0.5, 2.0, 3.0)),
        (-INF, (-INF,)),
    ],
)
def test_a_callable_may_return_a_number_or_a_tuple_of_them(value: object, fitness: tuple[float, ...]) -> None:
    made = as_fitness(value)
    assert made == fitness
    assert {type(component) for component in made} == {float}


@pytest.mark.parametrize("value", [None, "0.5", (), [0.5], np.array([0.5]), (0.5, None), True, 1j, {"accuracy": 0.5}])
def test_a_callable_that_returns_something_else_is_refused(value: object) -> None:
    with pytest.raises(ConfigurationError, match="fitness="):
        as_fitness(value)


def test_the_margin_only_breaks_ties_of_the_accuracy() -> None:
    assert rank([(0.7, 99.0), (0.8, 0.1), (0.8, 0.2)]) == [2, 1, 0]


def test_equals_keep_their_order() -> None:
    assert rank([(0.5,), (0.9,), (0.5,), (0.9,)]) == [1, 3, 0, 2]


@pytest.mark.parametrize("bad", [(NAN, 1.0), (INF, INF), (0.9, INF), (0.9, NAN), (-INF, 0.0)])
def test_a_fitness_that_is_not_finite_is_the_worst_wherever_it_stands(bad: tuple[float, ...]) -> None:
    worst = (-1e300, -1e300)
    assert rank([bad, worst, (0.5, 0.0)]) == [2, 1, 0]
    assert rank([(0.5, 0.0), worst, bad]) == [0, 1, 2]
