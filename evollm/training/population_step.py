"""One batch for every agent, through the base together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from evollm.algorithms.dpo import DPO
from evollm.algorithms.dpo_step import evaluate_together, learn_together
from evollm.data.batch import PreferenceBatch
from evollm.errors import ConfigurationError, DivergedError
from evollm.hpo import Evaluation, Fitness, as_fitness
from evollm.llm_envs import PreferenceGym

FitnessFunction = Callable[[Evaluation], object]

# Neither a number nor comparable: the worst fitness there is.
DIVERGED_FITNESS: Fitness = (float("nan"),)


def check_fitness(fitness: object) -> None:
    """Try a fitness function on the evaluation of an untuned agent, before any training.

    Raises:
        ConfigurationError: It cannot be called, or returns something else than numbers.
    """
    if not callable(fitness):
        raise ConfigurationError(
            "fitness", fitness, "must be a function from an Evaluation to a number or a tuple of them"
        )
    as_fitness(fitness(Evaluation(np.zeros(2), np.zeros(2))))


def learn_all(population: Sequence[DPO], batch: PreferenceBatch) -> dict[int, dict[str, float]]:
    """Let every agent learn from the same batch.

    Returns:
        The metrics of `learn` by agent. An agent that has diverged, now or before, learns no more.

    Raises:
        DivergedError: No agent is left.
    """
    going = [agent for agent in population if not agent.diverged]
    metrics = {agent.index: found for agent, found in zip(going, learn_together(going, batch), strict=True)}
    if all(agent.diverged for agent in population):
        values = ", ".join(f"agent {agent.index}: {agent.hyperparameter_values()}" for agent in population)
        raise DivergedError(f"every agent's loss or gradient is not finite; lower lr or beta ({values})")
    return metrics


def evaluate_all(population: Sequence[DPO], env: PreferenceGym, reference: str | None) -> dict[int, Evaluation]:
    """Score every agent that has not diverged on the same selection pairs, against this reference."""
    going = [agent for agent in population if not agent.diverged]
    evaluations = evaluate_together(going, env, reference=reference)
    return {agent.index: evaluation for agent, evaluation in zip(going, evaluations, strict=True)}


def fitnesses_of(
    population: Sequence[DPO], evaluations: dict[int, Evaluation], fitness: FitnessFunction
) -> dict[int, Fitness]:
    """The fitness of every agent; that of a diverged one is not finite."""
    return {
        agent.index: as_fitness(fitness(evaluations[agent.index])) if agent.index in evaluations else DIVERGED_FITNESS
        for agent in population
    }
