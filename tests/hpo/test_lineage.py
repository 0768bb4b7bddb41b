from __future__ import annotations

import json
import math

import pytest

from evollm.errors import ConfigurationError
from evollm.hpo import Birth, EvolutionPlan, Mutation, ancestry

GROWN = Mutation("lr", 1e-5, 1.2e-5, 1.2)
SHRUNK = Mutation("beta", 0.1, 0.08, 0.8)

FIRST = EvolutionPlan(
    generation=0,
    elite=1,
    fitnesses={0: (0.5, math.nan), 1: (0.9, 1.0), 2: (-math.inf, math.inf)},
    births=(
        Birth(1, 1, (), True, {"lr": 2e-5, "beta": 0.2}),
        Birth(3, 0, (GROWN,), False, {"lr": 1.2e-5, "beta": 0.1}),
        Birth(4, 1, (), False, {"lr": 2e-5, "beta": 0.2}),
    ),
)
SECOND = EvolutionPlan(
    generation=1,
    elite=1,
    fitnesses={1: (0.9, 1.1), 3: (0.8, 1.0), 4: (0.5, 0.0)},
    births=(
        Birth(1, 1, (), True, {"lr": 2e-5, "beta": 0.2}),
        Birth(5, 3, (SHRUNK,), False, {"lr": 1.2e-5, "beta": 0.08}),
        Birth(6, 3, (), False, {"lr": 1.2e-5, "beta": 0.1}),
    ),
)


def test_a_plan_comes_back_from_strict_json() -> None:
    assert EvolutionPlan.from_dict(json.loads(json.dumps(SECOND.to_dict(), allow_nan=False))) == SECOND


def test_numbers_that_are_not_finite_come_back_from_strict_json() -> None:
    read = EvolutionPlan.from_dict(json.loads(json.dumps(FIRST.to_dict(), allow_nan=False)))
    assert read.fitnesses[0][0] == 0.5
    assert math.isnan(read.fitnesses[0][1])
    assert read.fitnesses[2] == (-math.inf, math.inf)
    assert read.births == FIRST.births
    assert read.to_dict() == FIRST.to_dict()


def test_integers_and_a_founder_come_back_as_they_were() -> None:
    founder = Birth(0, None, (Mutation("batch", 4, 5, 1.25),), False, {"batch": 5, "lr": math.nan})
    read = Birth.from_dict(json.loads(json.dumps(founder.to_dict(), allow_nan=False)))
    assert read.parent is None
    assert read.mutations == founder.mutations
    assert type(read.hyperparameters["batch"]) is int
    assert math.isnan(read.hyperparameters["lr"])


def test_the_ancestry_is_the_schedule_of_hyperparameters_from_the_founder() -> None:
    line = ancestry([FIRST, SECOND], 5)
    assert [(birth.index, birth.parent) for birth in line] == [(0, None), (3, 0), (5, 3)]
    assert [dict(birth.hyperparameters) for birth in line] == [
        {"lr": 1e-5, "beta": 0.1},
        {"lr": 1.2e-5, "beta": 0.1},
        {"lr": 1.2e-5, "beta": 0.08},
    ]


def test_a_kept_elite_appears_once_for_every_generation() -> None:
    assert [(birth.index, birth.parent) for birth in ancestry([FIRST, SECOND], 1)] == [(1, None), (1, 1), (1, 1)]


def test_an_agent_that_left_has_an_ancestry_too() -> None:
    assert [birth.index for birth in ancestry([FIRST, SECOND], 4)] == [1, 4]
    assert ancestry([FIRST, SECOND], 0) == [Birth(0, None, (), False, {"lr": 1e-5, "beta": 0.1})]


def test_a_run_that_never_evolved_has_no_lineage() -> None:
    assert ancestry([], 0) == []


def test_an_agent_that_is_not_in_the_lineage_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"index=9.*1, 3, 4, 1, 5, 6"):
        ancestry([FIRST, SECOND], 9)
