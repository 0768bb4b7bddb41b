"""The seam between a search strategy and the run that carries out its plans: ask and tell, on plain data.

A strategy knows indices, fitnesses and hyperparameters, and neither agents nor torch. A run asks it once with `start`,
and `tell`s it the results whenever the last plan said that a decision is due. One strategy is one class in one file;
`evollm.hpo.tournament` and `evollm.hpo.successive_halving` are two, `tutorials/own_search.py` is one from outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from evollm.checks import whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.fitness import Fitness
from evollm.hpo.hyperparameters import HyperparameterConfig, Value
from evollm.hpo.lineage import Birth
from evollm.hpo.mutation import Mutation

FACTOR_DIGITS = 3


@dataclass(frozen=True)
class Result:
    """What a search is told of one member.

    Attributes:
        index: The agent's index, unique over a run.
        fitness: Its fitness at the evaluation that came last; larger is better, not finite if it has diverged.
        hyperparameters: Its values by name.
        steps: Batches that its weights have learnt from, those of its ancestors included.
    """

    index: int
    fitness: Fitness
    hyperparameters: Mapping[str, Value]
    steps: int = 0

    def kept(self, *, elite: bool = False) -> Birth:
        """The member goes on as it is; `elite` says that it is kept for being the best."""
        return Birth(self.index, self.index, (), elite, dict(self.hyperparameters))

    def child(self, index: int, changes: Mapping[str, Value] | None = None) -> Birth:
        """A new agent with the member's weights, optimizer state and values.

        Args:
            index: Its index.
            changes: The values that are not the member's, by name.

        Raises:
            ConfigurationError: The member has no hyperparameter of such a name.
        """
        unknown = sorted((changes or {}).keys() - self.hyperparameters.keys())
        if unknown:
            raise ConfigurationError("changes", unknown, f"are not hyperparameters: {', '.join(self.hyperparameters)}")
        found = tuple(
            Mutation(name, self.hyperparameters[name], value, _factor(self.hyperparameters[name], value))
            for name, value in (changes or {}).items()
            if value != self.hyperparameters[name]
        )
        return Birth(
            index, self.index, found, False, {**self.hyperparameters, **{one.name: one.after for one in found}}
        )


def _factor(before: Value, after: Value) -> float | None:
    numbers = all(isinstance(value, int | float) for value in (before, after))
    return float(f"{after / before:.{FACTOR_DIGITS}g}") if numbers and before else None  # type: ignore[operator]


@dataclass(frozen=True)
class SearchStart:
    """What a search begins with.

    How long the run is, is not among it: a run can be made longer later, and then has the bits of one that was as long
    from the beginning.

    Attributes:
        founders: The agents that the run was given, with their values.
        hp_config: Which hyperparameters may change, and within which bounds; None if none may.
        interval: Steps between two decisions as the user asked for them (`evo_steps`), by default an epoch.
    """

    founders: Sequence[Birth]
    hp_config: HyperparameterConfig | None
    interval: int


@dataclass(frozen=True)
class SearchPlan:
    """What a search wants next.

    Attributes:
        births: The members from now on, fewer or more than before. Each is kept (its own parent, same values), the
            child of a member under a new index, or fresh: without a parent and under a new index it begins as the first
            agent of the run did. Members that are not among them leave.
        steps: After how many steps the search is told results again; None: never.
    """

    births: tuple[Birth, ...]
    steps: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values of strict JSON."""
        return {"births": [birth.to_dict() for birth in self.births], "steps": self.steps}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchPlan:
        """Read what `to_dict` wrote."""
        return cls(tuple(Birth.from_dict(birth) for birth in data["births"]), data["steps"])


class Search(Protocol):
    """A search strategy. A class needs these four methods, and no base class.

    The same calls give the same plans: whatever is drawn comes from a generator of the search's own, whose state is in
    `state_dict`. The settings of a strategy that is a dataclass are noted in the run's `config.json`, and a resume
    refuses others.
    """

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin anew, whatever came before, and say who begins.

        Births have no parent here. One under the index of a founder is that agent with the values of the birth; one
        under a new index is a fresh agent; founders that are not among the births leave. A resumed run calls this, too,
        before `load_state_dict`.
        """

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Hear how every member did, in the order of the population, and say who goes on.

        Raises:
            DivergedError: No member has a finite fitness, and the search cannot go on from none.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that later plans depend on, as plain JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            CheckpointError: This is no such state.
        """


def check_search(search: object) -> None:
    """Refuse what is no search.

    Raises:
        ConfigurationError: One of the four methods is missing.
    """
    names = ("start", "tell", "state_dict", "load_state_dict")
    missing = [name for name in names if not callable(getattr(search, name, None))]
    if missing or isinstance(search, type):
        fix = f"lacks {', '.join(missing)}: see evollm.hpo.Search" if missing else "is a class: pass an object of it"
        raise ConfigurationError("search", search, fix)


def describe_search(search: object) -> dict[str, Any]:
    """The name of a search, and its settings where it is a dataclass, as JSON values."""
    settings = dataclasses.fields(search) if dataclasses.is_dataclass(search) else ()
    found = {field.name: getattr(search, field.name) for field in settings if field.init}
    return {"name": type(search).__qualname__, **{name: _plain(value) for name, value in found.items()}}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    # A function by its name: what `repr` adds differs from one process to the next.
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def check_start(plan: SearchPlan, start: SearchStart) -> None:
    """Refuse the first plan of a search if no run can begin with it.

    Raises:
        ConfigurationError: It is not as `Search.start` says.
    """
    _check_form(plan, start.founders[0].hyperparameters.keys())
    for birth in plan.births:
        if birth.parent is not None or birth.elite:
            raise _fault(birth, "has a parent before anybody has learnt: begin with parent=None")


def check_plan(plan: SearchPlan, results: Sequence[Result], used: Collection[int]) -> None:
    """Refuse a plan that cannot be carried out, or that a lineage could not tell.

    Args:
        plan: Made from the results.
        results: Of every member.
        used: All indices that the run has had.

    Raises:
        ConfigurationError: It is not as `SearchPlan` says.
    """
    _check_form(plan, results[0].hyperparameters.keys())
    members = {result.index: result for result in results}
    for birth in plan.births:
        if birth.parent is not None and birth.parent not in members:
            raise _fault(birth, f"has the parent {birth.parent}, which is not a member: {sorted(members)}")
        if birth.parent == birth.index:
            if birth.mutations or dict(birth.hyperparameters) != dict(members[birth.index].hyperparameters):
                raise _fault(birth, "is kept with other values: give the changed agent a new index")
        elif birth.index in used:
            raise _fault(birth, "is new under an index that the run has had: count on")
        elif birth.elite:
            raise _fault(birth, "is new, and elite is for a member that is kept")


def _check_form(plan: object, names: Collection[str]) -> None:
    if not isinstance(plan, SearchPlan) or not all(isinstance(birth, Birth) for birth in plan.births):
        raise ConfigurationError("search", plan, "must return a SearchPlan of births")
    if not plan.births:
        raise ConfigurationError("search", plan, "leaves nobody: a plan has at least one birth")
    if plan.steps is not None:
        whole_number("search.steps", plan.steps, 1)
    indices = [birth.index for birth in plan.births]
    if len(set(indices)) < len(indices):
        raise ConfigurationError("search", indices, "gives two births one index")
    for birth in plan.births:
        whole_number("search.index", birth.index, 0)
        if set(birth.hyperparameters) != set(names):
            raise _fault(birth, f"must have a value for each of {', '.join(names)}, and no other")


def _fault(birth: Birth, what: str) -> ConfigurationError:
    return ConfigurationError("search", f"agent {birth.index}", what)
