"""Hyperparameter search on plain data: fitness, search strategies, lineage. It imports neither torch nor agents."""

from evollm.hpo.asha import ASHA
from evollm.hpo.finalists import FinalCandidates, Recipe, final_candidates_of
from evollm.hpo.fitness import (
    AnyEvaluation,
    Evaluation,
    Fitness,
    LikelihoodEvaluation,
    RewardEvaluation,
    UnpairedEvaluation,
    as_fitness,
    is_finite,
    rank,
)
from evollm.hpo.grid_search import GridSearch
from evollm.hpo.guards import AnswerSampling, Guards, guards_of
from evollm.hpo.hyperparameters import HyperparameterConfig, RLParameter
from evollm.hpo.judge import AnswerPair, Judge, judge_of
from evollm.hpo.lineage import Birth, EvolutionPlan, ancestry
from evollm.hpo.multi_frequency_pbt import MultiFrequencyPBT
from evollm.hpo.mutation import Mutation, Mutations, format_value, mutate
from evollm.hpo.optuna_search import OptunaSearch
from evollm.hpo.pb2 import PB2
from evollm.hpo.population_based_training import PopulationBasedTraining
from evollm.hpo.racing import growing_subsets, survivors
from evollm.hpo.racing_search import Racing
from evollm.hpo.random_search import RandomSearch
from evollm.hpo.scores import (
    LIKELIHOOD_FITNESSES,
    PREFERENCE_FITNESSES,
    REWARD_FITNESSES,
    UNPAIRED_FITNESSES,
    WIN_RATE,
    NamedFitness,
    best_temperature,
    fitness_named,
    likelihood_fitness,
    log_loss_terms,
    margin_over_std,
    margin_over_std_terms,
    preference_fitness,
    scale_free_log_loss,
)
from evollm.hpo.search import Result, Search, SearchBudget, SearchPlan, SearchStart
from evollm.hpo.strategies import STRATEGIES, search_of
from evollm.hpo.successive_halving import SuccessiveHalving
from evollm.hpo.tournament import TournamentSearch, TournamentSelection, check_population, plan_births, select_parents

__all__ = [
    "ASHA",
    "LIKELIHOOD_FITNESSES",
    "PB2",
    "PREFERENCE_FITNESSES",
    "REWARD_FITNESSES",
    "STRATEGIES",
    "UNPAIRED_FITNESSES",
    "WIN_RATE",
    "AnswerPair",
    "AnswerSampling",
    "AnyEvaluation",
    "Birth",
    "Evaluation",
    "EvolutionPlan",
    "FinalCandidates",
    "Fitness",
    "GridSearch",
    "Guards",
    "HyperparameterConfig",
    "Judge",
    "LikelihoodEvaluation",
    "MultiFrequencyPBT",
    "Mutation",
    "Mutations",
    "NamedFitness",
    "OptunaSearch",
    "PopulationBasedTraining",
    "RLParameter",
    "Racing",
    "RandomSearch",
    "Recipe",
    "Result",
    "RewardEvaluation",
    "Search",
    "SearchBudget",
    "SearchPlan",
    "SearchStart",
    "SuccessiveHalving",
    "TournamentSearch",
    "TournamentSelection",
    "UnpairedEvaluation",
    "ancestry",
    "as_fitness",
    "best_temperature",
    "check_population",
    "final_candidates_of",
    "fitness_named",
    "format_value",
    "growing_subsets",
    "guards_of",
    "is_finite",
    "judge_of",
    "likelihood_fitness",
    "log_loss_terms",
    "margin_over_std",
    "margin_over_std_terms",
    "mutate",
    "plan_births",
    "preference_fitness",
    "rank",
    "scale_free_log_loss",
    "search_of",
    "select_parents",
    "survivors",
]
