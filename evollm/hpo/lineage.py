"""Who came from whom, with which hyperparameters: plain data that goes through JSON and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from evollm.errors import ConfigurationError
from evollm.hpo.fitness import Fitness
from evollm.hpo.hyperparameters import Value
from evollm.hpo.mutation import Mutation

# Strict JSON has no such numbers: they are written as these words.
_NOT_FINITE = ("nan", "inf", "-inf")


@dataclass(frozen=True)
class Birth:
    """One slot of a generation.

    Attributes:
        index: The agent's index, unique over a run.
        parent: The index of the agent that it came from: its own if it is kept, None if it is fresh, as founders are.
        mutations: What it does not share with its parent.
        elite: Whether it is kept for being the best agent of the generation before.
        hyperparameters: Its values after the mutations.
    """

    index: int
    parent: int | None
    mutations: tuple[Mutation, ...]
    elite: bool
    hyperparameters: Mapping[str, Value]

    @classmethod
    def fresh(cls, index: int, hyperparameters: Mapping[str, Value]) -> Birth:
        """An agent without a parent, such as a founder."""
        return cls(index, None, (), False, dict(hyperparameters))

    @property
    def origin(self) -> str:
        """How it came from its parent, for a person."""
        if self.elite:
            return "elite, kept as it is"
        if self.parent == self.index:
            return "kept as it is"
        if self.parent is None:
            return "fresh"
        return ", ".join(str(mutation) for mutation in self.mutations) or "copy"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values of strict JSON."""
        return {
            "index": self.index,
            "parent": self.parent,
            "mutations": [_encode_mutation(mutation) for mutation in self.mutations],
            "elite": self.elite,
            "hyperparameters": {name: _encode(value) for name, value in self.hyperparameters.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Birth:
        """Read what `to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: It is something else.
        """
        return cls(
            index=_number(data["index"]),
            parent=None if data["parent"] is None else _number(data["parent"]),
            mutations=tuple(_decode_mutation(mutation) for mutation in data["mutations"]),
            elite=bool(data["elite"]),
            hyperparameters={_name(name): _decode(value) for name, value in data["hyperparameters"].items()},
        )


@dataclass(frozen=True)
class EvolutionPlan:
    """How one generation becomes the next.

    Attributes:
        generation: The number that the caller gave to the evolution.
        elite: The index of the best agent before the evolution; it is in `births` under this index if elitism is on.
        fitnesses: The fitness of every agent before the evolution, by its index.
        births: The next generation in its order.
    """

    generation: int
    elite: int
    fitnesses: Mapping[int, Fitness]
    births: tuple[Birth, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values of strict JSON.

        A number that is not finite becomes the text "nan", "inf" or "-inf", for strict JSON has no such numbers.
        """
        return {
            "generation": self.generation,
            "elite": self.elite,
            "fitnesses": {str(index): [_encode(part) for part in fitness] for index, fitness in self.fitnesses.items()},
            "births": [birth.to_dict() for birth in self.births],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvolutionPlan:
        """Read what `to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: It is something else.
        """
        return cls(
            generation=_number(data["generation"]),
            elite=_number(data["elite"]),
            fitnesses={
                int(index): tuple(_decode(part) for part in fitness) for index, fitness in data["fitnesses"].items()
            },
            births=tuple(Birth.from_dict(birth) for birth in data["births"]),
        )


def ancestry(plans: Sequence[EvolutionPlan], index: int) -> list[Birth]:
    """Return the line of an agent: the schedule of hyperparameters that made it.

    Args:
        plans: The plans of a run, oldest first.
        index: The agent at the end of the line.

    Returns:
        One birth for each generation that the line went through, the founder first. A kept agent appears once for every
        generation that it was kept. The founder's birth is worked out from its child's. A line that begins with a fresh
        agent of a later generation begins with that birth. Empty if there is no plan.

    Raises:
        ConfigurationError: If there are plans and the agent is neither born nor a parent in any of them.
    """
    line: list[Birth] = []
    wanted: int | None = index
    for plan in reversed(plans):
        birth = next((birth for birth in plan.births if birth.index == wanted), None)
        if birth is not None:
            line.append(birth)
            wanted = birth.parent
    children = line[-1:] or [birth for plan in plans for birth in plan.births if birth.parent == index][:1]
    if plans and not children:
        born = ", ".join(str(birth.index) for plan in plans for birth in plan.births)
        raise ConfigurationError("index", index, f"is not in the lineage, or left without a child; known are {born}")
    return [_parent_of(child) for child in children if child.parent is not None] + line[::-1]


def _parent_of(birth: Birth) -> Birth:
    """Return the birth of a founder, whose values are those of its child before the child's mutations."""
    assert birth.parent is not None
    before = {mutation.name: mutation.before for mutation in birth.mutations}
    return Birth(birth.parent, None, (), elite=False, hyperparameters={**birth.hyperparameters, **before})


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, str | list):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else str(float(value))


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is no number of an agent or a generation")
    return value


def _name(value: Any) -> str:
    # Names are those of parameters in Python, and get into names of files and into pages.
    if not (isinstance(value, str) and value.isidentifier()):
        raise ValueError(f"{value!r} is no name of a hyperparameter")
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_text(item) for item in value]
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return float(value) if value in _NOT_FINITE else _text(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no value of a hyperparameter")
    return value


def _encode_mutation(mutation: Mutation) -> dict[str, Any]:
    numbers = {"before": mutation.before, "after": mutation.after, "factor": mutation.factor}
    return {"name": mutation.name, **{field: _encode(value) for field, value in numbers.items()}}


def _decode_mutation(data: Mapping[str, Any]) -> Mutation:
    return Mutation(_name(data["name"]), _decode(data["before"]), _decode(data["after"]), _decode(data["factor"]))
