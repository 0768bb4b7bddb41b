from __future__ import annotations

import math
import sys

import pytest
from simulated import CONFIG, begin, founders, plans, saved

from evollm.errors import CheckpointError, ConfigurationError, MissingExtraError
from evollm.hpo import HyperparameterConfig, OptunaSearch, Result, RLParameter, SearchPlan


@pytest.mark.parametrize(("sampler", "package"), [("tpe", "optuna"), ("cmaes", "cmaes")])
def test_without_the_extra_its_name_is_told(sampler, package, monkeypatch) -> None:
    if package == "cmaes":
        pytest.importorskip("optuna")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf'sampler=.*{package}: pip install "evollm\[optuna\]"'):
        OptunaSearch(sampler)


def test_another_sampler_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="sampler='nsga': must be one of tpe, cmaes"):
        OptunaSearch("nsga")


def tell(search: OptunaSearch, plan: SearchPlan, *fitnesses: float) -> SearchPlan:
    members = zip(plan.births, fitnesses, strict=True)
    return search.tell([Result(birth.index, (fitness,), birth.hyperparameters, 3) for birth, fitness in members])


def test_the_agent_of_the_best_trial_is_kept_and_the_others_begin_afresh() -> None:
    pytest.importorskip("optuna")
    search = OptunaSearch()
    plan = begin(search, 4)
    assert list(plan.births) == founders(4)
    plan = tell(search, plan, 0.1, 0.9, math.nan, 0.3)
    assert [(birth.index, birth.parent, birth.elite) for birth in plan.births] == [
        (1, 1, True),
        (4, None, False),
        (5, None, False),
        (6, None, False),
    ]
    # 1 has become worse, but its trial was the best; 5 is better than that trial.
    plan = tell(search, plan, 0.2, 0.5, 0.8, 0.3)
    assert (plan.births[0].index, plan.births[0].elite) == (1, False)
    plan = tell(search, plan, 0.2, 0.95, 0.8, 0.3)
    assert plan.births[0].index == 7
    # Once diverged it leaves, whatever its trial was.
    plan = tell(search, plan, math.nan, 0.1, 0.2, 0.3)
    assert plan.births[0].index == 12


def test_optuna_is_told_each_trial_once_and_learns_where_it_is_good() -> None:
    pytest.importorskip("optuna")
    search = OptunaSearch()
    found = list(plans(search, begin(search), range(12)))
    assert len(search._study.trials) == 8 + 12 * 7
    late = [birth.hyperparameters["lr"] for birth in found[-1][0].births[1:]]
    assert sorted(abs(math.log10(lr) + 3) for lr in late)[3] < 0.5
    best = found[-1][0].births[0].hyperparameters["lr"]
    assert abs(math.log10(best) + 3) < 0.15


def test_cma_es_goes_on_from_its_state_and_within_the_bounds() -> None:
    pytest.importorskip("cmaes")
    config = HyperparameterConfig(lr=CONFIG["lr"], beta=RLParameter(0.01, 1.0))
    search = OptunaSearch("cmaes")
    found = list(plans(search, begin(search, 8, config), range(4), nan=0.1))
    values = [birth.hyperparameters for plan, _ in found for birth in plan.births]
    assert all(1e-5 <= one["lr"] <= 1e-2 and 0.01 <= one["beta"] <= 1.0 for one in values)
    resumed = OptunaSearch("cmaes")
    begin(resumed, 8, config)
    resumed.load_state_dict(saved(search))
    results = [Result(birth.index, (0.1 * birth.index,), birth.hyperparameters, 3) for birth in found[-1][0].births]
    assert resumed.tell(results) == search.tell(results)


def test_equal_trials_are_one_agent() -> None:
    pytest.importorskip("optuna")
    search = OptunaSearch()
    config = HyperparameterConfig(loss_type=RLParameter(choices=("sigmoid", "ipo")))
    for plan, _ in plans(search, begin(search, 6, config), range(3)):
        assert len(plan.births) <= 3
    assert len(search._study.trials) == 6 + 3 * 5


def test_a_state_with_other_proposals_is_refused() -> None:
    pytest.importorskip("optuna")
    search = OptunaSearch()
    begin(search)
    state = saved(search)
    state["proposed"][1]["lr"] *= 2
    with pytest.raises(CheckpointError, match="Optuna proposes other values"):
        search.load_state_dict(state)
