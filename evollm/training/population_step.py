"""One batch for every agent, through the base together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from evollm.algorithms import Algorithm, algorithm_of
from evollm.algorithms.saving import SavableAgent
from evollm.algorithms.step import hyperparameters_to_lower
from evollm.data.batch import PreferenceBatch
from evollm.errors import ConfigurationError, DivergedError
from evollm.hpo import AnyEvaluation, Fitness, as_fitness
from evollm.llm_envs import DatasetGym

# From the evaluation of its algorithm to a number or a tuple of numbers.
FitnessFunction = Callable[[Any], object]

# Neither a number nor comparable: the worst fitness there is.
DIVERGED_FITNESS: Fitness = (float("nan"),)


def check_fitness(fitness: object, algorithm: Algorithm) -> None:
    """Try a fitness function on the evaluation of an untuned agent, before any training.

    Raises:
        ConfigurationError: It cannot be called, or returns something else than numbers.
    """
    if not callable(fitness):
        raise ConfigurationError(
            "fitness", fitness, "must be a function from an Evaluation to a number or a tuple of them"
        )
    as_fitness(fitness(algorithm.trial))


def learn_all(population: Sequence[SavableAgent], batch: PreferenceBatch) -> dict[int, dict[str, float]]:
    """Let every agent learn from the same batch.

    Returns:
        The metrics of `learn` by agent. An agent that has diverged, now or before, learns no more.

    Raises:
        DivergedError: No agent is left.
    """
    going = [agent for agent in population if not agent.diverged]
    learnt = algorithm_of(population[0]).learn(going, batch)
    metrics = {agent.index: found for agent, found in zip(going, learnt, strict=True)}
    if all(agent.diverged for agent in population):
        values = ", ".join(f"agent {agent.index}: {agent.hyperparameter_values()}" for agent in population)
        raise DivergedError(
            f"every agent's loss or gradient is not finite; lower {hyperparameters_to_lower(population)} ({values})"
        )
    return metrics


def evaluate_all(
    population: Sequence[SavableAgent], env: DatasetGym, reference: str | None
) -> dict[int, AnyEvaluation]:
    """Score every agent that has not diverged on the same held-out rows, against this reference where it has one."""
    going = [agent for agent in population if not agent.diverged]
    evaluations = algorithm_of(population[0]).evaluate(going, env, "test", reference)
    return {agent.index: evaluation for agent, evaluation in zip(going, evaluations, strict=True)}


def fitnesses_of(
    population: Sequence[SavableAgent], evaluations: dict[int, AnyEvaluation], fitness: FitnessFunction
) -> dict[int, Fitness]:
    """The fitness of every agent; that of a diverged one is not finite."""
    return {
        agent.index: as_fitness(fitness(evaluations[agent.index])) if agent.index in evaluations else DIVERGED_FITNESS
        for agent in population
    }
