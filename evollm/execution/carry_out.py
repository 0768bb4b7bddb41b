"""Carry out the plan of a search on live agents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from evollm.errors import ConfigurationError
from evollm.hpo import Birth
from evollm.hpo.hyperparameters import Value

AgentT = TypeVar("AgentT", bound="EvolvableAgent")


class EvolvableAgent(Protocol):
    """The attribute and the methods of an agent that evolution uses.

    Attributes:
        index: The agent's index, unique over a run.
    """

    index: int

    def hyperparameter_values(self) -> dict[str, float]:
        """Return the current values by name."""

    def clone(self: AgentT, index: int) -> AgentT:
        """Return a copy with the same weights, optimizer state, hyperparameters and random state under a new index."""

    def set_hyperparameters(self, values: Mapping[str, Value]) -> None:
        """Change hyperparameters; weights, optimizer and random state stay."""

    def mutation_hook(self) -> None:
        """Call the hooks registered for a mutation of the agent."""

    def release(self) -> None:
        """Free the memory of an agent that has left the population."""


def carry_out(
    births: Sequence[Birth], population: Sequence[AgentT], make: Callable[[AgentT, Birth], object] | None = None
) -> list[AgentT]:
    """Turn a population into the next population.

    There are never more agents than in the larger of the two populations: agents without a child are released before
    any agent is cloned, unless a fresh birth reuses the object, and the last child of a parent that does not survive
    reuses the parent's object. A kept agent is not changed.

    Args:
        births: The next population, planned from `population`.
        population: The agents; do not use this list afterwards, since its objects are released or reused.
        make: Resets an agent for a birth without a parent, for example to the state of the run's first agent.

    Returns:
        The agents of the births, in the order of the births.

    Raises:
        ConfigurationError: The births were planned for other agents, a birth has no parent and `make` is None, or a
            birth has two parents, which `Worker.apply` makes. No agent has been changed.
    """
    for birth in births:
        if birth.second_parent is not None:
            fix = f"agent {birth.index} comes from a crossover, which a run carries out and carry_out does not"
            raise ConfigurationError("second_parent", birth.second_parent, f"{fix}: set crossover=0")
    by_index = {agent.index: agent for agent in population}
    parents = [birth.parent for birth in births]
    known = {*by_index, *([] if make is None else [None])}
    again = {birth.index for birth in births if birth.parent != birth.index} & by_index.keys()
    if len(by_index) != len(population) or not set(parents) <= known or again:
        planned = sorted({parent for parent in parents if parent is not None})
        fix = f"the plan was made for others, with the parents {planned}: plan this population anew"
        raise ConfigurationError("population", [agent.index for agent in population], fix)
    spare = [agent for agent in population if agent.index not in parents]
    for agent in spare[parents.count(None) :]:
        agent.release()
    survivors = {birth.index for birth in births}
    generation: list[AgentT] = []
    for slot, birth in enumerate(births):
        if birth.parent is None:
            assert make is not None
            # Any agent may be cloned or reused here, because `make` replaces its whole state.
            agent = spare.pop(0) if spare else (generation or list(population))[0].clone(birth.index)
            make(agent, birth)
            agent.index = birth.index
            generation.append(_with_values(agent, birth))
            continue
        parent = by_index[birth.parent]
        if birth.parent not in survivors and birth.parent not in parents[slot + 1 :]:
            parent.index = birth.index
            generation.append(_with_values(parent, birth))
        else:
            generation.append(parent if birth.parent == birth.index else _with_values(parent.clone(birth.index), birth))
    return generation


def _with_values(agent: AgentT, birth: Birth) -> AgentT:
    agent.set_hyperparameters(birth.hyperparameters)
    if birth.mutations:
        agent.mutation_hook()
    return agent
