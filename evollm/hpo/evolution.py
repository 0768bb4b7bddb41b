"""From one generation to the next: a pure plan, and the one function that carries it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from evollm.errors import CheckpointError, ConfigurationError
from evollm.hpo.fitness import Fitness
from evollm.hpo.hyperparameters import HyperparameterConfig, Value
from evollm.hpo.lineage import Birth, EvolutionPlan
from evollm.hpo.mutation import Mutations, mutate
from evollm.hpo.tournament import TournamentSelection, check_population, select_parents

# All agents see the same batches, so two children of one parent with the same hyperparameters would be one agent
# computed twice. A mutated child that is such a twin is drawn anew, this often at most.
ATTEMPTS = 10

AgentT = TypeVar("AgentT", bound="EvolvableAgent")


class EvolvableAgent(Protocol):
    """All that evolution knows of an agent.

    Attributes:
        index: The agent's index, unique over a run.
    """

    index: int

    def hyperparameter_values(self) -> dict[str, float]:
        """Return the current values by name."""

    def clone(self: AgentT, index: int) -> AgentT:
        """Return a copy with the same weights, optimizer state, hyperparameters and random state under a new index."""

    def set_hyperparameters(self, values: Mapping[str, Value]) -> None:
        """Change hyperparameters, and nothing else of the agent."""

    def mutation_hook(self) -> None:
        """Tell whoever asked for it that the agent has mutated."""

    def release(self) -> None:
        """Free what the agent holds; it left the population."""


@dataclass(frozen=True)
class Member:
    """What a plan needs to know of one agent.

    Attributes:
        index: The agent's index.
        fitness: Its fitness in the generation that ends.
        hyperparameters: Its current values by name.
    """

    index: int
    fitness: Fitness
    hyperparameters: Mapping[str, Value]


def plan_evolution(
    members: Sequence[Member],
    *,
    generation: int,
    tournament: TournamentSelection,
    mutations: Mutations,
    hp_config: HyperparameterConfig | None,
    next_index: int,
    tournament_rng: np.random.Generator,
    mutation_rng: np.random.Generator,
) -> EvolutionPlan:
    """Decide who has which children with which hyperparameters; changes nothing but the two generators.

    The same arguments and generator states give the same plan. This is the exploit and explore of population based
    training (arXiv 1711.09846): a tournament says whose weights are exploited, a mutation explores.

    Args:
        members: The population in slot order.
        generation: The number to write into the plan.
        tournament: How parents are selected.
        mutations: How children are mutated.
        hp_config: The hyperparameters that may change; None if none may.
        next_index: The first index for a new agent.
        tournament_rng: Draws the parents.
        mutation_rng: Draws the mutations.

    Raises:
        ConfigurationError: If the tournament is for another population size, two members have the same index, or
            `next_index` is taken.
        DivergedError: If no member has a finite fitness. No generator has been consumed then.
    """
    check_population(tournament, len(members))
    _check_indices([member.index for member in members], next_index)
    fitnesses = {member.index: member.fitness for member in members}
    elite_position, parent_positions = select_parents(tuple(fitnesses.values()), tournament, tournament_rng)
    elite = members[elite_position]
    births = [Birth(elite.index, elite.index, (), True, dict(elite.hyperparameters))] if tournament.elitism else []
    for index, position in enumerate(parent_positions, start=next_index):
        for _ in range(ATTEMPTS):
            child = _child(index, members[position], hp_config, mutations, mutation_rng)
            if not child.mutations or not any(_are_twins(child, other) for other in births):
                break
        births.append(child)
    return EvolutionPlan(generation, elite.index, fitnesses, tuple(births))


def _child(
    index: int,
    parent: Member,
    hp_config: HyperparameterConfig | None,
    mutations: Mutations,
    rng: np.random.Generator,
) -> Birth:
    changes = mutate(parent.hyperparameters, hp_config, mutations, rng)
    values = {**parent.hyperparameters, **{change.name: change.after for change in changes}}
    return Birth(index, parent.index, changes, False, values)


def _are_twins(one: Birth, other: Birth) -> bool:
    return one.parent == other.parent and one.hyperparameters == other.hyperparameters


def _check_indices(indices: Sequence[int], next_index: int) -> None:
    if len(set(indices)) != len(indices):
        raise ConfigurationError("index", list(indices), "two agents share an index; give each its own")
    if next_index <= max(indices):
        raise ConfigurationError("next_index", next_index, f"must be above the largest index in use, {max(indices)}")


class Evolver:
    """The settings of evolution with the state that runs along: two generators and the next free index.

    Args:
        tournament: How parents are selected.
        mutations: How children are mutated.
    """

    def __init__(self, tournament: TournamentSelection, mutations: Mutations) -> None:
        """Seed the two generators."""
        self.tournament = tournament
        self.mutations = mutations
        self.next_index = 0
        # The second number keeps the streams apart when both seeds are the same, as they are by default.
        self._tournament_rng = np.random.default_rng([tournament.rand_seed, 0])
        self._mutation_rng = np.random.default_rng([mutations.rand_seed, 1])

    def plan(self, members: Sequence[Member], hp_config: HyperparameterConfig | None, generation: int) -> EvolutionPlan:
        """Plan the next generation with `plan_evolution`, whose arguments and errors these are.

        New agents get indices that neither a member nor any agent of an earlier plan had.
        """
        plan = plan_evolution(
            members,
            generation=generation,
            tournament=self.tournament,
            mutations=self.mutations,
            hp_config=hp_config,
            next_index=max([self.next_index, *(member.index + 1 for member in members)]),
            tournament_rng=self._tournament_rng,
            mutation_rng=self._mutation_rng,
        )
        self.next_index = 1 + max([*plan.fitnesses, *(birth.index for birth in plan.births)])
        return plan

    def state_dict(self) -> dict[str, Any]:
        """Return the next index and both generator states as plain JSON values."""
        return {
            "next_index": self.next_index,
            "tournament_rng": self._tournament_rng.bit_generator.state,
            "mutation_rng": self._mutation_rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: If `state` is not such a state; this object is as before then.
        """
        try:
            next_index = int(state["next_index"])
            tournament_rng, mutation_rng = (_generator(state[name]) for name in ("tournament_rng", "mutation_rng"))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the state of evolution is incomplete or from elsewhere: {error!r}") from error
        self.next_index, self._tournament_rng, self._mutation_rng = next_index, tournament_rng, mutation_rng


def _generator(state: Mapping[str, Any]) -> np.random.Generator:
    rng = np.random.default_rng(0)
    rng.bit_generator.state = state
    return rng


def carry_out(plan: EvolutionPlan, population: Sequence[AgentT]) -> list[AgentT]:
    """Turn the population that a plan was made for into the next generation.

    Agents without a child are released before anything is cloned, and the last child of a parent that does not survive
    takes over the parent's own object, so there are never more agents than the population's size. A kept elite is not
    touched.

    Args:
        plan: Made from this population.
        population: The agents; the objects are reused, so it is used up by the call.

    Returns:
        The next generation in slot order, a kept elite first.

    Raises:
        ConfigurationError: If the plan was made for other agents. Nothing has been changed then.
    """
    by_index: dict[int | None, AgentT] = {agent.index: agent for agent in population}
    parents = [birth.parent for birth in plan.births]
    if len(by_index) != len(population) or set(by_index) != set(plan.fitnesses) or not set(parents) <= set(by_index):
        fix = f"the plan was made for the agents {sorted(plan.fitnesses)}; plan this population anew"
        raise ConfigurationError("population", [agent.index for agent in population], fix)
    for agent in population:
        if agent.index not in parents:
            agent.release()
    survivors = {birth.index for birth in plan.births}
    generation = []
    for slot, birth in enumerate(plan.births):
        parent = by_index[birth.parent]
        if birth.parent not in survivors and birth.parent not in parents[slot + 1 :]:
            parent.index = birth.index
            generation.append(_with_values(parent, birth))
        else:
            generation.append(parent if birth.elite else _with_values(parent.clone(birth.index), birth))
    return generation


def _with_values(agent: AgentT, birth: Birth) -> AgentT:
    agent.set_hyperparameters(birth.hyperparameters)
    if birth.mutations:
        agent.mutation_hook()
    return agent
