"""What an algorithm is, in one object: whatever runs, tunes, inspects or replays agents asks this object alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from evollm.errors import ConfigurationError

if TYPE_CHECKING:
    from evollm.algorithms.saving import SavableAgent
    from evollm.data.batch import PreferenceBatch
    from evollm.data.rows import RowFormat
    from evollm.hpo import AnyEvaluation
    from evollm.llm_envs import DatasetGym

Learn: TypeAlias = "Callable[[Sequence[Any], PreferenceBatch], list[dict[str, float]]]"
# Agents, environment, split, and what log-ratios are to.
Evaluate: TypeAlias = "Callable[[Sequence[Any], DatasetGym, str, str | None], Sequence[AnyEvaluation]]"


@dataclass(frozen=True)
class Algorithm:
    """An algorithm.

    Attributes:
        agent: Class of its agents, whose `algorithm` names it and whose `words` speak of it.
        gym: Class of what serves their batches, whose `row_format` says what rows look like.
        learn: One batch for some of the agents, through the base together.
        evaluate: Scores some of the agents on a split.
        fitness: From an evaluation to the fitness by default.
        trial: The evaluation of an agent that has learnt nothing, to try a fitness function on.
        has_reference: Whether agents are compared with a reference; else with the base.
        evolves: The hyperparameters that evolve in `tune` unless the user says otherwise.
        defaults: Where `tune` starts from another value than the agent does by itself, beside what holds for all.
        loop: Name of the function of `evollm.training` that runs it.
    """

    agent: type[SavableAgent]
    gym: type[DatasetGym]
    learn: Learn
    evaluate: Evaluate
    fitness: Callable[[Any], object]
    trial: AnyEvaluation
    has_reference: bool
    evolves: tuple[str, ...] = ("lr",)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    loop: str = "finetune"

    @property
    def name(self) -> str:
        """What `tune(algorithm=...)` and a configuration file call it."""
        return self.agent.algorithm.lower()

    @property
    def row_format(self) -> RowFormat:
        """What rows look like."""
        return self.gym.row_format


ALGORITHMS: dict[str, Algorithm] = {}


def register(algorithm: Algorithm) -> None:
    """Make an algorithm known by its name. A module that is run once more replaces its own.

    Raises:
        ConfigurationError: The name is another's.
    """
    known = ALGORITHMS.get(algorithm.name)
    if known is not None and _place(known) != _place(algorithm):
        raise ConfigurationError("algorithm", algorithm.name, f"is the name of {'.'.join(_place(known))}: give another")
    ALGORITHMS[algorithm.name] = algorithm


def _place(algorithm: Algorithm) -> tuple[str, str]:
    return algorithm.agent.__module__, algorithm.agent.__qualname__


def algorithm_named(name: object) -> Algorithm:
    """The algorithm of a name.

    Raises:
        ConfigurationError: There is no such algorithm.
    """
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise ConfigurationError("algorithm", name, f"must be one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def algorithm_of(agent: object) -> Algorithm:
    """The algorithm of an agent; of a child of an algorithm's agents that has none of its own, its parent's.

    Raises:
        ConfigurationError: It is no agent of an algorithm that is known.
    """
    by_agent: dict[type, Algorithm] = {algorithm.agent: algorithm for algorithm in ALGORITHMS.values()}
    found = next((by_agent[kind] for kind in type(agent).__mro__ if kind in by_agent), None)
    if found is None:
        fix = "is no agent of an algorithm that is known: of a wrapper pass what it wraps, and register your own"
        raise ConfigurationError("agent", type(agent).__name__, fix)
    return found
