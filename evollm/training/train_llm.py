"""The training loop: batches, population step, fitness, evolution, checkpoints, in this order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evollm.algorithms.core import OWN, REFERENCE
from evollm.algorithms.dpo import DPO
from evollm.checkpoints import (
    Population,
    newest_population,
    only_writer,
    prune_populations,
    read_population,
    write_population,
)
from evollm.checks import single_process
from evollm.errors import ConfigurationError, DivergedError
from evollm.hpo import (
    Birth,
    Evaluation,
    Evolver,
    Member,
    Mutations,
    TournamentSelection,
    carry_out,
    is_finite,
    preference_fitness,
    rank,
)
from evollm.llm_envs import PreferenceGym
from evollm.models.engine import Engine
from evollm.models.generation import greedy_answers
from evollm.tracking import Console, RunFolder, TensorBoard, WeightsAndBiases
from evollm.training.callbacks import (
    Callback,
    Checkpointed,
    Evaluated,
    Evolved,
    RunEnded,
    RunStarted,
    SampleAnswer,
    StepDone,
)
from evollm.training.options import RunOptions, RunPaths, Schedule, check_callbacks, check_run, describe_run
from evollm.training.population_step import FitnessFunction, check_fitness, evaluate_all, fitnesses_of, learn_all
from evollm.training.state import Progress, check_same_run, global_generators, set_global_generators
from evollm.training.stopping import StopSignals

if TYPE_CHECKING:
    from accelerate import Accelerator


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
        evo_steps: Steps between two evolutions, by default an epoch. The run does not end with an evolution.
        evaluation_interval: Steps between two evaluations, by default those between two evolutions, else an epoch.
            Before each evolution and at the end there is one in any case, if the gym has a test_dataset.
        tournament: Selects the parents; evolution needs this and `mutation`.
        mutation: Mutates the children.
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
        accelerator: Of a single process; more are not supported in this version.
        wb: Log to Weights & Biases (extra `wandb`).
        tensorboard: Write TensorBoard files (extra `tensorboard`).
        verbose: Show progress, tables and the result in the terminal.

    Returns:
        The population after the run, and for each agent the first component of its last fitness: with the default
        fitness its preference accuracy. NaN for a diverged agent, and for all when there is nothing to evaluate on.

    Raises:
        ConfigurationError: Something cannot work; found before any training.
        CheckpointError: Every checkpoint of the run to resume is damaged, or another process writes to the folder.
        DivergedError: Every agent's loss or gradient has become NaN or infinite.
    """
    options = RunOptions(
        num_epochs=num_epochs,
        max_steps=max_steps,
        evo_steps=evo_steps,
        evaluation_interval=evaluation_interval,
        checkpoint_steps=checkpoint_steps,
        keep_last=keep_last,
        tournament=tournament,
        mutation=mutation,
        update_reference_each_epoch=update_reference_each_epoch,
        save_elite=save_elite,
        num_sample_answers=num_sample_answers,
    )
    check_run(pop, env, options)
    check_fitness(fitness)
    single_process(accelerator)
    paths = RunPaths.of(run_dir, checkpoint_path, elite_path, resume_from_checkpoint)
    listeners: list[Callback] = [RunFolder(), *check_callbacks(callbacks)]
    listeners += [Console()] if verbose else []
    listeners += [TensorBoard()] if tensorboard else []
    listeners += [WeightsAndBiases()] if wb else []
    run = PreferenceRun(pop, env, options, paths, fitness, listeners)
    paths.run_dir.mkdir(parents=True, exist_ok=True)
    with only_writer(paths.run_dir, what=paths.run_dir):
        if resume_from_checkpoint is not None:
            run.resume()
        return run.train()


class PreferenceRun:
    """The state of a run, and the phases that `train` goes through.

    Args:
        population: The agents.
        env: Serves the batches.
        options: What was asked for, checked.
        paths: Where it writes.
        fitness: Scores an evaluation.
        callbacks: Told of every event.
    """

    def __init__(
        self,
        population: Sequence[DPO],
        env: PreferenceGym,
        options: RunOptions,
        paths: RunPaths,
        fitness: FitnessFunction,
        callbacks: Sequence[Callback],
    ) -> None:
        self.population = list(population)
        self.env = env
        self.options = options
        self.schedule = Schedule.of(options, env)
        self.fitness = fitness
        self.paths = paths
        self.callbacks = callbacks
        self.base = self.population[0].base
        # What scores are measured against. Where references move, all agents and epochs need one that stays.
        self.yardstick: str | None = OWN
        if options.update_reference_each_epoch:
            self.yardstick = self.base.retain(str(self.population[0].adapter(REFERENCE)))
        self.config = describe_run(self.population, env, options, self.schedule)
        self.progress = Progress([_founder(agent) for agent in self.population])
        self.evolver: Evolver | None = None
        if options.tournament is not None and options.mutation is not None:
            self.evolver = Evolver(options.tournament, options.mutation)
        # Entries carry the rounding of the batches that they were computed in: a run starts from none, so that its bits
        # do not depend on what ran before it on the same base.
        self.base.reference_cache.clear()

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    def train(self) -> tuple[list[DPO], list[float]]:
        """Run to the end; see `finetune_llm_preference`."""
        progress = self.progress
        try:
            with StopSignals() as stop:
                config, total = self.config, self.schedule.total
                started = RunStarted(
                    self.paths.run_dir, config, progress.founders, total, progress.step, tuple(progress.plans)
                )
                self._tell("on_start", started)
                if self.step == 0:
                    progress.before = self._final_score(self.population[0])
                while self.step < total:
                    self._train_step()
                    if self.schedule.evaluates_at(self.step):
                        self._evaluate()
                    if self.schedule.evolves_at(self.step):
                        self._evolve()
                    if self.step % self.schedule.epoch == 0 and self.step < total:
                        self._end_epoch()
                    if self.schedule.checkpoints_at(self.step) or stop.received is not None:
                        self._checkpoint()
                    if stop.received is not None:
                        stop.stop()
                self._finish()
        finally:
            for callback in self.callbacks:
                callback.close()
            if self.yardstick is not None and self.yardstick != OWN:
                self.base.release(self.yardstick)
        scores = [progress.fitnesses.get(agent.index, (float("nan"),))[0] for agent in self.population]
        return self.population, scores

    def resume(self) -> None:
        """Take up the newest whole checkpoint of the run folder; without any the run starts from its beginning.

        Raises:
            CheckpointError: Every checkpoint is damaged.
            ConfigurationError: The run began with other settings.
        """
        path = newest_population(self.paths.checkpoints)
        if path is None:
            warnings.warn(f"{self.paths.run_dir} holds no checkpoint: it starts anew", UserWarning, stacklevel=3)
            return
        saved = read_population(path)
        check_same_run(saved.state.get("config", {}), self.config)
        progress = Progress.from_dict(saved.state, saved.tensors)
        if progress.step > self.schedule.total:
            fix = f"the checkpoint has {progress.step} steps already: give a larger num_epochs or max_steps"
            raise ConfigurationError("max_steps", self.schedule.total, fix)
        self.progress = progress
        for agent, folder in zip(self.population, saved.agents, strict=True):
            agent.load_folder(folder, overwrite_reference_adapter=False)
        if saved.yardstick is not None:
            self.base.release(str(self.yardstick))
            self.yardstick = self.base.frozen_adapter(saved.yardstick, REFERENCE)
        if self.evolver is not None:
            self.evolver.load_state_dict(saved.state["evolver"])
        self.env.load_state_dict(saved.state["env"])
        Engine.of(self.base).load_state_dict(saved.state["budgets"])
        self.base.reference_cache.update(saved.reference_logprobs)
        set_global_generators(saved.state["generators"])

    def _train_step(self) -> None:
        metrics = learn_all(self.population, self.env.next_batch())
        self.progress.step += 1
        self._tell("on_step", StepDone(self.step, self.env.num_epochs, metrics))

    def _evaluate(self) -> None:
        evaluations = evaluate_all(self.population, self.env, self.yardstick)
        self.progress.fitnesses = fitnesses_of(self.population, evaluations, self.fitness)
        for agent in self.population:
            agent.fitness.append(self.progress.fitnesses[agent.index][0])
        agents = {agent.index: agent.hyperparameter_values() for agent in self.population}
        event = Evaluated(
            self.step, self.progress.generation, evaluations, self.progress.fitnesses, self._best().index, agents
        )
        self._tell("on_evaluation", event)

    def _evolve(self) -> None:
        assert self.evolver is not None
        members = [
            Member(agent.index, self.progress.fitnesses[agent.index], agent.hyperparameter_values())
            for agent in self.population
        ]
        plan = self.evolver.plan(members, self.population[0].hp_config, self.progress.generation)
        self.population = carry_out(plan, self.population)
        self.progress.plans.append(plan)
        self._tell("on_evolution", Evolved(self.step, plan))

    def _end_epoch(self) -> None:
        if self.options.update_reference_each_epoch:
            for agent in self.population:
                agent.set_reference_policy(agent.reference_update_tracker + 1)

    def _checkpoint(self) -> None:
        folder = self.paths.checkpoints / f"step-{self.step:06d}"
        try:
            write_population(folder, self._saved(), self.base.name)
            if self.options.keep_last is not None:
                prune_populations(folder.parent, self.options.keep_last, newest=folder)
        except OSError as error:
            warnings.warn(
                f"step {self.step} could not be saved: {error}; the run goes on, and earlier checkpoints are intact",
                UserWarning,
                stacklevel=2,
            )
            return
        self._tell("on_checkpoint", Checkpointed(self.step, folder))

    def _saved(self) -> Population:
        state = {
            **self.progress.to_dict(),
            "config": self.config,
            "env": self.env.state_dict(),
            "evolver": self.evolver.state_dict() if self.evolver else None,
            "budgets": Engine.of(self.base).state_dict(),
            "generators": global_generators(),
        }
        moves = self.yardstick is not None and self.yardstick != OWN
        return Population(
            [agent.to_folder() for agent in self.population],
            state,
            self.progress.tensors(),
            self.base.export(str(self.yardstick)) if moves else None,
            self.base.reference_cache,
        )

    def _finish(self) -> None:
        best = self._best()
        if self.options.save_elite:
            best.save_checkpoint(str(self.paths.elite))
        ended = RunEnded(
            step=self.step,
            best=best,
            best_path=self.paths.elite if self.options.save_elite else None,
            split=self._final_split(),
            before=self.progress.before,
            after=self._final_score(best),
            samples=self._samples(best),
        )
        self._tell("on_end", ended)

    def _best(self) -> DPO:
        """The fittest agent; when nothing could be evaluated, the first that has not diverged."""
        if not self.progress.fitnesses:
            return next(agent for agent in self.population if not agent.diverged)
        fitnesses = [self.progress.fitnesses[agent.index] for agent in self.population]
        best = rank(fitnesses)[0]
        if not is_finite(fitnesses[best]):
            raise DivergedError(f"no agent has a finite fitness: {self.progress.fitnesses}")
        return self.population[best]

    def _final_split(self) -> str:
        if self.env.final_pairs:
            return "final"
        return "test" if self.env.test_pairs else ""

    def _final_score(self, agent: DPO) -> Evaluation | None:
        split = self._final_split()
        return agent.evaluate(self.env, split, self.yardstick) if split else None

    def _samples(self, best: DPO) -> list[SampleAnswer]:
        split = self._final_split()
        if not split:
            return []
        examples = self.env.reports[split].examples
        wanted = min(self.options.num_sample_answers, len(examples))
        examples = tuple(examples[number * len(examples) // wanted] for number in range(wanted))
        pairs = self.env.final_pairs if split == "final" else self.env.test_pairs
        prompts = [pairs[example.position].prompt_ids for example in examples]
        reference = best.adapter(REFERENCE) if self.yardstick == OWN else self.yardstick
        before, after = (
            greedy_answers(self.base, adapter, prompts, self.env.tokenizer)
            for adapter in (reference, best.actor_adapter)
        )
        questions = [example.question for example in examples]
        return [SampleAnswer(*texts) for texts in zip(questions, before, after, strict=True)]

    def _tell(self, what: str, event: object) -> None:
        for callback in self.callbacks:
            getattr(callback, what)(event)


def _founder(agent: DPO) -> Birth:
    return Birth(agent.index, None, (), elite=False, hyperparameters=agent.hyperparameter_values())
