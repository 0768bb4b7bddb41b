"""Checks of a search and its plans, before anything is changed, and a search's description for `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from evollm.checks import whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.lineage import Birth
from evollm.hpo.mutation import Mutations
from evollm.hpo.search import Result, SearchPlan, SearchStart


def check_search(search: object) -> None:
    """Check that an object has the methods of `Search`.

    Raises:
        ConfigurationError: One of the four methods is missing.
    """
    names = ("start", "tell", "state_dict", "load_state_dict")
    missing = [name for name in names if not callable(getattr(search, name, None))]
    if missing or isinstance(search, type):
        fix = f"lacks {', '.join(missing)}: see evollm.hpo.Search" if missing else "is a class: pass an object of it"
        raise ConfigurationError("search", search, fix)


def describe_search(search: object) -> dict[str, Any]:
    """Return the name of a search and, if it is a dataclass, its settings, as JSON values."""
    settings = dataclasses.fields(search) if dataclasses.is_dataclass(search) else ()
    values = {field.name: getattr(search, field.name) for field in settings if field.init}
    return {"name": type(search).__qualname__, **{name: _as_json(value) for name, value in values.items()}}


def _as_json(value: Any) -> Any:
    if isinstance(value, Mutations):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    # A function becomes its name, since its `repr` holds an address that differs between processes.
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def check_start(plan: SearchPlan, start: SearchStart) -> None:
    """Check the plan of `Search.start`.

    Raises:
        ConfigurationError: The plan breaks a rule of `Search.start`.
    """
    _check_births(plan, start.founders[0].hyperparameters.keys())
    for birth in plan.births:
        if birth.parents or birth.elite:
            raise _error(birth, "has a parent in the first generation: begin with parent=None")


def check_plan(plan: SearchPlan, results: Sequence[Result], used: Collection[int]) -> None:
    """Check the plan of `Search.tell`, before anything is changed.

    Args:
        plan: The plan made from the results.
        results: The results of all members.
        used: All indices that the run has used so far.

    Raises:
        ConfigurationError: The plan breaks a rule of `SearchPlan`.
    """
    _check_births(plan, results[0].hyperparameters.keys())
    members = {result.index: result for result in results}
    for birth in plan.births:
        _check_parents(birth, members)
        if birth.parent == birth.index:
            if birth.mutations or dict(birth.hyperparameters) != dict(members[birth.index].hyperparameters):
                raise _error(birth, "is kept with other values: give the changed agent a new index")
        elif birth.index in used:
            raise _error(birth, "is new, but has an index that the run has used: give it a larger one")
        elif birth.elite:
            raise _error(birth, "is new, and elite is for a member that is kept")


def _check_parents(birth: Birth, members: Collection[int]) -> None:
    for parent in birth.parents:
        if parent not in members:
            raise _error(birth, f"has the parent {parent}, which is not a member: {sorted(members)}")
    if birth.second_parent is not None:
        if birth.parent in (None, birth.index, birth.second_parent):
            raise _error(birth, "has a second parent, and so needs a new index and another first parent")
        if not 0 < birth.weight < 1:
            raise _error(birth, f"has weight={birth.weight}, which must lie between 0 and 1, both excluded")


def _check_births(plan: object, names: Collection[str]) -> None:
    if not isinstance(plan, SearchPlan) or not all(isinstance(birth, Birth) for birth in plan.births):
        raise ConfigurationError("search", plan, "must return a SearchPlan of births")
    if not plan.births:
        raise ConfigurationError("search", plan, "has no births: a plan needs at least one")
    if plan.steps is not None:
        whole_number("search.steps", plan.steps, 1)
    if plan.rows is not None:
        whole_number("search.rows", plan.rows, 1)
    indices = [birth.index for birth in plan.births]
    if len(set(indices)) < len(indices):
        raise ConfigurationError("search", indices, "gives two births the same index")
    for birth in plan.births:
        whole_number("search.index", birth.index, 0)
        if set(birth.hyperparameters) != set(names):
            raise _error(birth, f"must have a value for each of {', '.join(names)}, and no other")


def _error(birth: Birth, problem: str) -> ConfigurationError:
    return ConfigurationError("search", f"agent {birth.index}", problem)
