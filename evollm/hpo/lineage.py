"""Births and evolution plans: parents, mutations and hyperparameters as plain data, to JSON and back."""

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

# Numbers that strict JSON lacks, written as strings.
_NOT_FINITE = ("nan", "inf", "-inf")


@dataclass(frozen=True)
class Birth:
    """One agent of a generation: kept from the generation before, the child of one or two parents, or fresh.

    Attributes:
        index: The agent's index, unique over a run.
        parent: The parent's index: the agent's own if it is kept, None if it is fresh, as founders are.
        mutations: The hyperparameters in which the agent differs from its parent.
        elite: Whether the agent is kept because it was the best agent of the generation before.
        hyperparameters: The values after the mutations.
        second_parent: Index of the other parent of a child by crossover; None: the agent has at most one parent.
        weight: Weight of the first parent's adapter in the mean of both adapters, between 0 and 1.
    """

    index: int
    parent: int | None
    mutations: tuple[Mutation, ...]
    elite: bool
    hyperparameters: Mapping[str, Value]
    second_parent: int | None = None
    weight: float = 0.5

    @classmethod
    def fresh(cls, index: int, hyperparameters: Mapping[str, Value]) -> Birth:
        """An agent without a parent, such as a founder."""
        return cls(index, None, (), False, dict(hyperparameters))

    @property
    def parents(self) -> tuple[int, ...]:
        """The indices of the parents: none, one or two."""
        return tuple(one for one in (self.parent, self.second_parent) if one is not None)

    @property
    def origin(self) -> str:
        """How the agent came from its parents, as text for terminals."""
        if self.elite:
            return "elite, kept as it is"
        if self.parent == self.index:
            return "kept as it is"
        if self.parent is None:
            return "fresh"
        changes = [str(mutation) for mutation in self.mutations]
        if self.second_parent is not None:
            changes.insert(0, f"crossover with {self.second_parent}")
        return ", ".join(changes) or "copy"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values of strict JSON; those of a second parent only if there is one."""
        second = {} if self.second_parent is None else {"second_parent": self.second_parent, "weight": self.weight}
        return {
            "index": self.index,
            "parent": self.parent,
            **second,
            "mutations": [{name: _encode(value) for name, value in vars(one).items()} for one in self.mutations],
            "elite": self.elite,
            "hyperparameters": {name: _encode(value) for name, value in self.hyperparameters.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Birth:
        """Read the dict of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: `data` is not such a dict.
        """
        return cls(
            index=_decode_count(data["index"]),
            parent=None if data["parent"] is None else _decode_count(data["parent"]),
            mutations=tuple(
                Mutation(_decode_name(one["name"]), *(_decode(one[field]) for field in ("before", "after", "factor")))
                for one in data["mutations"]
            ),
            elite=bool(data["elite"]),
            hyperparameters={_decode_name(name): _decode(value) for name, value in data["hyperparameters"].items()},
            second_parent=None if data.get("second_parent") is None else _decode_count(data["second_parent"]),
            weight=float(data.get("weight", 0.5)),
        )


@dataclass(frozen=True)
class EvolutionPlan:
    """How one generation becomes the next.

    Attributes:
        generation: Evolutions before this one.
        elite: The index of the best agent before the evolution; `births` has this index if elitism is on.
        fitnesses: The fitness of every agent before the evolution, by the agent's index.
        births: The next generation, in the order of the population.
    """

    generation: int
    elite: int
    fitnesses: Mapping[int, Fitness]
    births: tuple[Birth, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values of strict JSON; NaN and infinities become "nan", "inf" and "-inf"."""
        return {
            "generation": self.generation,
            "elite": self.elite,
            "fitnesses": {str(index): [_encode(part) for part in fitness] for index, fitness in self.fitnesses.items()},
            "births": [birth.to_dict() for birth in self.births],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvolutionPlan:
        """Read the dict of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: `data` is not such a dict.
        """
        return cls(
            generation=_decode_count(data["generation"]),
            elite=_decode_count(data["elite"]),
            fitnesses={
                int(index): tuple(_decode(part) for part in fitness) for index, fitness in data["fitnesses"].items()
            },
            births=tuple(Birth.from_dict(birth) for birth in data["births"]),
        )


def ancestry(plans: Sequence[EvolutionPlan], index: int) -> list[Birth]:
    """Return an agent's ancestors and the agent itself, with the hyperparameters of each; only first parents count.

    Args:
        plans: The plans of a run, oldest first.
        index: The agent's index.

    Returns:
        One birth for each generation, the oldest first; a kept agent has one birth in each generation in which it was
        kept. The first birth is the founder's, reconstructed from the birth of its child, or, if the ancestry begins
        with a fresh agent of a later generation, that agent's. Empty if there is no plan.

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
    founders = [
        Birth.fresh(child.parent, {**child.hyperparameters, **{one.name: one.before for one in child.mutations}})
        for child in children
        if child.parent is not None
    ]
    return founders + line[::-1]


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, str | list):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else str(float(value))


def _decode_count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is no number of an agent or a generation")
    return value


def _decode_name(value: Any) -> str:
    # A name becomes part of file names and of the report's page, so it may hold nothing but letters, digits and "_".
    if not (isinstance(value, str) and value.isidentifier()):
        raise ValueError(f"{value!r} is no name of a hyperparameter")
    return value


def _decode(value: Any) -> Any:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{value!r} is no value of a hyperparameter")
    return float(value) if value in _NOT_FINITE else value
