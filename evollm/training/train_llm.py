"""The public functions for training: `finetune` and those of one algorithm each, such as `finetune_llm_sft`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

from evollm.algorithms import ALGORITHMS, DPO, GRPO, KTO, SFT, Algorithm, algorithm_of
from evollm.algorithms.saving import SavableAgent
from evollm.execution.executor import ExecutorFactory
from evollm.execution.members import DATA
from evollm.execution.named import LOCAL
from evollm.foreign import LOOP, LOOP_ORDER, explains
from evollm.hpo import FinalCandidates, Guards, Judge, Mutations, Search, TournamentSelection
from evollm.llm_envs import DatasetGym, PreferenceGym, RewardGym, SFTGym, UnpairedGym
from evollm.processes import check_processes
from evollm.runs.events import Callback
from evollm.training.prepare import FitnessFunction, check_arguments, check_paths, prepare

if TYPE_CHECKING:
    from accelerate import Accelerator

A = TypeVar("A", bound=SavableAgent)
GymT_contra = TypeVar("GymT_contra", bound=DatasetGym, contravariant=True)
P = ParamSpec("P")
Loop: TypeAlias = Callable[Concatenate[Sequence[A], GymT_contra, ...], tuple[list[A], list[float]]]


@explains(LOOP, LOOP_ORDER)
def finetune_llm_preference(
    pop: Sequence[DPO],
    env: PreferenceGym,
    *,
    num_epochs: int | None = None,
    max_steps: int | None = None,
    budget: float | None = None,
    max_member_steps: int | None = None,
    max_hours: float | None = None,
    evo_steps: int | None = None,
    evaluation_interval: int | None = None,
    tournament: TournamentSelection | None = None,
    mutation: Mutations | None = None,
    search: Search | str | None = None,
    fitness: FitnessFunction | str | None = None,
    guards: Guards | Mapping[str, float] | None = None,
    early_stopping_patience: int | None = None,
    early_stopping_threshold: float = 0.0,
    merge: FinalCandidates | Mapping[str, Any] | bool | None = None,
    judge: Judge | Callable[..., Any] | None = None,
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
    parallel: str = DATA,
    processes_per_worker: int = 1,
    executor: ExecutorFactory | str = LOCAL,
    workers: int | None = None,
    resources_per_worker: Mapping[str, float] | None = None,
    ray_address: str | None = None,
    report_to: str | Sequence[str] | None = None,
    wb: bool = False,
    tensorboard: bool = False,
    verbose: bool = True,
) -> tuple[list[DPO], list[float]]:
    """Tune a population on preference pairs, and evolve the population.

    All intervals are in steps; a step is one batch for every agent. All agents see the same batches in the same order,
    and are evaluated on the same held-out pairs.

    Args:
        pop: The agents, on one base. A list of one is an ordinary DPO run. Evolution releases agents and gives others
            new indices, so use the returned population afterwards, not `pop`.
        env: Serves the batches; the run begins at the gym's present position.
        num_epochs: Passes over the training pairs; 1 if `max_steps` is not given either.
        max_steps: Most steps of the run, even if `num_epochs` would give more.
        budget: Most compute of the run, in runs: one run is what one agent by itself needs for all steps, evaluations,
            references and final scores included. The run ends after the last whole step that fits, with its evaluation,
            the candidates of `merge` and the final scores; the budget is not exceeded by more than a step. A second
            agent is scored only if that fits, and a decision whose members cannot make a step is not carried out. A
            search may plan by it (`SearchStart.budget`), so that a resumed run can change neither the budget nor the
            number of steps.
        max_member_steps: Most steps, added up over the members; a resumed run may have more.
        max_hours: Most hours, those before a resume included up to its checkpoint. The run ends after the step in which
            they are over, so that it cannot be reproduced; a resumed run may have more.
        evo_steps: Steps between two evolutions, by default an epoch. No evolution follows the last step. Other
            searches take this as the number of steps before their first decision.
        evaluation_interval: Steps between two evaluations, by default `evo_steps` with evolution, else an epoch.
            A race is evaluated at its rungs and at the end alone, unless there is an `early_stopping_patience`.
            If the gym has a test_dataset, the run also evaluates before each evolution and at the end.
        tournament: Selects the parents; evolution needs `tournament` and `mutation`.
        mutation: Mutates the children.
        search: A search instead of `tournament` and `mutation`: an object with the methods of `evollm.hpo.Search`, or
            a name of `evollm.hpo.STRATEGIES`, such as "asha". The population may then grow and shrink.
        fitness: Maps an `Evaluation` to a number or a tuple of numbers; larger is better. Or a name of
            `evollm.hpo.PREFERENCE_FITNESSES`: "accuracy", "log_loss", "margin_over_std", "mean_margin" or the default
            "accuracy_mean_margin", the preference accuracy, then the mean margin. None of them contains beta. With a
            `judge` also "win_rate".
        guards: Bounds that come before the fitness, as `evollm.hpo.Guards` or a mapping of its fields, such as
            `{"min_chosen_logratio": -3.0}`: an agent that breaks one is behind every agent that breaks none.
        early_stopping_patience: Stop after this many evaluations in a row in which no agent has improved the best
            fitness of the run, by its first component, or while all agents break a guard, by how far; None: never.
            An evaluation on a part of the rows, for a decision of the search, does not count.
            Names and meaning are those of transformers' `EarlyStoppingCallback`.
        early_stopping_threshold: The best fitness must grow by more than this to count as improved.
        merge: After the last step, evaluate adapters that are made of the best agents without training, and let one win
            that is better than the best agent by a paired test on the held-out rows: True, or
            `evollm.hpo.FinalCandidates` or a mapping of its fields, such as {"finalists": 3, "factors": [1.5]}. None:
            the best agent wins.
        judge: Compares answers that the agents generate to held-out prompts with the reference's answers: an
            `evollm.hpo.Judge`, or a function for it, `judge(prompts, first, second)` or a reward function
            `reward(prompts, completions)`. Every evaluation then has a win rate. None: no answers are generated for it.
        update_reference_each_epoch: Make each agent's actor its reference after every epoch but the last. Scores stay
            relative to the first agent's reference at the start.
        run_dir: Run folder, by default a new folder in `evollm-runs`.
        checkpoint_steps: Steps between two checkpoints of the whole population; the run also saves one at the end. By
            default `evo_steps` with evolution, else an epoch; 0: no checkpoints.
        keep_last: How many of the newest checkpoints to keep; None: all.
        checkpoint_path: Folder of the checkpoints, by default `checkpoints` in the run folder.
        save_elite: Save the fittest agent at the end, as it was at the best evaluation of the run.
        elite_path: Folder of the fittest agent, by default `elite` in the run folder.
        resume_from_checkpoint: Folder of an interrupted run, which resumes bit-exactly from its newest undamaged
            checkpoint. Pass agents, gym and arguments made as for that run; the checkpoint replaces their state. A
            larger `num_epochs` or `max_steps` extends a run that has ended, unless it has a `budget` or a learning rate
            schedule over the number of steps.
        num_sample_answers: Held-out prompts that are answered before and after tuning, for users to read.
        callbacks: Further callbacks.
        accelerator: The accelerator given to the agents and the gym. Of several processes only the main one writes;
            your own callbacks are called in every process.
        parallel: What several processes divide. "data": each has all agents and computes a share of every batch, and
            all make the same updates. "members": each has a share of the agents and trains them on whole batches by
            itself, without any traffic of gradients. "auto": members if there are at least as many as processes and
            nothing is sharded (DeepSpeed, FSDP), else data. A run may go on with another value.
        processes_per_worker: With `parallel="members"`, how many processes, of consecutive ranks, have a share of the
            agents together: they divide the batches of these agents, and a base that FSDP shards is sharded over them.
            It divides the number of processes. A run may go on with another value.
        executor: Where the agents are: "local", in this process; "ray", on workers of a Ray cluster, for which the base
            must have a name or folder that every worker can load; or a class or function from agents and gym to an
            `evollm.execution.executor.Executor`.
        workers: With Ray, the number of workers among which the agents are divided; None: one for each agent, as far as
            the cluster has room.
        resources_per_worker: With Ray, what each worker needs, by Ray's names, such as `{"CPU": 2, "GPU": 0.5}`; None:
            one CPU, and one GPU if the cluster has any.
        ray_address: With Ray, the address of a cluster; None: the one that `ray.init` finds, or a new one on this
            machine for this run.
        report_to: Trackers to write to as well: "tensorboard", "wandb", "trackio" or a list of these, each an extra of
            that name; "none" or None: none. A resumed run continues its run in the tracker.
        wb: The same as `report_to="wandb"`.
        tensorboard: The same as `report_to="tensorboard"`.
        verbose: Show progress, tables and the result in the terminal.

    Returns:
        The population at the end, which may lack the fittest agent of the run, and for each agent the first component
        of its last fitness: with the default fitness its preference accuracy. NaN for a diverged agent, and for all
        agents without held-out rows.

    Raises:
        ConfigurationError: An argument is invalid; raised before any training.
        CheckpointError: Every checkpoint of the run to resume is damaged, or another process writes to the folder.
        DivergedError: Every agent's loss or gradient has become NaN or infinite, and none was evaluated before.
        WorkerError: A worker is out of memory, or was lost and cannot be replaced.
    """
    return _finetune(ALGORITHMS["dpo"], **locals())


class _Checked(Protocol[A, GymT_contra, P]):
    """Type of a decorated loop: its own types of agents and gym, and the keyword arguments P of another loop."""

    def __call__(
        self, pop: Sequence[A], env: GymT_contra, *args: P.args, **arguments: P.kwargs
    ) -> tuple[list[A], list[float]]: ...


def _with_arguments_of(
    listed: Callable[Concatenate[Sequence[DPO], PreferenceGym, P], object], *without: str
) -> Callable[[Loop[A, GymT_contra]], _Checked[A, GymT_contra, P]]:
    """Give a loop the keyword arguments of `listed` except those in `without`, so that one signature lists them."""

    def decorate(loop: Loop[A, GymT_contra]) -> _Checked[A, GymT_contra, P]:
        own = inspect.signature(loop)
        by_place = [one for one in own.parameters.values() if one.kind is not one.VAR_KEYWORD]
        by_name = [one for one in inspect.signature(listed).parameters.values() if one.kind is one.KEYWORD_ONLY]
        signature = own.replace(parameters=[*by_place, *(one for one in by_name if one.name not in without)])

        @wraps(loop)
        def complete(*args: Any, **arguments: Any) -> Any:
            given = signature.bind(*args, **arguments)
            given.apply_defaults()
            return loop(*given.args, **given.kwargs)

        complete.__signature__ = signature  # type: ignore[attr-defined]
        return explains(LOOP, LOOP_ORDER)(complete)

    return decorate


@_with_arguments_of(finetune_llm_preference, "update_reference_each_epoch", "guards")
def finetune_llm_sft(pop: Sequence[SFT], env: SFTGym, **arguments: Any) -> tuple[list[SFT], list[float]]:
    """Tune a population on completions, the stage before preference tuning, and evolve the population.

    Args:
        pop: SFT agents, on one base. A list of one is an ordinary SFT run. Use the returned population afterwards.
        env: Serves the batches; the run begins at the gym's present position.
        **arguments: Those of `finetune_llm_preference` except `update_reference_each_epoch` and `guards`. A `fitness`
            function takes a `LikelihoodEvaluation`; the default fitness, "loss", is minus the mean negative
            log-likelihood of a held-out completion token. For preference tuning, pass the folder at `elite_path` to a
            DPO agent's `load_checkpoint`. The base gives the sample answers before tuning.

    Returns:
        The population at the end, which may lack the fittest agent of the run, and for each agent the first component
        of its last fitness: with the default fitness minus its held-out loss, in nats per token. NaN for a diverged
        agent, and for all agents without held-out rows.

    Raises:
        ConfigurationError, CheckpointError, DivergedError: As `finetune_llm_preference` does.
    """
    return _finetune(ALGORITHMS["sft"], pop, env, **arguments)


@_with_arguments_of(finetune_llm_preference, "guards")
def finetune_llm_kto(pop: Sequence[KTO], env: UnpairedGym, **arguments: Any) -> tuple[list[KTO], list[float]]:
    """Tune a population on answers that are labelled desirable or undesirable, and evolve the population.

    Args:
        pop: KTO agents, on one base. A list of one is an ordinary KTO run. Use the returned population afterwards.
        env: Serves the batches; the run begins at the gym's present position.
        **arguments: Those of `finetune_llm_preference` except `guards`. A `fitness` function takes an
            `UnpairedEvaluation`, or is a name of `evollm.hpo.UNPAIRED_FITNESSES`: "mean_margin", or the default "auc",
            the probability that a desirable answer has a larger log-ratio than an undesirable one.

    Returns:
        The population at the end, which may lack the fittest agent of the run, and for each agent the first component
        of its last fitness: with the default fitness its AUC. NaN for a diverged agent, and for all agents without
        held-out rows.

    Raises:
        ConfigurationError, CheckpointError, DivergedError: As `finetune_llm_preference` does; and a
            `ConfigurationError` for batches of one answer with a loss that needs two.
    """
    return _finetune(ALGORITHMS["kto"], pop, env, **arguments)


@_with_arguments_of(finetune_llm_preference, "guards")
def finetune_llm_reasoning(pop: Sequence[GRPO], env: RewardGym, **arguments: Any) -> tuple[list[GRPO], list[float]]:
    """Tune a population on rewards of its own answers, and evolve the population.

    In each step every agent answers the same prompts with the same random numbers, and learns from its own answers, one
    agent after the other. A run that is resumed samples the answers that it would have sampled.

    Args:
        pop: GRPO agents, on one base. A list of one is an ordinary GRPO run. Use the returned population afterwards.
        env: Serves the prompts and scores the answers; the run begins at the gym's present position.
        **arguments: Those of `finetune_llm_preference` except `guards`; a `budget` is refused, since what answers that
            are still to be sampled will cost is not known: give `max_member_steps`. A `fitness` function takes a
            `RewardEvaluation`; the default, "reward", is the mean reward of the answers to the held-out prompts, greedy
            unless the agents' settings say otherwise.

    Returns:
        The population at the end, which may lack the fittest agent of the run, and for each agent the first component
        of its last fitness: with the default fitness its mean reward. NaN for a diverged agent, for one with a
        held-out reward that is NaN, and for all agents without held-out rows.

    Raises:
        ConfigurationError, CheckpointError, DivergedError: As `finetune_llm_preference` does; and a
            `ConfigurationError` that names the reward function that fails, and the prompt.
    """
    return _finetune(ALGORITHMS["grpo"], pop, env, **arguments)


@_with_arguments_of(finetune_llm_preference)
def finetune(pop: Sequence[A], env: DatasetGym, **arguments: Any) -> tuple[list[A], list[float]]:
    """Tune a population of any algorithm, such as one of your own, and evolve the population.

    Args:
        pop: Agents of one algorithm, on one base.
        env: A gym of the class that the algorithm needs.
        **arguments: Those of `finetune_llm_preference`; the default of `fitness` is the algorithm's own.

    Returns:
        The population after the run, and for each agent the first component of its last fitness.

    Raises:
        ConfigurationError, CheckpointError, DivergedError: As `finetune_llm_preference` does.
    """
    return _finetune(algorithm_of(pop[0] if isinstance(pop, Sequence) and pop else pop), pop, env, **arguments)


def _finetune(
    algorithm: Algorithm,
    pop: Sequence[A],
    env: DatasetGym,
    *,
    run_dir: str | Path | None,
    checkpoint_path: str | Path | None,
    elite_path: str | Path | None,
    resume_from_checkpoint: str | Path | None,
    accelerator: Accelerator | None,
    **arguments: Any,
) -> tuple[list[A], list[float]]:
    """Check all arguments, then train."""
    processes = check_processes(accelerator)
    paths = check_paths(processes, run_dir, checkpoint_path, elite_path, resume_from_checkpoint)
    return prepare(pop, env, check_arguments(algorithm, processes, paths, **arguments)).train()
