"""One batch for every agent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evollm.algorithms.dpo import DPO
from evollm.data.batch import PreferenceBatch
from evollm.errors import DivergedError
from evollm.hpo import Evaluation, Fitness, as_fitness
from evollm.llm_envs import PreferenceGym

FitnessFunction = Callable[[Evaluation], object]

# Neither a number nor comparable: the worst fitness there is.
DIVERGED_FITNESS: Fitness = (float("nan"),)


def learn_all(population: Sequence[DPO], batch: PreferenceBatch) -> dict[int, dict[str, float]]:
    """Let every agent learn from the same batch.

    Returns:
        The metrics of `learn` by agent. An agent that has diverged, now or before, learns no more.

    Raises:
        DivergedError: No agent is left.
    """
    metrics = {agent.index: agent.learn(batch) for agent in population if not agent.diverged}
    if all(agent.diverged for agent in population):
        values = ", ".join(f"agent {agent.index}: {agent.hyperparameter_values()}" for agent in population)
        raise DivergedError(f"every agent's loss or gradient is not finite; lower lr or beta ({values})")
    return metrics


def evaluate_all(population: Sequence[DPO], env: PreferenceGym) -> dict[int, Evaluation]:
    """Score every agent that has not diverged on the same selection pairs."""
    return {agent.index: agent.evaluate(env) for agent in population if not agent.diverged}


def fitnesses_of(
    population: Sequence[DPO], evaluations: dict[int, Evaluation], fitness: FitnessFunction
) -> dict[int, Fitness]:
    """The fitness of every agent; that of a diverged one is not finite."""
    return {
        agent.index: as_fitness(fitness(evaluations[agent.index])) if agent.index in evaluations else DIVERGED_FITNESS
        for agent in population
    }
