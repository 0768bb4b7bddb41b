"""The training loop: batches, population step, fitness, evolution, checkpoints, in this order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evollm.algorithms.core import OWN, REFERENCE
from evollm.algorithms.dpo import DPO
from evollm.checks import single_process
from evollm.errors import DivergedError
from evollm.hpo import (
    Birth,
    Evaluation,
    Evolver,
    Fitness,
    Member,
    Mutations,
    TournamentSelection,
    carry_out,
    is_finite,
    preference_fitness,
    rank,
)
from evollm.llm_envs import PreferenceGym
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
    checkpoint_path: str | Path | None = None,
    save_elite: bool = True,
    elite_path: str | Path | None = None,
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
        checkpoint_steps: Steps between two checkpoints of the whole population; None: none.
        checkpoint_path: Where they go, by default `checkpoints` in the run folder.
        save_elite: Save the fittest agent at the end.
        elite_path: Where it goes, by default `elite` in the run folder.
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
        DivergedError: Every agent's loss or gradient has become NaN or infinite.
    """
    options = RunOptions(
        num_epochs=num_epochs,
        max_steps=max_steps,
        evo_steps=evo_steps,
        evaluation_interval=evaluation_interval,
        checkpoint_steps=checkpoint_steps,
        tournament=tournament,
        mutation=mutation,
        update_reference_each_epoch=update_reference_each_epoch,
        save_elite=save_elite,
        num_sample_answers=num_sample_answers,
    )
    check_run(pop, env, options)
    check_fitness(fitness)
    single_process(accelerator)
    paths = RunPaths.of(run_dir, checkpoint_path, elite_path)
    listeners: list[Callback] = [RunFolder(), *check_callbacks(callbacks)]
    listeners += [Console()] if verbose else []
    listeners += [TensorBoard()] if tensorboard else []
    listeners += [WeightsAndBiases()] if wb else []
    return PreferenceRun(pop, env, options, paths, fitness, listeners).train()


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
        self.step = 0
        self.generation = 0
        self.fitnesses: dict[int, Fitness] = {}
        self.evolver: Evolver | None = None
        if options.tournament is not None and options.mutation is not None:
            self.evolver = Evolver(options.tournament, options.mutation)

    def train(self) -> tuple[list[DPO], list[float]]:
        """Run to the end; see `finetune_llm_preference`."""
        # Entries carry the rounding of the batches that they were computed in: a run starts from none, so that its bits
        # do not depend on what ran before it on the same base.
        self.base.reference_cache.clear()
        try:
            config = describe_run(self.population, self.env, self.options, self.schedule)
            founders = [_founder(agent) for agent in self.population]
            self._tell("on_start", RunStarted(self.paths.run_dir, config, founders, self.schedule.total))
            before = self._final_score(self.population[0])
            while self.step < self.schedule.total:
                self._train_step()
                if self.schedule.evaluates_at(self.step):
                    self._evaluate()
                if self.schedule.evolves_at(self.step):
                    self._evolve()
                if self.step % self.schedule.epoch == 0 and self.step < self.schedule.total:
                    self._end_epoch()
                if self.schedule.checkpoints_at(self.step):
                    self._checkpoint()
            self._finish(before)
        finally:
            for callback in self.callbacks:
                callback.close()
            if self.yardstick is not None and self.yardstick != OWN:
                self.base.release(self.yardstick)
        scores = [self.fitnesses.get(agent.index, (float("nan"),))[0] for agent in self.population]
        return self.population, scores

    def _train_step(self) -> None:
        metrics = learn_all(self.population, self.env.next_batch())
        self.step += 1
        self._tell("on_step", StepDone(self.step, self.env.num_epochs, metrics))

    def _evaluate(self) -> None:
        evaluations = evaluate_all(self.population, self.env, self.yardstick)
        self.fitnesses = fitnesses_of(self.population, evaluations, self.fitness)
        for agent in self.population:
            agent.fitness.append(self.fitnesses[agent.index][0])
        agents = {agent.index: agent.hyperparameter_values() for agent in self.population}
        event = Evaluated(self.step, self.generation, evaluations, self.fitnesses, self._best().index, agents)
        self._tell("on_evaluation", event)

    def _evolve(self) -> None:
        assert self.evolver is not None
        members = [
            Member(agent.index, self.fitnesses[agent.index], agent.hyperparameter_values()) for agent in self.population
        ]
        plan = self.evolver.plan(members, self.population[0].hp_config, self.generation)
        self.population = carry_out(plan, self.population)
        self.generation += 1
        self._tell("on_evolution", Evolved(self.step, plan))

    def _end_epoch(self) -> None:
        if self.options.update_reference_each_epoch:
            for agent in self.population:
                agent.set_reference_policy(agent.reference_update_tracker + 1)

    def _checkpoint(self) -> None:
        self._keep_reference_logprobs()
        folder = self.paths.checkpoints / f"step-{self.step:06d}"
        for agent in self.population:
            agent.save_checkpoint(str(folder / f"agent-{agent.index}"))
        self._tell("on_checkpoint", Checkpointed(self.step, folder))

    def _keep_reference_logprobs(self) -> None:
        """A run that goes on from its folder need not compute them again."""
        self.paths.run_dir.mkdir(parents=True, exist_ok=True)
        self.base.reference_cache.save(self.paths.run_dir / "reference_logprobs.safetensors")

    def _finish(self, before: Evaluation | None) -> None:
        self._keep_reference_logprobs()
        best = self._best()
        if self.options.save_elite:
            best.save_checkpoint(str(self.paths.elite))
        ended = RunEnded(
            step=self.step,
            best=best,
            best_path=self.paths.elite if self.options.save_elite else None,
            split=self._final_split(),
            before=before,
            after=self._final_score(best),
            samples=self._samples(best),
        )
        self._tell("on_end", ended)

    def _best(self) -> DPO:
        """The fittest agent; when nothing could be evaluated, the first that has not diverged."""
        if not self.fitnesses:
            return next(agent for agent in self.population if not agent.diverged)
        fitnesses = [self.fitnesses[agent.index] for agent in self.population]
        best = rank(fitnesses)[0]
        if not is_finite(fitnesses[best]):
            raise DivergedError(f"no agent has a finite fitness: {self.fitnesses}")
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
