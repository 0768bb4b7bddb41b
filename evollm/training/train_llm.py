"""What users call to train."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from evollm.algorithms import ALGORITHMS, DPO, SFT, Algorithm, algorithm_of
from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints import only_writer
from evollm.checks import boolean
from evollm.errors import ConfigurationError
from evollm.foreign import LOOP, LOOP_ORDER, explains
from evollm.hpo import Mutations, Search, TournamentSelection, likelihood_fitness, preference_fitness
from evollm.llm_envs import DatasetGym, PreferenceGym, SFTGym
from evollm.processes import check_processes
from evollm.runs.events import Callback
from evollm.runs.writer import RunFolder
from evollm.tracking import TRACKERS, Console, tracker_names
from evollm.training.options import RunOptions, RunPaths, check_callbacks, check_run, new_run_dir
from evollm.training.population_step import FitnessFunction, check_fitness
from evollm.training.run import Run

if TYPE_CHECKING:
    from accelerate import Accelerator

A = TypeVar("A", bound=SavableAgent)


@explains(LOOP, LOOP_ORDER)
def finetune_llm_preference(
    pop: Sequence[DPO],
    env: PreferenceGym,
    *,
    num_epochs: int | None = None,
    max_steps: int | None = None,
    evo_steps: int | None = None,
    evaluation_interval: int | None = None,
    tournament: TournamentSelection | None = None,
    mutation: Mutations | None = None,
    search: Search | str | None = None,
    fitness: FitnessFunction = preference_fitness,
    update_reference_each_epoch: bool = False,
    run_dir: str | Path | None = None,
    checkpoint_steps: int | None = None,
    keep_last: int | None = 2,
    checkpoint_path: str | Path | None = None,
    save_elite: bool = True,
    elite_path: str | Path | None = None,
    resume_from_checkpoint: str | Path | None = None,
    num_sample_answers: int = 3,
    callbacks: Sequence[Callback] = (),
    accelerator: Accelerator | None = None,
    report_to: str | Sequence[str] | None = None,
    wb: bool = False,
    tensorboard: bool = False,
    verbose: bool = True,
) -> tuple[list[DPO], list[float]]:
    """Tune a population on preference pairs, and let it evolve.

    Every unit is a step: one batch for every agent. All agents see the same batches in the same order, and are scored
    on the same held-out pairs.

    Args:
        pop: The agents, on one base. A list of one is an ordinary DPO run. Evolution uses a population up: agents that
            leave are released and others get new numbers, so go on with the population that is returned.
        env: Serves the batches; the run begins at its present position.
        num_epochs: Passes over the training pairs; 1 when `max_steps` is not given either.
        max_steps: Steps at most, whatever `num_epochs` says.
        evo_steps: Steps between two evolutions, by default an epoch. The run does not end with an evolution. Other
            searches take it as the steps to their first decision.
        evaluation_interval: Steps between two evaluations, by default those between two evolutions, else an epoch.
            Before each evolution and at the end there is one in any case, if the gym has a test_dataset.
        tournament: Selects the parents; evolution needs this and `mutation`.
        mutation: Mutates the children.
        search: Another search instead of these two: an object with the methods of `evollm.hpo.Search`, or the name of
            one, "tournament" or "successive_halving". The population may then grow and shrink.
        fitness: From an `Evaluation` to a number or a tuple of numbers, larger is better. The default is the
            preference accuracy, then the mean margin; neither contains beta.
        update_reference_each_epoch: Make each agent's actor its reference after every epoch but the last. Scores stay
            relative to the first agent's reference at the start.
        run_dir: Run folder, by default a new one in `evollm-runs`.
        checkpoint_steps: Steps between two checkpoints of the whole population; there is one at the end, too. By
            default those between two evolutions, else an epoch; 0: none.
        keep_last: Checkpoints to keep, the newest; None: all.
        checkpoint_path: Where they go, by default `checkpoints` in the run folder.
        save_elite: Save the fittest agent at the end.
        elite_path: Where it goes, by default `elite` in the run folder.
        resume_from_checkpoint: Folder of a run that was interrupted, to go on from its newest whole checkpoint with the
            same bits. Agents, gym and arguments must be made as they were for that run: their state is replaced. A
            larger `num_epochs` or `max_steps` goes on with a run that had ended.
        num_sample_answers: Held-out prompts to answer before and after, for the eye.
        callbacks: Further callbacks.
        accelerator: As given to the agents and the gym. Of several processes each computes a share of every batch, all
            do the same with the results, and the main one writes; your own callbacks are called in all of them.
        report_to: Trackers to write to as well: "tensorboard", "wandb", "trackio" or a list of these, each an extra of
            that name; "none" or None: none. A resumed run goes on with the run that its tracker knows.
        wb: The same as `report_to="wandb"`.
        tensorboard: The same as `report_to="tensorboard"`.
        verbose: Show progress, tables and the result in the terminal.

    Returns:
        The population after the run, and for each agent the first component of its last fitness: with the default
        fitness its preference accuracy. NaN for a diverged agent, and for all when there is nothing to evaluate on.

    Raises:
        ConfigurationError: Something cannot work; found before any training.
        CheckpointError: Every checkpoint of the run to resume is damaged, or another process writes to the folder.
        DivergedError: Every agent's loss or gradient has become NaN or infinite.
    """
    return _finetune(ALGORITHMS["dpo"], **locals())


@explains(LOOP, LOOP_ORDER)
def finetune_llm_sft(
    pop: Sequence[SFT],
    env: SFTGym,
    *,
    num_epochs: int | None = None,
    max_steps: int | None = None,
    evo_steps: int | None = None,
    evaluation_interval: int | None = None,
    tournament: TournamentSelection | None = None,
    mutation: Mutations | None = None,
    search: Search | str | None = None,
    fitness: FitnessFunction = likelihood_fitness,
    run_dir: str | Path | None = None,
    checkpoint_steps: int | None = None,
    keep_last: int | None = 2,
    checkpoint_path: str | Path | None = None,
    save_elite: bool = True,
    elite_path: str | Path | None = None,
    resume_from_checkpoint: str | Path | None = None,
    num_sample_answers: int = 3,
    callbacks: Sequence[Callback] = (),
    accelerator: Accelerator | None = None,
    report_to: str | Sequence[str] | None = None,
    wb: bool = False,
    tensorboard: bool = False,
    verbose: bool = True,
) -> tuple[list[SFT], list[float]]:
    """Tune a population on completions, and let it evolve: the stage before preferences.

    The loop is that of `finetune_llm_preference`, whose arguments these are; those that differ:

    Args:
        pop: SFT agents, on one base. A list of one is an ordinary SFT run. Go on with the population that is returned.
        env: Serves the batches; the run begins at its present position.
        num_epochs: As for preferences, as are all that follow but `fitness`.
        max_steps: As for preferences.
        evo_steps: As for preferences.
        evaluation_interval: As for preferences.
        tournament: As for preferences.
        mutation: As for preferences.
        search: As for preferences.
        fitness: From a `LikelihoodEvaluation` to a number or a tuple of numbers, larger is better. The default is minus
            the mean negative log-likelihood of a held-out completion token.
        run_dir: As for preferences.
        checkpoint_steps: As for preferences.
        keep_last: As for preferences.
        checkpoint_path: As for preferences.
        save_elite: As for preferences.
        elite_path: As for preferences; a DPO agent's `load_checkpoint` takes the folder for its next stage.
        resume_from_checkpoint: As for preferences.
        num_sample_answers: As for preferences; the answers before are those of the base.
        callbacks: As for preferences.
        accelerator: As for preferences.
        report_to: As for preferences.
        wb: As for preferences.
        tensorboard: As for preferences.
        verbose: As for preferences.

    Returns:
        The population after the run, and for each agent the first component of its last fitness: with the default
        fitness minus its held-out loss, in nats per token. NaN for a diverged agent, and for all when there is nothing
        to evaluate on.

    Raises:
        ConfigurationError: Something cannot work; found before any training.
        CheckpointError: Every checkpoint of the run to resume is damaged, or another process writes to the folder.
        DivergedError: Every agent's loss or gradient has become NaN or infinite.
    """
    return _finetune(ALGORITHMS["sft"], **locals())


@explains(LOOP, LOOP_ORDER)
def finetune(pop: Sequence[A], env: DatasetGym, **arguments: Any) -> tuple[list[A], list[float]]:
    """Tune a population of any algorithm, such as one of your own, and let it evolve.

    Args:
        pop: Agents of one algorithm, on one base.
        env: A gym of the algorithm's kind.
        **arguments: Those of `finetune_llm_preference`. Without a `fitness` it is the algorithm's own.

    Returns:
        The population after the run, and for each agent the first component of its last fitness.

    Raises:
        ConfigurationError, CheckpointError, DivergedError: As `finetune_llm_preference` does.
    """
    algorithm = algorithm_of(pop[0] if isinstance(pop, Sequence) and pop else pop)
    given = inspect.signature(finetune).bind(pop, env, **{"fitness": algorithm.fitness, **arguments})
    given.apply_defaults()
    return _finetune(algorithm, **given.arguments)


# No argument is listed twice.
_parameters = dict(inspect.signature(finetune_llm_preference).parameters)
_parameters["fitness"] = _parameters["fitness"].replace(default=None)
finetune.__signature__ = inspect.Signature([*_parameters.values()])  # type: ignore[attr-defined]


def _finetune(
    algorithm: Algorithm,
    pop: Sequence[A],
    env: DatasetGym,
    *,
    fitness: FitnessFunction,
    run_dir: str | Path | None,
    checkpoint_path: str | Path | None,
    elite_path: str | Path | None,
    resume_from_checkpoint: str | Path | None,
    callbacks: Sequence[Callback],
    accelerator: Accelerator | None,
    report_to: str | Sequence[str] | None,
    wb: bool,
    tensorboard: bool,
    verbose: bool,
    **options: Any,
) -> tuple[list[A], list[float]]:
    """Check everything, then run; `options` are the fields of `RunOptions`."""
    asked = RunOptions(**{"update_reference_each_epoch": False, **options})
    check_run(pop, env, asked, algorithm)
    check_fitness(fitness, algorithm)
    processes = check_processes(accelerator)
    if run_dir is None and resume_from_checkpoint is None:
        # Its name is the time, which differs a little between processes.
        run_dir = processes.from_main(str(new_run_dir()))
    paths = RunPaths.of(run_dir, checkpoint_path, elite_path, resume_from_checkpoint)
    # Before the main process writes into the folder that others still check.
    processes.wait()
    listeners = list(check_callbacks(callbacks))
    boolean("verbose", verbose)
    trackers = tracker_names(report_to, wb=wb, tensorboard=tensorboard)
    if processes.is_main:
        # Trackers first: one that cannot start leaves no run folder behind, which would be in the way next time.
        writers = [*(TRACKERS[name]() for name in trackers), RunFolder(torch.cuda.max_memory_allocated)]
        listeners = [*writers, *listeners, *([Console()] if verbose else [])]
    run = Run(pop, env, asked, paths, fitness, listeners)
    with _only_writer(paths) if processes.is_main else nullcontext():
        if resume_from_checkpoint is not None:
            run.resume()
        return run.train()


@contextmanager
def _only_writer(paths: RunPaths) -> Iterator[None]:
    """Have the run folder, and a folder of checkpoints apart from it, for this run alone."""
    with ExitStack() as stack:
        apart = paths.run_dir not in paths.checkpoints.parents
        for folder in [paths.run_dir, *([paths.checkpoints] if apart else [])]:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(only_writer(folder, what=folder))
            except OSError as error:
                raise ConfigurationError("run_dir", str(folder), f"cannot be written: {error}") from error
        yield
