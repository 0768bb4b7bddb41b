from __future__ import annotations

import math

import numpy as np
import pytest
from simulated import CONFIG, VALUES, begin, founders, plans

from evollm.errors import ConfigurationError
from evollm.hpo import PopulationBasedTraining, Result, SearchPlan
from evollm.hpo.population_based_training import explore, quantiles


def results(*fitnesses: float) -> list[Result]:
    values = [birth.hyperparameters for birth in founders(len(fitnesses))]
    return [Result(i, (fitness,), values[i], 3) for i, fitness in enumerate(fitnesses)]


def tell(*fitnesses: float, **settings: float) -> SearchPlan:
    search = PopulationBasedTraining(**settings)
    begin(search, len(fitnesses))
    return search.tell(results(*fitnesses))


def test_the_worst_quarter_becomes_children_of_the_best_quarter() -> None:
    plan = tell(0.1, 0.8, 0.3, 0.4, 0.9, 0.6, 0.7, 0.2)
    assert [birth.index for birth in plan.births] == [1, 2, 3, 4, 5, 6, 8, 9]
    assert {birth.parent for birth in plan.births[6:]} <= {1, 4}
    assert [birth.index for birth in plan.births if birth.elite] == [4]
    assert plan.steps == 3


def test_all_values_of_a_child_change_and_nothing_else_does() -> None:
    child = tell(0.1, 0.8, 0.3, 0.4, resample_probability=0.0).births[-1]
    parent = founders(4)[1].hyperparameters
    assert {mutation.name for mutation in child.mutations} == {"lr", "batch_size", "loss_type"}
    assert child.hyperparameters["lr"] / parent["lr"] in (pytest.approx(0.8), pytest.approx(1.2))
    assert child.hyperparameters["max_grad_norm"] == VALUES["max_grad_norm"]


def test_values_are_drawn_anew_as_often_as_asked() -> None:
    rng, factors = np.random.default_rng(0), []
    for _ in range(400):
        factors.append(round(explore(VALUES, CONFIG, 0.25, rng)["lr"] / VALUES["lr"], 6))
    assert sum(factor not in (0.8, 1.2) for factor in factors) / 400 == pytest.approx(0.25, abs=0.06)


def test_diverged_members_are_replaced_too_and_are_no_parents() -> None:
    plan = tell(math.nan, 0.8, math.nan, 0.4, math.inf, 0.6)
    assert [birth.index for birth in plan.births] == [1, 3, 5, 6, 7, 8]
    assert {birth.parent for birth in plan.births[3:]} == {1}


def test_the_quantiles_are_disjoint_at_any_size() -> None:
    for size in range(2, 10):
        for share in (0.01, 0.25, 0.5):
            parents, leaving = quantiles(results(*np.linspace(0, 1, size)), share)
            assert not {one.index for one in parents} & leaving
            assert len(parents) == len(leaving) == max(1, int(size * share))


def test_a_search_ends_near_the_best_value() -> None:
    search = PopulationBasedTraining()
    *_, (plan, _) = plans(search, begin(search), range(40))
    best = next(birth for birth in plan.births if birth.elite)
    assert abs(math.log10(best.hyperparameters["lr"]) + 3) < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantile_fraction": 0.6}, r"quantile_fraction=0\.6"),
        ({"quantile_fraction": 0}, "quantile_fraction=0"),
        ({"resample_probability": 1.5}, r"resample_probability=1\.5"),
        ({"rand_seed": -1}, "rand_seed=-1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PopulationBasedTraining(**settings)
