"""The scores of members on the selection rows, and the copy of the best member so far."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evollm.by_main import computed_by_main
from evollm.execution.executor import Executor
from evollm.hpo import AnyEvaluation, Fitness, as_fitness
from evollm.runs.events import Evaluated
from evollm.training.early_stopping import compare
from evollm.training.options import RunOptions
from evollm.training.spending import Account, Prices
from evollm.training.state import Best, Progress

# The fitness of a diverged member: `rank` puts NaN after every finite fitness.
DIVERGED_FITNESS: Fitness = (float("nan"),)


class Scorer:
    """Evaluates members and records the scores in the progress of the run.

    Args:
        executor: Holds the members.
        options: The guards, the search and the threshold of early stopping.
        prices: What the run has spent, for the events.
        fitness: Maps an evaluation to a fitness.
    """

    def __init__(
        self, executor: Executor, options: RunOptions, prices: Prices, fitness: Callable[[Any], object]
    ) -> None:
        self._executor = executor
        self._options = options
        self._prices = prices
        self._fitness = fitness

    def score(
        self, account: Account, indices: Sequence[int] | None, rows: int | None
    ) -> tuple[Mapping[int, AnyEvaluation], dict[int, Fitness]]:
        """The evaluations and fitnesses of these members, or of all that have not diverged; rows None: on all.

        The account gets what the evaluation costs.
        """
        bounds = self._options.bounds
        fewer: dict[str, Any] = {} if rows is None else {"rows": rows}
        evaluations: Mapping[int, Any] = self._executor.evaluate("test", indices, **bounds.measurements, **fewer)
        account.add(self._executor.spent())
        for remark in filter(None, {bounds.remark(one) for one in evaluations.values()}):
            warnings.warn(remark, UserWarning, stacklevel=2)
        return evaluations, self._fitnesses(evaluations)

    def _fitnesses(self, evaluations: Mapping[int, Any]) -> dict[int, Fitness]:
        """The fitnesses by the main process: a user's function may give others in other processes, or fail there alone.

        Raises:
            Exception: The function has failed; in other processes than the main one an `EvoLLMError` with its text.
        """
        bounds = self._options.bounds

        def compute() -> dict[str, Fitness]:
            return {
                str(index): bounds.guarded(as_fitness(self._fitness(one)), one) for index, one in evaluations.items()
            }

        found = computed_by_main(self._executor.processes, compute, "the fitness function")
        return {int(index): tuple(fitness) for index, fitness in found.items()}

    def score_all(self, progress: Progress, rows: int | None) -> Mapping[int, AnyEvaluation]:
        """Evaluate all members that have not diverged, and record the fitness of every member; see `score`."""
        evaluations, found = self.score(progress.account, None, rows)
        fitnesses = {member.index: found.get(member.index, DIVERGED_FITNESS) for member in self._executor.members()}
        progress.evaluated, progress.evaluated_rows, progress.fitnesses = progress.step, rows, fitnesses
        if self._options.evolves:
            progress.evaluations = dict(evaluations)
        self._executor.note_scores({index: fitness[0] for index, fitness in fitnesses.items()})
        return evaluations

    def keep_best(
        self,
        progress: Progress,
        evaluations: Mapping[int, AnyEvaluation],
        fitnesses: Mapping[int, Fitness],
        best: int,
        rows: int | None,
    ) -> Evaluated:
        """Keep the best member of an evaluation if it is the best so far; returns the event of the evaluation."""
        found = Best(best, progress.step, fitnesses[best], rows)
        threshold = self._options.early_stopping_threshold
        progress.best, progress.stale = compare(progress.best, progress.stale, found, threshold)
        if progress.best is found:
            self._executor.keep_best(best)
        members = [member for member in self._executor.members() if member.index in fitnesses]
        agents = {member.index: dict(member.hyperparameters) for member in members}
        spent = self._prices.spent(progress.account, progress.step)
        return Evaluated(progress.step, progress.generation, evaluations, fitnesses, best, agents, spent, rows)
