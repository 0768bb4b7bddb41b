"""Check a user's arguments, all of them here and once, and make the run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch

from evollm.algorithms import Algorithm
from evollm.algorithms.input_checks import check_base, check_gym
from evollm.algorithms.saving import SavableAgent
from evollm.algorithms.settings import check_evolution
from evollm.checks import boolean
from evollm.errors import ConfigurationError
from evollm.execution.alike import check_same_options
from evollm.execution.crossover import check_crossover
from evollm.execution.executor import Combines, Executor, ExecutorFactory, check_executor
from evollm.execution.judged import JudgedExecutor, first_row
from evollm.execution.members import check_parallel, check_processes_per_worker, executor_of
from evollm.execution.named import RAY, executor_named
from evollm.hpo import (
    AnyEvaluation,
    Birth,
    Evaluation,
    FinalCandidates,
    Guards,
    Mutations,
    NamedFitness,
    SearchStart,
    as_fitness,
    fitness_named,
)
from evollm.hpo.fitness import TIE
from evollm.llm_envs import DatasetGym
from evollm.models.adapters.combining import check_combinable
from evollm.processes import Processes
from evollm.runs.events import Callback
from evollm.runs.writer import RunFolder
from evollm.tracking import TRACKERS, Console, tracker_names
from evollm.training.finalists import Contest, Terms
from evollm.training.options import RunOptions
from evollm.training.paths import RunPaths, new_run_dir
from evollm.training.run import Run
from evollm.training.schedule import Schedule

A = TypeVar("A", bound=SavableAgent)
# Maps an evaluation, whose type depends on the algorithm, to a number or a tuple of numbers.
FitnessFunction = Callable[[Any], object]
# Scores that tell candidates of `merge` apart best, whatever the algorithm.
_SMOOTH = ("log_loss", "loss", "auc")


@dataclass(frozen=True)
class RunArguments:
    """The arguments of a run, after all checks that need no agents.

    Attributes:
        algorithm: The algorithm of the agents.
        options: Options of the run.
        paths: Paths that the run writes to.
        fitness: Maps an evaluation to a fitness.
        callbacks: Called with every event, in this order.
        executor: Makes the executor of the agents and the gym.
        parallel: What several processes divide, if the executor is the default one.
        processes_per_worker: Processes that hold members together.
        terms: The terms of the score by which candidates of `merge` are compared; None without `merge`.
    """

    algorithm: Algorithm
    options: RunOptions
    paths: RunPaths
    fitness: FitnessFunction
    callbacks: Sequence[Callback]
    executor: ExecutorFactory
    parallel: str
    processes_per_worker: int
    terms: Terms | None = None


def check_paths(
    processes: Processes, run_dir: object, checkpoint_path: object, elite_path: object, resume_from_checkpoint: object
) -> RunPaths:
    """The paths that a run writes to, the same in all processes.

    Raises:
        ConfigurationError: A path cannot be written, or holds files that would be lost.
        CheckpointError: The settings of the run to resume are damaged.
    """
    # Named after the time, which differs a little between processes. All take part, also one that was given a folder.
    new = processes.from_main(str(new_run_dir()))
    if run_dir is None and resume_from_checkpoint is None:
        run_dir = new
    return RunPaths.of(run_dir, checkpoint_path, elite_path, resume_from_checkpoint)


def check_arguments(
    algorithm: Algorithm,
    processes: Processes,
    paths: RunPaths,
    *,
    fitness: FitnessFunction | str | None,
    callbacks: Sequence[Callback],
    executor: ExecutorFactory | str,
    workers: int | None,
    resources_per_worker: Mapping[str, float] | None,
    ray_address: str | None,
    parallel: str,
    processes_per_worker: int,
    report_to: str | Sequence[str] | None,
    wb: bool,
    tensorboard: bool,
    verbose: bool,
    **options: Any,
) -> RunArguments:
    """Check the arguments of a run; `options` are the fields of `RunOptions`.

    Raises:
        ConfigurationError: An argument is invalid, or means nothing for the algorithm.
        MissingExtraError: A tracker is not installed.
    """
    asked = RunOptions(**{"update_reference_each_epoch": False, "guards": None, **options})
    if asked.bounds.of_pairs and not isinstance(algorithm.trial, Evaluation):
        fix = f"need the log-ratios of pairs, which {algorithm.name} does not evaluate: leave them out"
        raise ConfigurationError("guards", ", ".join(asked.bounds.of_pairs), fix)
    if asked.budget is not None and algorithm.collect is not None:
        fix = f"cannot be planned for {algorithm.name}, whose batches are not known before: give max_member_steps"
        raise ConfigurationError("budget", asked.budget, fix)
    if asked.bounds.max_kl is not None:
        # Answers are sampled by the executor, whatever the algorithm.
        _check_measurable(Guards(max_kl=asked.bounds.max_kl), algorithm.evaluate, algorithm.name)
    trial = algorithm.trial
    if asked.judging is not None:
        if "win_rates" not in {one.name for one in fields(trial)}:
            fix = f"needs evaluations with win_rates, which {algorithm.name} does not have: leave it out"
            raise ConfigurationError("judge", asked.judging.name, fix)
        trial = replace(trial, win_rates=np.full(len(trial), TIE))
    function = check_fitness(fitness, algorithm, trial)
    if executor == RAY and processes.size > 1:
        fix = "starts its workers by itself: start one process, without torchrun or accelerate launch"
        raise ConfigurationError("executor", RAY, fix)
    make_executor = executor_named(executor, workers, resources_per_worker, ray_address)
    check_parallel(parallel, make_executor)
    size = check_processes_per_worker(processes_per_worker, parallel, processes.size)
    listeners = list(check_callbacks(callbacks))
    boolean("verbose", verbose)
    trackers = tracker_names(report_to, wb=wb, tensorboard=tensorboard)
    if processes.is_main:
        # Trackers start before the run folder is written: a failed start leaves no folder that blocks the next run.
        writers = [*(TRACKERS[name]() for name in trackers), RunFolder(torch.cuda.max_memory_allocated)]
        listeners = [*writers, *listeners, *([Console()] if verbose else [])]
    terms = None if asked.candidates is None else _terms(asked.candidates, algorithm, trial)
    return RunArguments(algorithm, asked, paths, function, listeners, make_executor, parallel, size, terms)


def _terms(merge: FinalCandidates, algorithm: Algorithm, trial: AnyEvaluation) -> Terms:
    """The terms of the score by which candidates are compared.

    Raises:
        ConfigurationError: The algorithm has no such score, or it has no terms.
    """
    smooth = next((name for name in (*_SMOOTH, *algorithm.fitnesses) if name in algorithm.fitnesses), "")
    fitness = fitness_named(merge.score or smooth, algorithm.fitnesses)
    if not isinstance(fitness, NamedFitness):
        raise ConfigurationError("merge.score", merge.score, "must be an evollm.hpo.NamedFitness, which has terms")
    fitness.terms(trial)
    return fitness.terms


def prepare(pop: Sequence[A], env: DatasetGym, arguments: RunArguments) -> Run:
    """Make a run of agents and gym, ready for `train`.

    Raises:
        ConfigurationError: Agents, gym and arguments do not fit together.
    """
    check_run(pop, env, arguments.options, arguments.algorithm)
    _check_same(arguments)
    total = Schedule.of(arguments.options, len(env), held_out=bool(env.test_pairs)).total
    for agent in pop:
        agent.num_training_steps = total
    executor = executor_of(arguments.parallel, arguments.executor, pop, arguments.processes_per_worker)(pop, env)
    check_executor(executor)
    _check_measurable(arguments.options.bounds, executor.evaluate, type(executor).__name__)
    contest, options = None, arguments.options
    if options.judging is not None:
        executor = cast(Executor, JudgedExecutor(executor, options.judging, first_row(env)))
    if options.candidates is not None and arguments.terms is not None:
        if not all(callable(getattr(executor, name, None)) for name in ("combine", "discard")):
            fix = "cannot make candidates of agents (evollm.execution.executor.Combines): leave merge out"
            raise ConfigurationError("executor", type(executor).__name__, fix)
        contest = Contest(cast(Combines, executor), options.candidates, arguments.terms, options.bounds)
    return Run(executor, options, arguments.paths, arguments.fitness, arguments.callbacks, contest)


def _check_same(arguments: RunArguments) -> None:
    """Refuse arguments that differ between processes, but for those of the search, whose plans the main process makes.

    Raises:
        ConfigurationError: An argument differs.
    """
    options, search = arguments.options.to_dict(), arguments.options.strategy()
    same = {name: value for name, value in options.items() if name not in ("tournament", "mutation", "search")}
    same |= {"parallel": arguments.parallel, "processes_per_worker": arguments.processes_per_worker}
    same |= {"search": search and type(search).__name__, "resume_from_checkpoint": arguments.paths.resumes}
    check_same_options(Processes.present(), same)


def check_fitness(fitness: object, algorithm: Algorithm, trial: AnyEvaluation | None = None) -> FitnessFunction:
    """Return a fitness function: that of a name, or the algorithm's for None.

    It is called with the evaluation of an untuned agent, before any training; by default the algorithm's `trial`.

    Raises:
        ConfigurationError: The fitness is neither a function nor a known name, or returns something else than numbers.
    """
    if isinstance(fitness, str):
        fitness = fitness_named(fitness, algorithm.fitnesses)
    function = algorithm.fitness if fitness is None else fitness
    if not callable(function):
        fix = "must be a function from an Evaluation to a number or a tuple of them, or the name of one"
        raise ConfigurationError("fitness", fitness, fix)
    as_fitness(function(algorithm.trial if trial is None else trial))
    return function


def _check_room_for_judged(agent: SavableAgent, env: DatasetGym, options: RunOptions) -> None:
    """Refuse answers for a judge that do not fit into the base's positions."""
    limit = agent.base.max_positions
    if options.judging is None or limit is None or agent.base.is_encoder_decoder:
        return
    longest = max((len(pair.prompt_ids) for pair in (*env.test_pairs, *env.final_pairs)), default=0)
    most = options.judging.max_new_tokens
    if longest + most > limit:
        fix = f"and the longest prompt, of {longest} tokens, do not fit into the base's {limit} positions: lower it"
        raise ConfigurationError("judge.max_new_tokens", most, fix)


def _check_measurable(guards: Guards, evaluate: Callable[..., object], owner: str) -> None:
    """Refuse a bound on the KL or on answers where `evaluate` cannot measure them."""
    for name in guards.measurements.keys() - inspect.signature(evaluate).parameters.keys():
        bound = {"kl": "max_kl", "answers": "max_answer_length_ratio"}[name]
        fix = f"needs an argument {name} of evaluate, which {owner} lacks"
        raise ConfigurationError(f"guards.{bound}", getattr(guards, bound), fix)


def check_callbacks(callbacks: Sequence[Callback]) -> Sequence[Callback]:
    """Refuse anything but a list of callbacks.

    Raises:
        ConfigurationError: `callbacks` is no list, or an item is no `Callback`.
    """
    if not isinstance(callbacks, Sequence) or not all(isinstance(item, Callback) for item in callbacks):
        raise ConfigurationError("callbacks", callbacks, "must be a list of instances of children of evollm.Callback")
    return callbacks


def check_run(population: Sequence[SavableAgent], env: DatasetGym, options: RunOptions, algorithm: Algorithm) -> None:
    """Refuse a population, an environment or options that cannot work, before any training.

    Raises:
        ConfigurationError: The population, the environment and the options do not fit together.
    """
    _check_types(population, env, algorithm)
    _check_room_for_judged(population[0], env, options)
    if len({id(agent.base) for agent in population}) > 1:
        names = sorted({agent.base.name for agent in population})
        raise ConfigurationError("pop", names, "agents of different bases: build all on one, with DPO.population")
    indices = [agent.index for agent in population]
    if len(set(indices)) != len(indices):
        raise ConfigurationError("index", indices, "two agents have the same number: give each its own index")
    if options.update_reference_each_epoch and any(agent.adapter("reference") is None for agent in population):
        raise ConfigurationError(
            "update_reference_each_epoch", True, "the reference is the base itself: use_separate_reference_adapter=True"
        )
    needing = {"guards need": options.guards, "merge needs": options.candidates, "a judge needs": options.judging}
    for who, asked in needing.items():
        if asked is not None and not env.test_pairs:
            fix = f"{who} held-out rows: pass a test_dataset to the gym"
            raise ConfigurationError("test_dataset", None, fix)
    if options.candidates is not None:
        actors = [agent.actor_adapter for agent in population]
        check_combinable(population[0].base, actors, options.candidates.combinations)
    if options.early_stopping_patience is not None and not env.test_pairs:
        fix = "early stopping needs held-out rows: pass a test_dataset to the gym"
        raise ConfigurationError("early_stopping_patience", options.early_stopping_patience, fix)
    if options.evolves:
        if not env.test_pairs:
            raise ConfigurationError(
                "test_dataset", None, "evolution needs held-out rows: pass a test_dataset to the gym"
            )
        _check_evolution(population, options, Schedule.of(options, len(env), held_out=True))
    check_base(population[0].base, env)
    algorithm.check(population, env)


def _check_types(population: Sequence[SavableAgent], env: DatasetGym, algorithm: Algorithm) -> None:
    if not isinstance(population, Sequence) or not population:
        raise ConfigurationError("pop", population, "must be a list of at least one agent: [agent]")
    for agent in population:
        if not isinstance(agent, algorithm.agent):
            wanted = f"is not a {algorithm.agent.__name__} agent, which {algorithm.loop} tunes"
            raise ConfigurationError("pop", type(agent).__name__, f"{wanted}; of a wrapper pass what it wraps")
    check_gym(env, algorithm.gym, algorithm.loop)


def _decides(population: Sequence[SavableAgent], options: RunOptions) -> bool:
    """Whether the search ever decides; random and grid search do not."""
    founders = [Birth.fresh(agent.index, agent.hyperparameter_values()) for agent in population]
    search = options.strategy()
    return search is not None and search.start(SearchStart(founders, population[0].hp_config, 1)).steps is not None


def _check_evolution(population: Sequence[SavableAgent], options: RunOptions, schedule: Schedule) -> None:
    if schedule.evolve_every is not None and schedule.evolve_every >= schedule.total and _decides(population, options):
        total = schedule.total
        length, value = ("max_steps", total) if options.max_steps == total else ("num_epochs", options.num_epochs or 1)
        ends = f"the run ends after {total} step{'' if total == 1 else 's'}, before it could evolve"
        if total == 1 or options.evo_steps is None:
            # `tune` gives an `evo_steps` of its own, which is 1 here.
            raise ConfigurationError(length, value, f"{ends}: raise it{'' if total == 1 else ', or give evo_steps'}")
        raise ConfigurationError("evo_steps", options.evo_steps, f"{ends}: lower it, or raise {length}")
    config = population[0].hp_config
    for agent in population:
        if agent.hp_config != config:
            raise ConfigurationError(
                "hp_config", agent.hp_config, f"agent {agent.index}'s differs from the first agent's"
            )
        check_evolution(config, agent.hyperparameters, agent.settings)
    mutation = getattr(options.strategy(), "mutation", None)
    if isinstance(mutation, Mutations) and mutation.crossover > 0:
        check_crossover(population, mutation.crossover)
