from __future__ import annotations

import math
import sys

import pytest
from simulated import CONFIG, VALUES, begin, founders, plans

from evollm.errors import ConfigurationError, MissingExtraError
from evollm.hpo import PB2, HyperparameterConfig, Result
from evollm.hpo.guards import BROKEN


def test_without_the_extra_its_name_is_told(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r'search=\'pb2\' needs .*scikit-learn: pip install "evollm\[pb2\]"'):
        PB2()


@pytest.mark.parametrize(("settings", "name"), [({"quantile_fraction": 0.6}, "quantile"), ({"rand_seed": -1}, "seed")])
def test_settings_that_cannot_work_are_refused(settings, name) -> None:
    with pytest.raises(ConfigurationError, match=name):
        PB2(**settings)


def test_the_worst_become_children_of_the_best_and_a_change_is_counted_from_the_parents_fitness() -> None:
    pytest.importorskip("sklearn")
    search = PB2()
    begin(search, 4)
    values = [birth.hyperparameters for birth in founders(4)]
    plan = search.tell([Result(i, (fitness,), values[i], 3) for i, fitness in enumerate((0.1, 0.8, 0.3, math.nan))])
    assert [(birth.index, birth.parent) for birth in plan.births] == [(0, 0), (1, 1), (2, 2), (4, 1)]
    assert search._observed == []
    members = zip(plan.births, (0.2, 0.9, math.nan, 0.5), strict=True)
    search.tell([Result(birth.index, (fitness,), birth.hyperparameters, 6) for birth, fitness in members])
    assert [row[0] for row in search._observed] == [2, 2, 2]
    assert [row[-1] for row in search._observed] == pytest.approx([0.1, 0.1, -0.3])
    assert search._observed[0][1:-1] == [CONFIG[name].fraction_of(VALUES[name]) for name in ("batch_size", "lr")]


def test_children_get_numbers_with_which_the_fitness_has_risen() -> None:
    """Each interval adds more to the fitness the nearer lr is to 1e-3."""
    pytest.importorskip("sklearn")
    config, search = HyperparameterConfig(lr=CONFIG["lr"]), PB2()
    plan, fitnesses, proposed = begin(search, 8, config), dict.fromkeys(range(8), 0.0), []
    for decision in range(1, 13):
        gains = {birth.index: 1 - abs(math.log10(birth.hyperparameters["lr"]) + 3) for birth in plan.births}
        fitnesses = {birth.index: fitnesses[birth.parent or 0] + gains[birth.index] for birth in plan.births}
        members = [Result(one.index, (fitnesses[one.index],), one.hyperparameters, 3 * decision) for one in plan.births]
        plan = search.tell(members)
        proposed += [birth.hyperparameters["lr"] for birth in plan.births if birth.parent != birth.index]
    assert all(abs(math.log10(lr) + 3) < 0.4 for lr in proposed[-6:])


def test_two_children_of_one_decision_are_apart() -> None:
    pytest.importorskip("sklearn")
    config, search = HyperparameterConfig(lr=CONFIG["lr"]), PB2()
    found = [plan for plan, _ in plans(search, begin(search, 8, config), range(4))]
    first, second = (birth.hyperparameters["lr"] for birth in found[-1].births[-2:])
    assert abs(math.log10(first / second)) > 0.02


def test_the_mark_of_a_broken_guard_is_no_observation() -> None:
    pytest.importorskip("sklearn")
    search = PB2()
    plan = begin(search, 4)
    for decision, broken in enumerate((False, True, False, False)):
        fitnesses = [
            (BROKEN, -1.0, 0.5) if broken and not place else (place / 10 + decision / 20,) for place in range(4)
        ]
        members = zip(plan.births, fitnesses, strict=True)
        plan = search.tell([Result(one.index, fitness, one.hyperparameters, 3 * decision) for one, fitness in members])
    assert search._observed
    assert max(abs(row[-1]) for row in search._observed) < 1
