"""The training loop: a run decides when members learn, are evaluated, replaced and saved; an executor does the work."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from inspect import signature
from typing import Any, cast

from evollm.errors import ConfigurationError, DataError, DivergedError
from evollm.execution.executor import Executor, Spreads, check_going
from evollm.hpo import Birth, EvolutionPlan, NamedFitness, SearchPlan, SearchStart, is_finite
from evollm.hpo.search_checks import check_plan, check_start
from evollm.runs.events import BaselineScored, Callback, Checkpointed, Evolved, Placed, RunStarted, StepDone
from evollm.training.early_stopping import out_of_patience
from evollm.training.ending import best_of, close_callbacks, end, final_split
from evollm.training.finalists import Contest
from evollm.training.limits import Limits
from evollm.training.options import RunOptions
from evollm.training.paths import RunPaths
from evollm.training.resume import how_to_go_on, load_checkpoint, save_checkpoint
from evollm.training.schedule import Decision, Schedule, SelectionRows
from evollm.training.scores import DIVERGED_FITNESS, Scorer
from evollm.training.spending import Prices, update_epochs
from evollm.training.state import Progress
from evollm.training.stopping import StopSignals

# A run that has learnt no token after this many steps, or after a shorter first epoch, stops with a DataError.
PATIENCE = 100


class Run:
    """A run with checked arguments; `evollm.training.prepare` makes it.

    Args:
        executor: Holds the agents.
        options: Options of the run.
        paths: Paths that the run writes to.
        fitness: Maps an evaluation to a fitness.
        callbacks: Called with every event, in this order.
        contest: Chooses between the best agent and candidates made of the best agents; None: the best agent wins.

    Attributes:
        executor: The executor.
        schedule: When the run evolves, evaluates and saves.
        limits: Whether another step fits.
        paths: The paths.
        callbacks: The callbacks as a list, to which more can be added before the run begins.
        best: The live agent that won, once the run has ended.
    """

    best: Any = None

    def __init__(
        self,
        executor: Executor,
        options: RunOptions,
        paths: RunPaths,
        fitness: Callable[[Any], object],
        callbacks: Sequence[Callback],
        contest: Contest | None = None,
    ) -> None:
        self.executor = executor
        self.processes = executor.processes
        self.options = options
        self.paths = paths
        self.contest = contest
        self.callbacks = list(callbacks)
        described = executor.describe()
        self.rows, self._hp_config = described.rows, described.hp_config
        takes_rows = described.takes_rows and "rows" in signature(executor.evaluate).parameters
        self._selection = SelectionRows(self.rows["test"], takes_rows, options.evaluation_interval)
        self._trusts, self._unlearnable = described.trust_remote_code, described.unlearnable
        self.schedule = Schedule.of(options, described.epoch, held_out=bool(self.rows["test"]))
        members = executor.members()
        self.config = {
            **described.config,
            "agents": {member.index: dict(member.hyperparameters) for member in members},
            "options": options.to_dict(),
            "schedule": asdict(self.schedule),
            "fitness": fitness.name if isinstance(fitness, NamedFitness) else None,
        }
        self.progress = Progress([Birth.fresh(member.index, member.hyperparameters) for member in members])
        self.search = options.strategy()
        moving, split = options.update_reference_each_epoch, final_split(self.rows)
        epochs = update_epochs(members[0].hyperparameters)
        kl = bool(options.bounds.measurements)
        self._prices = Prices(described.costs, self.schedule, split, epochs, moving, kl, options.candidates)
        self.limits = Limits(options, self._prices, self.processes, self._selection)
        self._scorer = Scorer(executor, options, self._prices, fitness)
        # Why the run ends with this step; "" while it goes on, and at its planned end.
        self._ended = ""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    @property
    def _stopped(self) -> str:
        """Why the run ends before its last step; "" if it does not."""
        patience = self.options.early_stopping_patience
        return self._ended or out_of_patience(self.progress, self.schedule.total, patience)

    def train(self) -> tuple[list[Any], list[float]]:
        """Train to the end; see `finetune_llm_preference`.

        Returns:
            The agents, and for each agent the first component of its last fitness.
        """
        self.begin()
        # The main process must not write into the run folder while other processes still check that folder.
        self.processes.wait()
        with self.paths.only_writer() if self.processes.is_main else nullcontext():
            if self.paths.resumes:
                self.resume()
            self.limits.start_clock(self.progress.account)
            try:
                self._check_going()
                self._ends_by_limit()
                with StopSignals(told=self.processes.is_main) as stop:
                    self._start()
                    while self.step < self.schedule.total and not self._stopped:
                        self._advance(stop)
                    self._evaluate_at_the_end()
                    best, ended = end(
                        self.executor, self.progress, self.options, self.paths, self.rows, self.contest, self.limits
                    )
                    self.progress.account.add(self.executor.spent(), final=True)
                    spent = self._prices.spent(self.progress.account, self.step)
                    ended = replace(ended, stopped=self._stopped, spent=spent)
                    self._tell_whereabouts()
                    self._tell("on_end", ended)
                    self.best = self.executor.agent(best)
            except KeyboardInterrupt:
                # The message says how to resume; the command line prints the message.
                raise KeyboardInterrupt(*filter(None, [self._how_to_go_on()])) from None
            finally:
                close_callbacks(self.callbacks)
                self.executor.close()
        fitnesses = self.progress.fitnesses
        scores = [fitnesses.get(member.index, DIVERGED_FITNESS)[0] for member in self.executor.members()]
        return self.executor.population(), scores

    def begin(self) -> None:
        """Make the executor hold the first members of the search; all agents if there is no search.

        Raises:
            ConfigurationError: The first plan of the search is invalid; no agent has been changed.
        """
        births, plan = None, self.first_plan()
        if plan is not None:
            given = {birth.index for birth in self.progress.founders}
            # A birth with the index of a given agent keeps that agent, even with other hyperparameters.
            births = [replace(birth, parent=birth.index if birth.index in given else None) for birth in plan.births]
            self.progress.founders = list(plan.births)
            self.progress.due = Decision.of(plan, self.step)
        self.executor.begin(births, moving_references=self.options.update_reference_each_epoch)

    def first_plan(self) -> SearchPlan | None:
        """Reset the search and return its first plan, before the run begins; None if there is no search.

        Raises:
            ConfigurationError: The plan is invalid.
        """
        if self.search is None:
            return None
        founders, interval = self.progress.founders, self.schedule.evolve_every
        assert interval is not None
        budget = self.options.budget and self._prices.search_budget(self.options.budget, len(founders))
        start = SearchStart(founders, self._hp_config, interval, budget or None, self.rows["test"])
        plan = self._of_main(self.search.start(start))
        check_start(plan, start)
        return plan

    def resume(self) -> None:
        """Load the newest undamaged checkpoint of the run; without any checkpoint the run starts at step 0.

        Raises:
            CheckpointError: Every checkpoint is damaged.
            ConfigurationError: The run began with other settings.
        """
        found = load_checkpoint(self.paths, self.executor, self.config)
        if found is not None:
            self.progress, search = found
            if self.search is not None:
                self.search.load_state_dict(search)

    def _start(self) -> None:
        """Announce the start, which fails if the run folder cannot be written, and score the first agent."""
        before = tuple(Evolved(step, plan) for step, plan in self.progress.evolutions)
        rows = {split: self.rows[split] for split in ("test", "final")}
        founders, total = self.progress.founders, self.schedule.total
        try:
            folder, evaluated_rows = self.paths.run_dir, self.progress.evaluated_rows
            self._tell(
                "on_start", RunStarted(folder, self.config, founders, total, self.step, before, rows, evaluated_rows)
            )
        except OSError as error:
            raise ConfigurationError("run_dir", str(self.paths.run_dir), f"cannot be written: {error}") from error
        self._tell_whereabouts()
        split = final_split(self.rows)
        if self.step == 0 and split:
            first = self.progress.births[0].index
            self.progress.before = self.executor.evaluate(split, [first])[first]
            self.progress.account.add(self.executor.spent(), final=True)
            self._tell("on_baseline", BaselineScored(split, self.progress.before))

    def _advance(self, stop: StopSignals) -> None:
        """Make a due decision, learn up to the next step with other work, then evaluate and save if due."""
        # A due checkpoint of this step is already written, so an error in the decision loses no training.
        if self.step > 0 and self.schedule.decides_at(self.step, self.progress.due):
            saved = self.schedule.checkpoints_at(self.step)
            # A run that ended here was evaluated on all rows; the decision is made on those of the plan.
            self._evaluate()
            if not self._ended:
                self._decide()
            if self._ended:
                if not saved and self.schedule.checkpoints_at(self.step):
                    self._checkpoint()
                return
        self._learn(stop)
        decides = self.schedule.decides_at(self.step, self.progress.due)
        if self.schedule.evaluates_at(self.step, decides=decides):
            self._evaluate()
        if not decides and self._ends_by_limit():
            self._evaluate()
        number = self._signal(stop)
        stopped = bool(self._stopped) and self.schedule.checkpoint_every > 0
        if self.schedule.checkpoints_at(self.step) or stopped or number:
            self._checkpoint()
        if number:
            stop.stop(number, self._how_to_go_on() if self.processes.is_main else "")

    def _learn(self, stop: StopSignals) -> None:
        """Learn up to the next step with a decision, an evaluation or a checkpoint, or until a signal."""
        until = self.schedule.next_pause(self.step, self.progress.due)
        for done in self.executor.learn(self.step, until):
            self._note(done)
            if self.step < until and (self._signal(stop) or self._ended):
                return
            if self.step < until and self.limits.reached(self.progress, self.schedule, self.executor.members()):
                return

    def _ends_by_limit(self, plan: SearchPlan | None = None) -> bool:
        """Whether no further step of a plan's members, or the present ones, fits, so that this step is the last one."""
        why = self.limits.reached(self.progress, self.schedule, self.executor.members(), plan)
        if why:
            self._end_here(why)
        return bool(why)

    def _end_here(self, why: str) -> None:
        self._ended, self.schedule = why, replace(self.schedule, total=self.step)

    def _check_going(self) -> None:
        """End the run with the best agent so far if every member has diverged; see `_end_with_the_best`."""
        try:
            check_going(self.executor.members())
        except DivergedError as error:
            self._end_with_the_best(error)

    def _end_with_the_best(self, error: DivergedError) -> None:
        """End the run with the best agent so far, since no member can be it.

        Raises:
            DivergedError: There is none.
        """
        best = self.progress.best
        if best is None:
            raise error
        if not self._ended:
            result = f"the result is agent {best.index} as it was after step {best.step}"
            warnings.warn(f"the run ends at step {self.step}, and {result}: {error}", UserWarning, stacklevel=2)
        self._end_here("no agent is left that has not diverged")

    def _note(self, done: StepDone) -> None:
        """Record a step and announce it.

        Raises:
            DivergedError: Every member has diverged, and none was evaluated before.
            DataError: No member has learnt a token after `PATIENCE` steps, or after a shorter first epoch.
        """
        members = self.executor.members()
        self.progress.step = done.step
        self._check_going()
        learners = [member for member in members if member.index in done.metrics]
        self.progress.account.add_step(self.executor.spent(), learners)
        self._tell_whereabouts()
        self._tell("on_step", done)
        nothing_yet = all(member.num_tokens == 0 for member in members)
        if nothing_yet and self.step == min(self.schedule.epoch, self.schedule.total, PATIENCE):
            seen = min(self.step * self.config["data"]["batch_size"], self.rows["train"])
            raise DataError("train_dataset", f"{seen} rows", f"on every one {self._unlearnable}")

    def _signal(self, stop: StopSignals) -> int:
        """Number of a signal that any process received, else 0; all processes make this call at the same step."""
        return self.processes.largest(stop.received or 0)

    def _evaluate(self) -> bool:
        """Evaluate all members, on fewer rows if that is enough; False if that is done, or there are no rows."""
        progress = self.progress
        rows = self._selection.at(self.step, self.schedule, progress.due, limited=bool(self._ended))
        if self.schedule.evaluate_every is None or (progress.evaluated, progress.evaluated_rows) == (self.step, rows):
            return False
        evaluations = self._scorer.score_all(progress, rows)
        try:
            best = best_of(self.executor.members(), progress.fitnesses)
        except DivergedError as error:
            self._end_with_the_best(error)
        else:
            event = self._scorer.keep_best(progress, evaluations, progress.fitnesses, best, rows)
            self._tell("on_evaluation", event)
        return True

    def _evaluate_at_the_end(self) -> None:
        """Evaluate the last step if a resume with lower limits ends the run there, and the best member on all rows.

        No checkpoint has the latter evaluation, so that a run that goes on from here has the bits of a longer one.
        """
        if self._evaluate() and self.schedule.checkpoints_at(self.step):
            self._checkpoint()
        if self.progress.evaluated_rows is not None and any(map(is_finite, self.progress.fitnesses.values())):
            best = best_of(self.executor.members(), self.progress.fitnesses)
            found = self._scorer.score(self.progress.account, [best], None)
            self._tell("on_evaluation", self._scorer.keep_best(self.progress, *found, best, None))

    def _decide(self) -> None:
        """Give the search the results, and let the executor carry out the plan if a step of its members fits."""
        assert self.search is not None
        progress = self.progress
        members = self.executor.members()
        results = progress.results(members)
        untold = copy.deepcopy(self.search.state_dict())
        plan = self._of_main(self.search.tell(results))
        before = [progress.founders, *(earlier.births for _, earlier in progress.evolutions)]
        check_plan(plan, results, {*self.config["agents"], *(birth.index for births in before for birth in births)})
        if self._ends_by_limit(plan):
            # A resumed run with a larger limit tells the search again.
            self.search.load_state_dict(untold)
            return
        fitnesses = {result.index: result.fitness for result in results}
        best = best_of(members, progress.fitnesses)
        evolution = EvolutionPlan(progress.generation, best, fitnesses, plan.births)
        self.executor.apply(plan.births)
        progress.evolutions.append((self.step, evolution))
        progress.due = Decision.of(plan, self.step)
        self._tell("on_evolution", Evolved(self.step, evolution))
        self._tell_whereabouts()

    def _of_main(self, plan: SearchPlan) -> SearchPlan:
        """The plan of the main process: a user's own search may give other plans in other processes."""
        if self.processes.size == 1 or not isinstance(plan, SearchPlan):
            return plan
        return SearchPlan.from_dict(self.processes.from_main(plan.to_dict()))

    def _checkpoint(self) -> None:
        """Save a checkpoint; only the main process announces it."""
        folder = self.paths.checkpoints / f"step-{self.step:06d}"
        search = self.search.state_dict() if self.search else None
        state = {**self.progress.to_dict(), "config": self.config, "search": search}
        arrays, keep_last = self.progress.arrays(), self.options.keep_last
        if save_checkpoint(self.executor, folder, state, arrays, keep_last) and self.processes.is_main:
            self._tell("on_checkpoint", Checkpointed(self.step, folder))

    def _tell_whereabouts(self) -> None:
        """Announce which workers hold the members and which were lost, if the executor has several workers."""
        if not hasattr(self.executor, "whereabouts"):
            return
        for event in cast(Spreads, self.executor).whereabouts():
            self._tell("on_placement" if isinstance(event, Placed) else "on_loss", event)

    def _how_to_go_on(self) -> str:
        return how_to_go_on(self.paths, trust_remote_code=self._trusts)

    def _tell(self, what: str, event: object) -> None:
        for callback in self.callbacks:
            getattr(callback, what)(event)
