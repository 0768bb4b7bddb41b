"""Evaluations with win rates: an executor whose members' answers a judge compares with those of their references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from inspect import signature
from typing import Any

import numpy as np

from evollm.by_main import computed_by_main
from evollm.errors import ConfigurationError
from evollm.execution.executor import Agreement, Description, Executor
from evollm.hpo import AnyEvaluation, Judge
from evollm.runs.words import Score

WIN_RATE = Score("win_rate", "win rate", "share of prompts", is_share=True, in_full="win rate against the reference")


class JudgedExecutor:
    """An executor whose evaluations have `win_rates`; all else is that of another executor, which generates answers.

    The judge is called in the main process of the run alone, wherever the members are, so it need not be picklable.

    Args:
        executor: Holds the members; it has a method `compared_answers`.
        judge: Compares the answers.
        first: Row and prompt of a held-out row, on which the judge is tried.

    Raises:
        ConfigurationError: The executor cannot generate answers, or the judge fails.
    """

    def __init__(self, executor: Executor, judge: Judge, first: tuple[int, Any]) -> None:
        if not callable(getattr(executor, "compared_answers", None)):
            fix = f"needs a method compared_answers, which {type(executor).__name__} lacks: leave it out"
            raise ConfigurationError("judge", judge.name, fix)
        self.processes: Agreement = executor.processes
        self._executor: Any = executor
        self._judge = judge
        self._measures = signature(executor.evaluate).parameters
        computed_by_main(self.processes, lambda: judge.try_out(*first), judge.name)

    def __getattr__(self, name: str) -> Any:
        """What is not of this class is the other executor's."""
        if name == "_executor":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._executor, name)

    def describe(self) -> Description:
        """The other executor's description, with the win rate among the scores; see `Executor.describe`."""
        found: Description = self._executor.describe()
        words = found.config["words"]
        # `rows` is no argument of every executor's `evaluate`, but is one of this class's.
        return replace(
            found,
            config={**found.config, "words": {**words, "scores": (*words["scores"], asdict(WIN_RATE))}},
            takes_rows=found.takes_rows and "rows" in self._measures,
        )

    def evaluate(
        self, split: str, indices: Sequence[int] | None = None, *, rows: int | None = None, **asked: Any
    ) -> dict[int, AnyEvaluation]:
        """Evaluate members, then judge their answers; see `Executor.evaluate`."""
        fewer = {} if rows is None else {"rows": rows}
        found: Mapping[int, AnyEvaluation] = self._executor.evaluate(split, indices, **asked, **fewer)
        if not found:
            return {}
        answers = self._executor.compared_answers(split, list(found), self._judge.sampling, rows=rows)
        pairs = [pair for index in found for pair in answers[index]]
        rates = computed_by_main(self.processes, lambda: self._judge.win_rates(pairs).tolist(), self._judge.name)
        judged, start = {}, 0
        for index, evaluation in found.items():
            own, start = rates[start : start + len(answers[index])], start + len(answers[index])
            known = np.full(len(evaluation), np.nan)
            known[[pair.place for pair in answers[index]]] = own
            judged[index] = replace(evaluation, win_rates=known)
        return judged


def first_row(env: Any) -> tuple[int, Any]:
    """Row and prompt of the first held-out row of a gym."""
    row = env.test_pairs[0].row
    return -1 if row is None else row, env.reports["test"].prompts[0]
