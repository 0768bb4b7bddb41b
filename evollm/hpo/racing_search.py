"""Racing: founders are stopped at rungs, early ones on few rows, so that a search costs about two runs.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943) with what recorded searches on real pairs have shown
to pay (docs/search.md): few founders that are spread over the bounds, a first rung only after a quarter of the run, and
comparisons on a part of the selection rows that grows from rung to rung. Members that a paired test shows to be worse
(Maron and Moore 1994) leave even where there is a place for them. Heirs, children of the best member with mutated
hyperparameters, may take places that become free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from evollm.checks import finite_number, optional_whole_number, whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.fitness import AnyEvaluation, FloatArray
from evollm.hpo.hyperparameters import HyperparameterConfig, Value
from evollm.hpo.lineage import Birth
from evollm.hpo.racing import survivors
from evollm.hpo.scores import raced
from evollm.hpo.search import (
    Result,
    SearchBudget,
    SearchPlan,
    SearchStart,
    best_first,
    distinct_child,
    generator_of,
    reading_state,
    require_config,
)

# Of a race without a `budget`.
REDUCTION_FACTOR = 3


@dataclass
class Racing:
    """An `evollm.hpo.Search` that stops what loses, on a growing part of the selection rows.

    Rungs are after `evo_steps`, twice, four times ... as many steps. At each rung the best 1 / `reduction_factor` go
    on, rounded up, and the last one is trained to the end.

    Args:
        reduction_factor: What the number of members is divided by at a rung, at least 2. None: 3, or with a `budget`
            the smallest with which the race fits and two go on at the first rung. Founders that do not fit leave at
            once; those that stay are spread over the bounds. Where not even two fit, the first one trains alone.
        first_rows: Selection rows that members are compared on at the first rung, twice as many at each further one;
            None: always all.
        error_rate: Largest probability that a rung's best member is taken for worse by the paired test, in [0, 0.5);
            0: no test, so that only places decide.
        heirs: Children of the best member that begin at each rung but the last, if so many places have become free.
            They cost as much as whoever else goes on, and may be several at the end.
        rand_seed: Seed of the mutations of heirs.

    Raises:
        ConfigurationError: A number is outside its range or not an integer.
    """

    reduction_factor: int | None = None
    first_rows: int | None = 64
    error_rate: float = 0.05
    heirs: int = 0
    rand_seed: int = 42

    plans_evaluations: ClassVar[bool] = True
    # Of `tune`: the first rung after a quarter of the run.
    generations: ClassVar[int] = 4

    def __post_init__(self) -> None:
        self.reduction_factor = optional_whole_number("reduction_factor", self.reduction_factor, 2)
        self.first_rows = optional_whole_number("first_rows", self.first_rows, 1)
        self.error_rate = finite_number("error_rate", self.error_rate)
        if not 0 <= self.error_rate < 0.5:  # noqa: PLR2004
            raise ConfigurationError("error_rate", self.error_rate, "must be at least 0 and below 0.5")
        self.heirs = whole_number("heirs", self.heirs, 0)
        self.rand_seed = whole_number("rand_seed", self.rand_seed, 0)

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin with the founders, unchanged, or with as many of them as the budget allows.

        Raises:
            ConfigurationError: There is only one founder, or heirs have no hyperparameter that may change.
        """
        if len(start.founders) == 1:
            raise ConfigurationError("search", self, "there is one agent: give several to choose from")
        self._config = require_config(start.hp_config, "an heir has nothing to mutate") if self.heirs else None
        self._interval, self._rows, self._rung = start.interval, start.rows, 0
        self._rng = np.random.default_rng(self.rand_seed)
        self._next_index = start.next_index
        founders, self._factor = self._affordable(start)
        if len(founders) == 1:
            return SearchPlan(founders, None)
        return SearchPlan(founders, self._interval, self._rows_at(0))

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Let the best members go on; diverged members always leave.

        Raises:
            DivergedError: No member has a finite fitness.
        """
        finite = best_first(results)
        kept = finite[: -(-len(results) // self._factor)]
        kept = [result for result in kept if result is kept[0] or not self._is_worse(result, kept[0], len(kept))]
        births = [result.kept(elite=result is kept[0]) for result in results if result in kept]
        self._rung += 1
        if len(births) == 1:
            return SearchPlan(tuple(births), None)
        births += self._children(kept[0], min(self.heirs, len(results) - len(births)), births, results)
        return SearchPlan(tuple(births), self._interval * 2 ** (self._rung - 1), self._rows_at(self._rung))

    def _rows_at(self, rung: int) -> int | None:
        """Selection rows of a rung; None: all."""
        rows = None if self.first_rows is None else self.first_rows * 2**rung
        return None if rows is None or rows >= self._rows else rows

    def _is_worse(self, result: Result, best: Result, count: int) -> bool:
        """Whether the paired test shows a member to be worse than the best one."""
        if not self.error_rate or result.evaluation is None or best.evaluation is None:
            return False
        terms = np.stack([terms_of(best.evaluation), terms_of(result.evaluation)])
        return not survivors(terms, rows=terms.shape[1], error_rate=self.error_rate, members=count)[1]

    def _children(self, parent: Result, count: int, births: Sequence[Birth], results: Sequence[Result]) -> list[Birth]:
        """Heirs of the best member, as many as can differ from everybody."""
        children: list[Birth] = []
        for _ in range(count):
            child = distinct_child(parent, self._next_index, [*births, *children], results, self._mutated)
            if child is None:
                break
            children.append(child)
            self._next_index += 1
        return children

    def _mutated(self, values: Mapping[str, Value]) -> Mapping[str, Value]:
        """One hyperparameter, mutated."""
        assert isinstance(self._config, HyperparameterConfig)
        name = sorted(self._config)[int(self._rng.integers(len(self._config)))]
        return {name: self._config[name].mutate(values[name], self._rng)[0]}

    def _affordable(self, start: SearchStart) -> tuple[tuple[Birth, ...], int]:
        """The founders that fit into the budget, and the reduction factor."""
        founders, budget = tuple(start.founders), start.budget
        if budget is None:
            return founders, self.reduction_factor or REDUCTION_FACTOR
        for count in range(len(founders), 1, -1):
            # Two go on at the first rung, unless only two begin.
            largest = max(2, -(-count // 2))
            for factor in [self.reduction_factor] if self.reduction_factor else range(2, largest + 1):
                if self._cost(count, factor, budget) <= budget.member_steps:
                    return spread(founders, start.hp_config, count), factor
        return founders[:1], REDUCTION_FACTOR

    def _cost(self, count: int, factor: int, budget: SearchBudget) -> float:
        """Steps of members that a race costs at most, evaluations counted."""
        total, rung, done, cost = count, 0, 0, 0.0
        while total > 1 and (step := self._interval * 2**rung) < budget.run_steps:
            rows = self._rows_at(rung) or self._rows
            cost += total * (step - done + budget.evaluation * rows / max(1, self._rows))
            kept = -(-total // factor)
            total, done, rung = kept + min(self.heirs, total - kept) * (kept > 1), step, rung + 1
        return cost + total * (budget.run_steps - done + budget.evaluation)

    def state_dict(self) -> dict[str, Any]:
        """The number of rungs passed, the next index and the state of the generator."""
        return {"rung": self._rung, "next_index": self._next_index, "rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`.

        Raises:
            CheckpointError: `state` is not such a state; the search is unchanged then.
        """
        with reading_state():
            rung = whole_number("rung", state["rung"], 0)
            next_index = whole_number("next_index", state["next_index"], 0)
            rng = generator_of(state["rng"])
        self._rung, self._next_index, self._rng = rung, next_index, rng


def spread(founders: Sequence[Birth], config: HyperparameterConfig | None, count: int) -> tuple[Birth, ...]:
    """As many of the founders, in their order: the first one, then again and again the one farthest from those chosen.

    A distance is over the hyperparameters that may change, on the logarithmic scale of their bounds; choices are equal
    or 1 apart.
    """
    if config is None:
        return tuple(founders[:count])
    bounds = config

    def distance(one: Birth, other: Birth) -> float:
        apart = []
        for name, known in bounds.items():
            values = [birth.hyperparameters[name] for birth in (one, other)]
            places = [known.fraction_of(float(value)) for value in values] if known.choices is None else []
            apart.append(places[0] - places[1] if places else float(values[0] != values[1]))
        return math.hypot(*apart)

    chosen = [founders[0]]
    while len(chosen) < count:
        left = [founder for founder in founders if founder not in chosen]
        chosen.append(max(left, key=lambda founder: min(distance(founder, one) for one in chosen)))
    return tuple(founder for founder in founders if founder in chosen)


def terms_of(evaluation: AnyEvaluation) -> FloatArray:
    """(n,) contributions of rows to the score of the test, that of `RACED`."""
    return raced(evaluation).terms(evaluation)
