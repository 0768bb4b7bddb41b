"""`Algorithm`, all that training, tuning, inspection and replays need to know of an algorithm, and its registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from evollm.errors import ConfigurationError

if TYPE_CHECKING:
    from evollm.algorithms.saving import SavableAgent
    from evollm.data.rows import RowFormat
    from evollm.data.samples import Batch
    from evollm.hpo import AnyEvaluation
    from evollm.llm_envs import DatasetGym

Learn: TypeAlias = "Callable[[Sequence[Any], Batch], list[dict[str, float]]]"
LearnEach: TypeAlias = "Callable[[Sequence[Any], Sequence[Batch]], list[dict[str, float]]]"
# Of agents, environment, split, and the reference adapter of log-ratios (see `DPO.evaluate`).
# One with a keyword argument `kl` can measure `Evaluation.kl`, one with `rows` can evaluate on a subset.
Evaluate: TypeAlias = "Callable[..., Sequence[AnyEvaluation]]"


Collect: TypeAlias = "Callable[[Sequence[Any], Batch, Any], Sequence[Batch]]"


def _suits(agents: Sequence[Any], env: Any) -> None:
    del agents, env


def _learns_alone(agent: Any) -> bool:
    del agent
    return False


@dataclass(frozen=True)
class Algorithm:
    """A tuning algorithm.

    Attributes:
        agent: Class of the agents; its `algorithm` is the name and its `words` are the names of scores in reports.
        gym: Class of the environment; its `row_format` says which rows are read.
        learn: Updates several agents of one base on the same batch, in shared passes.
        evaluate: Evaluates several agents of one base on a split, in shared passes.
        fitness: The default fitness function, of an evaluation.
        trial: The evaluation of an untrained agent, on which a user's fitness function is tried before a run.
        has_reference: Whether agents have a reference adapter; without one, answers are compared with the base's.
        evolves: The hyperparameters that evolve by default in `tune`.
        defaults: The default values in `tune` that differ from those of the agent's constructor and of the loop.
        loop: Name of the function in `evollm.training` that runs the algorithm.
        fitnesses: The fitness functions that can be given by name.
        check: Called with agents and gym before a run, to refuse or to warn of what does not suit each other.
        compares: Whether an agent's learning also takes a pass of it and of its reference over other answers of the
            batch, as long as those that it learns from.
        collect: From agents of one base, the gym's batch that it has just served, and the gym, to the batch that each
            agent learns from in place of the gym's, where that is its own answers. None: all learn from the gym's.
        learn_each: Updates several agents of one base, each on its batch of `collect`, in shared passes. None: `learn`
            is called for one agent after the other.
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
    fitnesses: Mapping[str, Callable[[Any], object]] = field(default_factory=dict)
    check: Callable[[Sequence[Any], Any], None] = _suits
    compares: Callable[[Any], bool] = _learns_alone
    collect: Collect | None = None
    learn_each: LearnEach | None = None

    @property
    def name(self) -> str:
        """The name for `tune(algorithm=...)` and configuration files."""
        return self.agent.algorithm.lower()

    @property
    def row_format(self) -> RowFormat:
        """The rows that the gym reads."""
        return self.gym.row_format


ALGORITHMS: dict[str, Algorithm] = {}


def register(algorithm: Algorithm) -> None:
    """Add an algorithm to the registry. A module that is executed again may register its algorithm again.

    Raises:
        ConfigurationError: The name is that of another agent class's algorithm.
    """
    known = ALGORITHMS.get(algorithm.name)
    if known is not None and _qualified_name(known.agent) != _qualified_name(algorithm.agent):
        fix = f"is the name of {_qualified_name(known.agent)}: give another"
        raise ConfigurationError("algorithm", algorithm.name, fix)
    ALGORITHMS[algorithm.name] = algorithm


def _qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def algorithm_named(name: object) -> Algorithm:
    """The algorithm with this name.

    Raises:
        ConfigurationError: There is no such algorithm.
    """
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise ConfigurationError("algorithm", name, f"must be one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def algorithm_of(agent: object) -> Algorithm:
    """The algorithm of an agent: that of its class, or of the nearest parent class that has one.

    Raises:
        ConfigurationError: No class of the agent is registered.
    """
    by_agent: dict[type, Algorithm] = {algorithm.agent: algorithm for algorithm in ALGORITHMS.values()}
    found = next((by_agent[kind] for kind in type(agent).__mro__ if kind in by_agent), None)
    if found is None:
        fix = "is no agent of an algorithm that is known: of a wrapper pass what it wraps, and register your own"
        raise ConfigurationError("agent", type(agent).__name__, fix)
    return found
