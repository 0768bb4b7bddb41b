"""The interface between a search strategy and the run that carries out its plans: ask and tell, on plain data.

A strategy gets indices, fitnesses and hyperparameters, and imports neither agents nor torch. The run calls `start`
once, and `tell` with the results after the number of steps in the last plan. A strategy is one class in one file, such
as `evollm.hpo.tournament`, `evollm.hpo.successive_halving` and, outside the package, `tutorials/own_search.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from evollm.checks import finite_number
from evollm.errors import CheckpointError, ConfigurationError, DivergedError
from evollm.hpo.fitness import AnyEvaluation, Fitness, is_finite, rank
from evollm.hpo.hyperparameters import HyperparameterConfig, Value, rounded_factor
from evollm.hpo.lineage import Birth
from evollm.hpo.mutation import Mutation

# Draws of the hyperparameters of one new agent until it differs from all others.
MAX_DRAWS = 10


@dataclass(frozen=True)
class Result:
    """The result of one member of the population.

    Attributes:
        index: The agent's index, unique over a run.
        fitness: The agent's fitness at the last evaluation; larger is better, not finite if the agent has diverged.
        hyperparameters: The agent's hyperparameters by name.
        steps: Batches that the agent's weights were trained on, those of its ancestors included.
        evaluation: The evaluation behind the fitness, row by row; the rows are those of all other members, in the same
            order. None for a diverged agent.
    """

    index: int
    fitness: Fitness
    hyperparameters: Mapping[str, Value]
    steps: int = 0
    evaluation: AnyEvaluation | None = None

    def equals(self, other: Result) -> bool:
        """Say whether two members are the same agent under two indices; no diverged agents are.

        Members with equal hyperparameters, steps and numbers on every held-out row have equal weights.
        """
        mine = (self.fitness, self.steps, dict(self.hyperparameters))
        if not is_finite(self.fitness) or mine != (other.fitness, other.steps, dict(other.hyperparameters)):
            return False
        if self.evaluation is None or other.evaluation is None:
            return self.evaluation is other.evaluation
        return self.evaluation.equals(other.evaluation)

    def kept(self, *, elite: bool = False) -> Birth:
        """Return the birth of the same agent, unchanged; `elite` says that it is kept because it is the best."""
        return Birth(self.index, self.index, (), elite, dict(self.hyperparameters))

    def child(self, index: int, changes: Mapping[str, Value] | None = None) -> Birth:
        """Return the birth of a new agent with the member's weights, optimizer state and hyperparameters.

        Args:
            index: The new agent's index.
            changes: The hyperparameters that differ from the member's, by name.

        Raises:
            ConfigurationError: The member has no hyperparameter of such a name.
        """
        changes = changes or {}
        unknown = sorted(changes.keys() - self.hyperparameters.keys())
        if unknown:
            raise ConfigurationError("changes", unknown, f"are not hyperparameters: {', '.join(self.hyperparameters)}")
        mutations = []
        for name, after in changes.items():
            before = self.hyperparameters[name]
            if after != before:
                mutations.append(Mutation(name, before, after, rounded_factor(before, after)))
        return self.mutated(index, mutations)

    def crossed(
        self, index: int, other: Result, hp_config: HyperparameterConfig | None, *, weight: float = 0.5
    ) -> Birth:
        """Return the birth of a new agent whose weights and hyperparameters lie between two members'.

        The child's adapter is the mean of both members' adapters, tensor by tensor, as in a uniform soup (arXiv
        2203.05482). Optimizer moments, reference, counters and choices are the first member's.

        Args:
            index: The new agent's index.
            other: The second parent.
            hp_config: The hyperparameters that may change, which lie between the parents'; the others are the member's.
            weight: Weight of the member's adapter; that of the other's is 1 - weight.

        Raises:
            ConfigurationError: The parents are one member, or the weight is not between 0 and 1.
        """
        if other.index == self.index:
            raise ConfigurationError("other", other.index, "is the first parent: a crossover needs two members")
        if not 0 < finite_number("weight", weight) < 1:
            raise ConfigurationError("weight", weight, "must lie between 0 and 1, both excluded")
        values = {
            name: parameter.between(self.hyperparameters[name], other.hyperparameters[name], weight)
            for name, parameter in (hp_config or {}).items()
        }
        return dataclasses.replace(self.child(index, values), second_parent=other.index, weight=weight)

    def mutated(self, index: int, mutations: Sequence[Mutation]) -> Birth:
        """Return the birth of a new agent that differs from the member by these mutations."""
        values = {**self.hyperparameters, **{mutation.name: mutation.after for mutation in mutations}}
        return Birth(index, self.index, tuple(mutations), False, values)


@dataclass(frozen=True)
class SearchBudget:
    """The compute of a run with a `budget`, in steps of the first agent.

    Attributes:
        member_steps: What is left for members to learn and to be evaluated, without references and final scores.
        run_steps: Steps of one run.
        evaluation: What the evaluation of one member costs.
    """

    member_steps: float
    run_steps: int
    evaluation: float


@dataclass(frozen=True)
class SearchStart:
    """The initial population and settings that a search is given.

    The length of the run is left out: a run that is extended later must have the bits of one that had the same length
    from the beginning. A run with a `budget` cannot be extended, so that the budget may say the length.

    Attributes:
        founders: The agents that the run was given, with their hyperparameters.
        hp_config: The hyperparameters that may change, with their bounds; None if none may.
        interval: Steps between two decisions, as the user set them (`evo_steps`), by default one epoch.
        budget: The compute to plan for; None: the run has no `budget`.
        rows: Rows of the selection split.
    """

    founders: Sequence[Birth]
    hp_config: HyperparameterConfig | None
    interval: int
    budget: SearchBudget | None = None
    rows: int = 0

    @property
    def next_index(self) -> int:
        """The first index that no founder has."""
        return 1 + max(founder.index for founder in self.founders)


@dataclass(frozen=True)
class SearchPlan:
    """The next population, and when the search decides again.

    Attributes:
        births: The next members, fewer or more than before. A kept member is its own parent and keeps its
            hyperparameters. A child has a member as its parent and a new index, and may have another member as its
            second parent. A fresh agent has no parent and a new index, and begins as a copy of the first agent of the
            run. A member that has no birth leaves.
        steps: Steps until the next call of `Search.tell`; None: there is none.
        rows: Rows of the selection split that the members are compared on then, the same for all members; None: all.
            An evaluation on fewer rows decides who goes on, and is none of the run's best ones.
    """

    births: tuple[Birth, ...]
    steps: int | None
    rows: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values of strict JSON."""
        rows = {} if self.rows is None else {"rows": self.rows}
        return {"births": [birth.to_dict() for birth in self.births], "steps": self.steps, **rows}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchPlan:
        """Read the dict of `to_dict`."""
        return cls(tuple(Birth.from_dict(birth) for birth in data["births"]), data["steps"], data.get("rows"))


class Search(Protocol):
    """A search strategy. A class needs these four methods, and no base class.

    The same calls must give the same plans: a strategy draws from a random generator of its own, and saves that
    generator's state in `state_dict`. If the strategy is a dataclass, its fields are written to the `config.json` of
    the run, and a resume refuses other values.

    A strategy with a true attribute `plans_evaluations` has no evaluations between its decisions, unless the user asks
    for them.
    """

    def start(self, start: SearchStart) -> SearchPlan:
        """Reset the search and plan the initial population.

        Births have no parent here. A birth with the index of a founder is that agent with the hyperparameters of the
        birth, a birth with a new index is a fresh agent, and a founder that has no birth leaves. A resumed run calls
        `start`, too, before `load_state_dict`.
        """

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Plan the next population from the results of all members, which come in the order of the population.

        Raises:
            DivergedError: No member has a finite fitness.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything on which later plans depend, as plain JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`.

        Raises:
            CheckpointError: `state` is not such a state.
        """


def best_first(results: Sequence[Result]) -> list[Result]:
    """Return the members with a finite fitness, the best first.

    Raises:
        DivergedError: There is none.
    """
    found = [results[place] for place in rank([result.fitness for result in results])]
    finite = [result for result in found if is_finite(result.fitness)]
    if not finite:
        raise DivergedError(
            f"none of the {len(results)} agents has a finite fitness, so none can go on or be a parent; "
            "lower lr or its upper bound, or set max_grad_norm"
        )
    return finite


def is_taken(
    parent: Result,
    values: Mapping[str, Value],
    births: Sequence[Birth],
    results: Sequence[Result],
    second: Result | None = None,
) -> bool:
    """Say whether a child of `parent` with these hyperparameters would equal an agent that is born already.

    All members learn from the same batches, so two agents with equal weights and hyperparameters stay equal.

    Args:
        parent: The parent, one of `results`.
        values: All hyperparameters of the child.
        births: The births so far.
        results: The results of all members.
        second: The second parent, if any. Two children of the same two parents count as equal in either order.
    """
    members = {result.index: result for result in results}
    parents = [parent] if second is None else [parent, second]

    def are_parents_of(birth: Birth) -> bool:
        others = [members[index] for index in birth.parents]
        return len(others) == len(parents) and any(
            all(one.index == other.index or one.equals(other) for one, other in zip(parents, order, strict=True))
            for order in (others, others[::-1])
        )

    return any(values == birth.hyperparameters and are_parents_of(birth) for birth in births)


def distinct_child(
    parent: Result,
    index: int,
    births: Sequence[Birth],
    results: Sequence[Result],
    draw: Callable[[Mapping[str, Value]], Mapping[str, Value]],
    values: Mapping[str, Value] | None = None,
    second: Result | None = None,
) -> Birth | None:
    """Return a child that equals no agent that is born already; None if `MAX_DRAWS` draws find none.

    Args:
        parent: The parent, one of `results`.
        index: The child's index.
        births: The births so far.
        results: The results of all members.
        draw: From hyperparameters to changed ones: first from `values`, then from those that were drawn last.
        values: All hyperparameters to begin with; None: the parent's.
        second: The second parent, if any.
    """
    values = parent.hyperparameters if values is None else values
    for _ in range(MAX_DRAWS):
        values = {**values, **draw(values)}
        if not is_taken(parent, values, births, results, second):
            child = parent.child(index, values)
            return child if second is None else dataclasses.replace(child, second_parent=second.index)
    return None


def require_config(hp_config: HyperparameterConfig | None, why: str) -> HyperparameterConfig:
    """Return the config of a search that changes hyperparameters.

    Args:
        hp_config: The hyperparameters that may change; None if none may.
        why: What cannot be done without a config, such as "a mutation has nothing to change".

    Raises:
        ConfigurationError: No hyperparameter may change.
    """
    if not hp_config:
        fix = f"{why}: build the agents with hp_config=HyperparameterConfig(lr=...)"
        raise ConfigurationError("hp_config", hp_config, fix)
    return hp_config


@contextmanager
def reading_state() -> Iterator[None]:
    """Turn what reading a state of `Search.state_dict` raises into a `CheckpointError`."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the state of the search is incomplete or from elsewhere: {error!r}") from error


def generator_of(state: Any) -> np.random.Generator:
    """Return a generator with a saved state.

    Raises:
        TypeError, ValueError, KeyError: `state` is no state of a generator.
    """
    rng = np.random.default_rng(0)
    rng.bit_generator.state = state
    return rng
