"""Runs of a search without a model: fitnesses are a function of the hyperparameters, with noise and NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from evollm.hpo import STRATEGIES, Birth, HyperparameterConfig, Result, RLParameter, SearchPlan, SearchStart
from evollm.hpo.search_checks import check_plan, check_start

CONFIG = HyperparameterConfig(
    lr=RLParameter(1e-5, 1e-2),
    batch_size=RLParameter(2, 6, dtype=int),
    loss_type=RLParameter(choices=("sigmoid", "ipo", "hinge")),
)
VALUES = {"lr": 1e-4, "batch_size": 4, "loss_type": "ipo", "beta": 0.1, "max_grad_norm": 1.0}
# Packages that a strategy needs.
EXTRAS = {"pb2": "sklearn", "optuna": "optuna"}
NAMES = [
    pytest.param(
        name, marks=pytest.mark.skipif(name in EXTRAS and find_spec(EXTRAS[name]) is None, reason=EXTRAS.get(name, ""))
    )
    for name in STRATEGIES
]


def founders(size: int, config: HyperparameterConfig = CONFIG, seed: int = 0) -> list[Birth]:
    """As `DPO.population` makes them: the first one has the given values."""
    rng = np.random.default_rng(seed)
    drawn = [VALUES, *({**VALUES, **config.sample(rng)} for _ in range(size - 1))]
    return [Birth.fresh(index, values) for index, values in enumerate(drawn)]


def begin(search: Any, size: int = 8, config: HyperparameterConfig | None = CONFIG, interval: int = 3) -> SearchPlan:
    start = SearchStart(founders(size, config or CONFIG), config, interval)
    plan = search.start(start)
    check_start(plan, start)
    return plan


def fitness_of(birth: Birth, decision: int, seed: int, nan: float) -> float:
    """Best near lr=1e-3; NaN with the probability `nan`, but never for the first three indices of a run."""
    rng = np.random.default_rng([seed, birth.index, decision])
    if rng.random() < nan:
        return math.nan
    return -abs(math.log10(birth.hyperparameters["lr"]) + 3) + 0.1 * rng.random()


def told(plan: SearchPlan, before: Sequence[Result], decision: int, seed: int = 0, nan: float = 0.0) -> list[Result]:
    """The results of a plan's members; at least one is finite."""
    steps = {result.index: result.steps for result in before}
    fitnesses = [fitness_of(birth, decision, seed, nan) for birth in plan.births]
    if not any(map(math.isfinite, fitnesses)):
        fitnesses[seed % len(fitnesses)] = -5.0
    return [
        Result(birth.index, (fitness,), birth.hyperparameters, steps.get(birth.parent, 0) + plan.steps)
        for birth, fitness in zip(plan.births, fitnesses, strict=True)
    ]


def plans(search: Any, plan: SearchPlan, decisions: range, before: Sequence[Result] = (), **noise: Any) -> Iterator:
    """Each plan that follows on `plan`, with the results that it was made of, until the search decides no more."""
    used = {birth.index for birth in plan.births} | {result.index for result in before}
    for decision in decisions:
        if plan.steps is None:
            return
        before = told(plan, before, decision, **noise)
        plan = search.tell(before)
        check_plan(plan, before, used)
        used |= {birth.index for birth in plan.births}
        yield plan, before


def saved(search: Any) -> dict[str, Any]:
    """The state of a search, through strict JSON."""
    return json.loads(json.dumps(search.state_dict(), allow_nan=False))
