"""A run: batches, population step, fitness, decisions of the search, checkpoints, in this order."""

from __future__ import annotations

import copy
import secrets
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

from evollm.algorithms import algorithm_of
from evollm.algorithms.agent import ACTOR, OWN, REFERENCE
from evollm.algorithms.references import BROKEN, REASON
from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints import (
    Population,
    newest_population,
    prune_populations,
    read_population,
    write_population,
)
from evollm.checkpoints.atomic import remove_unfinished
from evollm.checkpoints.population import STEP_FOLDER, has_populations
from evollm.errors import CheckpointError, ConfigurationError, DataError, DivergedError, EvoLLMError
from evollm.hpo import AnyEvaluation, Birth, EvolutionPlan, Result, SearchPlan, SearchStart, is_finite, rank
from evollm.hpo.search import check_plan, check_start
from evollm.llm_envs import DatasetGym
from evollm.models import AdapterShares
from evollm.models.engine import Engine
from evollm.models.fingerprints import adapter_fingerprint
from evollm.models.generation import greedy_answers
from evollm.processes import Processes
from evollm.runs import has_ended, read_config
from evollm.runs.events import (
    BaselineScored,
    Callback,
    Checkpointed,
    Evaluated,
    Evolved,
    RunEnded,
    RunStarted,
    SampleAnswer,
    StepDone,
)
from evollm.runs.folder import is_resumed_by_command, is_run
from evollm.training.carry_out import carry_out
from evollm.training.options import RunOptions, RunPaths, Schedule, describe_run
from evollm.training.population_step import FitnessFunction, evaluate_all, fitnesses_of, learn_all
from evollm.training.state import Progress, check_same_run, global_generators, set_global_generators
from evollm.training.stopping import StopSignals

A = TypeVar("A", bound=SavableAgent)

# Steps of a first epoch after which it is no chance that no row could be learnt from.
PATIENCE = 100


class Run(Generic[A]):
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
        population: Sequence[A],
        env: DatasetGym,
        options: RunOptions,
        paths: RunPaths,
        fitness: FitnessFunction,
        callbacks: Sequence[Callback],
    ) -> None:
        self.population = list(population)
        self.algorithm = algorithm_of(self.population[0])
        self.env = env
        self.options = options
        self.schedule = Schedule.of(options, env)
        self.fitness = fitness
        self.paths = paths
        self.callbacks = callbacks
        self.base = self.population[0].base
        # What scores are measured against. Where references move, all agents and epochs need one that stays.
        self.fixed_reference: str | None = OWN
        self._shares = AdapterShares(self.base)
        if options.update_reference_each_epoch:
            self.fixed_reference = self.base.retain(str(self.population[0].adapter(REFERENCE)))
            self._shares["fixed_reference"] = self.fixed_reference
        self.config = describe_run(self.population, env, options, self.schedule)
        self.progress = Progress([_founder(agent) for agent in self.population])
        self.search = options.strategy()
        if self.search is not None:
            self._start_search()
        # Entries carry the rounding of the batches that they were computed in: a run starts from none, so that its bits
        # do not depend on what ran before it on the same base.
        self.base.reference_cache.clear()
        self.engine = Engine.of(self.base)
        self.engine.begin(self.population[0].actor_adapter)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    def train(self) -> tuple[list[A], list[float]]:
        """Run to the end; see `finetune_llm_preference` and `finetune_llm_sft`."""
        progress = self.progress
        try:
            with StopSignals() as stop:
                total = self.schedule.total
                before = tuple(Evolved(step, plan) for step, plan in progress.evolutions)
                rows = {"test": len(self.env.test_pairs), "final": len(self.env.final_pairs)}
                place = (self.paths.run_dir, self.config)
                self._start(RunStarted(*place, progress.founders, total, progress.step, before, rows))
                if self.step == 0:
                    self._score_baseline()
                while self.step < total:
                    # After the checkpoint of the step before, so that nothing that fails here costs what was learnt.
                    self._pass_on()
                    self._train_step()
                    if self.schedule.evaluates_at(self.step, decides=self._decides):
                        self._evaluate()
                    number = stop.received_anywhere()
                    if self.schedule.checkpoints_at(self.step) or number:
                        self._checkpoint()
                    if number:
                        stop.stop(number, self._going_on())
                self._finish()
        except KeyboardInterrupt:
            # Whoever catches it, such as the command line, says it.
            raise KeyboardInterrupt(*filter(None, [self._going_on()])) from None
        finally:
            self._close_callbacks()
            self._shares.release()
        scores = [progress.fitnesses.get(agent.index, (float("nan"),))[0] for agent in self.population]
        return self.population, scores

    def resume(self) -> None:
        """Take up the newest whole checkpoint of the run folder; without any the run starts from its beginning.

        Raises:
            CheckpointError: Every checkpoint is damaged.
            ConfigurationError: The run began with other settings.
        """
        # The main process is the one that is told of damaged ones.
        processes = Processes.present()
        if processes.is_main and self.paths.checkpoints.is_dir():
            remove_unfinished(self.paths.checkpoints, STEP_FOLDER)
        found = processes.from_main(str(newest_population(self.paths.checkpoints) or "") if processes.is_main else "")
        path = Path(found)
        if not found:
            self._check_nothing_to_lose()
            warnings.warn(f"{self.paths.run_dir} holds no checkpoint: it starts anew", UserWarning, stacklevel=3)
            return
        saved = read_population(path)
        _check_state(saved, path)
        check_same_run(saved.state["config"], self.config, self.env.changed_text)
        progress = Progress.from_dict(saved.state, saved.tensors)
        _check_agents(saved, path, progress.births)
        if progress.step > self.schedule.total:
            fix = f"the checkpoint has {progress.step} steps already: give a larger num_epochs or max_steps"
            raise ConfigurationError("max_steps", self.schedule.total, fix)
        self.progress = progress
        for agent in self.population[len(saved.agents) :]:
            agent.release()
        del self.population[len(saved.agents) :]
        self.population += [self.population[0].clone() for _ in saved.agents[len(self.population) :]]
        for agent, folder in zip(self.population, saved.agents, strict=True):
            agent.load_folder(folder, overwrite_reference_adapter=False)
        if saved.fixed_reference is not None:
            self._shares.release()
            self.fixed_reference = self._shares["fixed_reference"] = self.base.frozen_adapter(
                saved.fixed_reference, REFERENCE
            )
        if self.search is not None:
            self.search.load_state_dict(saved.state["search"])
            self._began_as = str(saved.state["began_as"])
        self.env.load_state_dict(saved.state["env"])
        self.engine.load_state_dict(saved.state.get("engine"))
        self.base.reference_cache.update(saved.reference_logprobs)
        set_global_generators(saved.state["generators"])

    def _check_nothing_to_lose(self) -> None:
        """Refuse to begin a run anew that has ended, or that began with other settings.

        Raises:
            CheckpointError: Its records cannot be read.
            ConfigurationError: It has ended, and its checkpoints are gone, or its settings were others.
        """
        folder = self.paths.run_dir
        if has_ended(folder):
            fix = "the run has ended, and its checkpoints are gone: there is nothing to go on from; begin a new run"
            raise ConfigurationError("resume_from_checkpoint", str(folder), fix)
        check_same_run(read_config(folder), self.config, self.env.changed_text)

    def _going_on(self) -> str:
        """How somebody who interrupts the run goes on with it; "" where there is no run folder yet."""
        folder = self.paths.run_dir
        if not is_run(folder):
            return ""
        saved = has_populations(self.paths.checkpoints)
        if not is_resumed_by_command(folder):
            fix = f"go on with resume_from_checkpoint={str(folder)!r}"
            return fix if saved else f"no checkpoint has been saved: {fix} begins anew"
        trusts = self.base.model_config.get("trust_remote_code")
        how = self.paths.resume(*(["model_config.trust_remote_code=true"] if trusts else []))
        return f"go on with: {how}" if saved else f"no checkpoint has been saved: begin it anew with: {how}"

    def _score_baseline(self) -> None:
        scores = self._final_scores(self.population[:1])
        if scores:
            self.progress.before = scores[0]
            self._tell("on_baseline", BaselineScored(self._final_split(), scores[0]))

    def _start(self, event: RunStarted) -> None:
        """Tell of the start; a folder that cannot be written is found before anything is learnt."""
        try:
            self._tell("on_start", event)
        except OSError as error:
            raise ConfigurationError("run_dir", str(self.paths.run_dir), f"cannot be written: {error}") from error

    def _pass_on(self) -> None:
        """End the generation and the epoch, if the step before was their last."""
        if self.step > 0 and self._decides:
            self._decide()
        if self.step > 0 and self.step % self.schedule.epoch == 0:
            self._end_epoch()

    def _train_step(self) -> None:
        metrics = learn_all(self.population, self.env.next_batch())
        self.progress.step += 1
        self._tell("on_step", StepDone(self.step, self.env.num_epochs, metrics, self.engine.attention))
        nothing_yet = all(agent.num_tokens == 0 for agent in self.population)
        if nothing_yet and self.step == min(self.schedule.epoch, self.schedule.total, PATIENCE):
            seen = min(self.step * self.env.batch_size, len(self.env.train_pairs))
            raise DataError("train_dataset", f"{seen} rows", f"on every one {REASON}: {BROKEN}")

    def _evaluate(self) -> None:
        evaluations = evaluate_all(self.population, self.env, self.fixed_reference)
        fitnesses = fitnesses_of(self.population, evaluations, self.fitness)
        # The main process decides: a user's own function need not give the same everywhere.
        decided = Processes.present().from_main({str(index): fitness for index, fitness in fitnesses.items()})
        self.progress.fitnesses = {int(index): tuple(fitness) for index, fitness in decided.items()}
        for agent in self.population:
            agent.fitness.append(self.progress.fitnesses[agent.index][0])
        agents = {agent.index: agent.hyperparameter_values() for agent in self.population}
        event = Evaluated(
            self.step, self.progress.generation, evaluations, self.progress.fitnesses, self._best().index, agents
        )
        self._tell("on_evaluation", event)

    @property
    def _decides(self) -> bool:
        """Whether the search decides after this step. Nobody would learn from a decision after the last one."""
        return self.step == self.progress.due and self.step < self.schedule.total

    def _start_search(self) -> None:
        """Have the population that the search begins with."""
        assert self.search is not None
        founders, first = self.progress.founders, self.population[0]
        assert self.schedule.evolve_every is not None
        start = SearchStart(founders, first.hp_config, self.schedule.evolve_every)
        plan = _of_main(self.search.start(start))
        check_start(plan, start)
        self._check_values(plan.births)
        # What fresh agents begin as.
        self._beginning = copy.deepcopy(first.to_folder())
        actor = self._beginning.adapter(ACTOR)
        self._began_as = adapter_fingerprint(actor.config, actor.tensors)
        given = {birth.index for birth in founders}
        # Whoever begins under its own index is kept, whatever its values.
        births = [replace(birth, parent=birth.index if birth.index in given else None) for birth in plan.births]
        self.population = carry_out(births, self.population, self._restart)
        for agent, birth in zip(self.population, plan.births, strict=True):
            agent.set_hyperparameters(birth.hyperparameters)
        self.progress.founders = list(plan.births)
        self.progress.due = plan.steps

    def _decide(self) -> None:
        """Tell the search the results, and carry out its plan."""
        assert self.search is not None
        progress = self.progress
        results = [
            Result(agent.index, progress.fitnesses[agent.index], agent.hyperparameter_values(), agent.steps)
            for agent in self.population
        ]
        plan = _of_main(self.search.tell(results))
        before = [progress.founders, *(earlier.births for _, earlier in progress.evolutions)]
        check_plan(plan, results, {*self.config["agents"], *(birth.index for births in before for birth in births)})
        self._check_values(plan.births)
        fitnesses = {result.index: result.fitness for result in results}
        evolution = EvolutionPlan(progress.generation, self._best().index, fitnesses, plan.births)
        self.population = carry_out(plan.births, self.population, self._restart)
        progress.evolutions.append((self.step, evolution))
        progress.due = None if plan.steps is None else self.step + plan.steps
        self._tell("on_evolution", Evolved(self.step, evolution))

    def _check_values(self, births: Sequence[Birth]) -> None:
        """Refuse values that no agent can have, before anything is changed."""
        for birth in births:
            self.population[0].check_hyperparameters(birth.hyperparameters)

    def _restart(self, agent: A) -> None:
        """Make an agent what the first one was when the run began: weights, reference, moments, counters."""
        actor = self._beginning.adapter(ACTOR)
        if adapter_fingerprint(actor.config, actor.tensors) != self._began_as:
            fix = "begin with other weights than those that the run began with, and the search wants a fresh agent: "
            raise ConfigurationError("pop", "the agents", f"{fix}make them as they were made then")
        agent.load_folder(copy.deepcopy(self._beginning), overwrite_reference_adapter=False)

    def _end_epoch(self) -> None:
        if self.options.update_reference_each_epoch:
            for agent in self.population:
                agent.set_reference_policy(agent.reference_update_tracker + 1)

    def _checkpoint(self) -> None:
        folder = self.paths.checkpoints / f"step-{self.step:06d}"
        processes = Processes.present()
        # In all of them: each may hold a part.
        saved = self._saved()
        if processes.is_main:
            self._write_checkpoint(folder, saved)
        processes.wait()

    def _write_checkpoint(self, folder: Path, saved: Population) -> None:
        try:
            write_population(folder, saved, self.base.name)
            if self.options.keep_last is not None:
                prune_populations(folder.parent, self.options.keep_last, newest=folder)
        except (OSError, EvoLLMError) as error:
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
            "search": self.search.state_dict() if self.search else None,
            "began_as": self._began_as if self.search else None,
            "engine": self.engine.state_dict(),
            "generators": global_generators(),
        }
        moves = self.fixed_reference is not None and self.fixed_reference != OWN
        return Population(
            [agent.to_folder() for agent in self.population],
            state,
            self.progress.tensors(),
            self.base.export(str(self.fixed_reference)) if moves else None,
            self.base.reference_cache,
        )

    def _finish(self) -> None:
        best = self._best()
        best_path = self._save_elite(best) if self.options.save_elite else None
        runner_up = self._runner_up(best)
        podium = [best] if runner_up is None else [best, runner_up]
        after, runner_up_score, *_ = [*self._final_scores(podium), None, None]
        ended = RunEnded(
            step=self.step,
            best=best.index,
            best_path=best_path,
            split=self._final_split(),
            before=self.progress.before,
            after=after,
            samples=self._samples(best),
            runner_up=None if runner_up is None else runner_up.index,
            runner_up_score=runner_up_score,
        )
        self._tell("on_end", ended)

    def _save_elite(self, best: A) -> Path | None:
        """Save the best agent, elsewhere if there is no room where it belongs; None where there is no room at all."""
        error = self._try_to_save(best, self.paths.elite)
        if not error:
            return self.paths.elite
        # Of several processes the main one writes; its name is the one that counts.
        elsewhere = Path(tempfile.gettempdir()) / f"evollm-elite-{secrets.token_hex(4)}"
        again = ""
        if newest_population(self.paths.checkpoints) is not None:
            again = ", or resume the run once there is room"
        failed = f"the best agent could not be saved to {self.paths.elite} ({error})"
        if not self._try_to_save(best, elsewhere):
            fix = f"it was saved to {elsewhere} instead: move it there{again}"
            warnings.warn(f"{failed}; {fix}", UserWarning, stacklevel=2)
            return elsewhere
        fix = f"it is in memory alone: call save_checkpoint with a path where there is room{again}"
        warnings.warn(f"{failed}; {fix}", UserWarning, stacklevel=2)
        return None

    def _try_to_save(self, agent: A, path: Path) -> str:
        """Save an agent; returns why it could not be saved, which all processes learn, or an empty text."""
        reason = ""
        try:
            agent.save_checkpoint(str(path))
        except (OSError, EvoLLMError) as error:
            reason = str(error)
        return str(Processes.present().from_main(reason))

    def _best(self) -> A:
        """The fittest agent; when nothing could be evaluated, the first that has not diverged."""
        if not self.progress.fitnesses:
            return next(agent for agent in self.population if not agent.diverged)
        fitnesses = [self.progress.fitnesses[agent.index] for agent in self.population]
        best = rank(fitnesses)[0]
        if not is_finite(fitnesses[best]):
            raise DivergedError(f"no agent has a finite fitness: {self.progress.fitnesses}")
        return self.population[best]

    def _runner_up(self, best: A) -> A | None:
        """The fittest of the others, None when none has a finite fitness."""
        others = [agent for agent in self.population if agent is not best and agent.index in self.progress.fitnesses]
        fitnesses = [self.progress.fitnesses[agent.index] for agent in others]
        second = rank(fitnesses)[:1]
        return next((others[position] for position in second if is_finite(fitnesses[position])), None)

    def _final_split(self) -> str:
        if self.env.final_pairs:
            return "final"
        return "test" if self.env.test_pairs else ""

    def _final_scores(self, agents: Sequence[A]) -> list[AnyEvaluation]:
        """The score of each agent; none when there is nothing to score them on."""
        split = self._final_split()
        return list(self.algorithm.evaluate(agents, self.env, split, self.fixed_reference)) if split else []

    def _samples(self, best: A) -> list[SampleAnswer]:
        split = self._final_split()
        # Of a sharded base all have to go along.
        if not split or not (Processes.present().is_main or self.base.is_sharded):
            return []
        examples = self.env.reports[split].examples
        wanted = min(self.options.num_sample_answers, len(examples))
        examples = tuple(examples[number * len(examples) // wanted] for number in range(wanted))
        pairs = self.env.evaluation_pairs(split)
        prompts = [pairs[example.position].prompt_ids for example in examples]
        before_tuning = self.fixed_reference
        if before_tuning == OWN:
            before_tuning = best.adapter(REFERENCE) if self.algorithm.has_reference else None
        before, after = (
            greedy_answers(self.base, adapter, prompts, self.env.tokenizer, cut_mark="…")
            for adapter in (before_tuning, best.actor_adapter)
        )
        return [
            SampleAnswer(example.question, first, second, example.turns)
            for example, first, second in zip(examples, before, after, strict=True)
        ]

    def _close_callbacks(self) -> None:
        """Close each of them; one that fails costs neither the others, nor the run's result or its own error."""
        for callback in self.callbacks:
            try:
                callback.close()
            except Exception as error:  # Whatever a user's callback, or a tracker's library, raises.
                warnings.warn(f"{type(callback).__name__} could not be closed: {error!r}", UserWarning, stacklevel=2)

    def _tell(self, what: str, event: object) -> None:
        for callback in self.callbacks:
            getattr(callback, what)(event)


def _of_main(plan: SearchPlan) -> SearchPlan:
    """The plan of the main process: a user's own search need not plan the same everywhere."""
    processes = Processes.present()
    if processes.size == 1 or not isinstance(plan, SearchPlan):
        return plan
    return SearchPlan.from_dict(processes.from_main(plan.to_dict()))


def _check_state(saved: Population, path: Path) -> None:
    """Refuse a checkpoint that lacks what a run goes on with.

    Raises:
        CheckpointError: Its state is of something else.
    """
    missing = {"config", "env", "search", "began_as", "generators"} - saved.state.keys()
    if missing or not isinstance(saved.state["config"], Mapping):
        reason = f"lacks {sorted(missing)}" if missing else "has no settings"
        raise CheckpointError(f"{path} is no checkpoint of this run: it {reason}")


def _check_agents(saved: Population, path: Path, births: Sequence[Birth]) -> None:
    """Refuse a checkpoint whose agents are not those of its lineage.

    Raises:
        CheckpointError: They are others, or in another order.
    """
    found, born = [agent.attributes["index"] for agent in saved.agents], [birth.index for birth in births]
    if found != born:
        raise CheckpointError(f"{path} is no checkpoint of this run: it holds the agents {found} instead of {born}")


def _founder(agent: SavableAgent) -> Birth:
    return Birth.fresh(agent.index, agent.hyperparameter_values())
