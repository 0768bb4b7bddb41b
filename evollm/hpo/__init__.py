"""Evolution of hyperparameters: fitness, selection, mutation, lineage. Knows agents only through `EvolvableAgent`."""

from evollm.hpo.evolution import EvolvableAgent, Evolver, Member, carry_out, plan_evolution
from evollm.hpo.fitness import (
    AnyEvaluation,
    Evaluation,
    Fitness,
    LikelihoodEvaluation,
    as_fitness,
    is_finite,
    likelihood_fitness,
    preference_fitness,
    rank,
)
from evollm.hpo.hyperparameters import HyperparameterConfig, RLParameter
from evollm.hpo.lineage import Birth, EvolutionPlan, ancestry
from evollm.hpo.mutation import Mutation, Mutations, format_value, mutate
from evollm.hpo.tournament import TournamentSelection, check_population, select_parents

__all__ = [
    "AnyEvaluation",
    "Birth",
    "Evaluation",
    "EvolutionPlan",
    "EvolvableAgent",
    "Evolver",
    "Fitness",
    "HyperparameterConfig",
    "LikelihoodEvaluation",
    "Member",
    "Mutation",
    "Mutations",
    "RLParameter",
    "TournamentSelection",
    "ancestry",
    "as_fitness",
    "carry_out",
    "check_population",
    "format_value",
    "is_finite",
    "likelihood_fitness",
    "mutate",
    "plan_evolution",
    "preference_fitness",
    "rank",
    "select_parents",
]
