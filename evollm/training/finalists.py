"""The contest after the last step: candidates made of the best agents, against the best agent itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

from evollm.errors import ConfigurationError
from evollm.execution.executor import FIRST_CANDIDATE, Combines
from evollm.hpo import AnyEvaluation, FinalCandidates, Guards
from evollm.hpo.finalists import Comparison, Recipe, compare_pairwise, winning_candidate
from evollm.hpo.fitness import FloatArray
from evollm.runs.events import Candidate

# Maps an evaluation to (n,) contributions of its rows to a score; larger is better.
Terms = Callable[[Any], FloatArray]


class Contest:
    """Makes and evaluates the candidates.

    Args:
        executor: Holds the agents.
        asked: The candidates that are asked for.
        terms: The terms of the score by which candidates are compared.
        guards: Bounds that a winner must hold.
    """

    def __init__(self, executor: Combines, asked: FinalCandidates, terms: Terms, guards: Guards) -> None:
        self._executor = executor
        self._asked = asked
        self._terms = terms
        self._guards = guards
        self._indices = count(FIRST_CANDIDATE, -1)
        self._found: dict[int, tuple[Recipe, AnyEvaluation]] = {}

    def hold(self, finalists: Sequence[int]) -> tuple[int, list[Candidate]]:
        """Evaluate the candidates on the selection rows; those that do not win are freed.

        Args:
            finalists: Indices of agents, the best one first.

        Returns:
            Index by which the executor knows the winner, and all candidates.
        """
        best = finalists[0]
        alone = self._scored([best])[best]
        self._evaluate(self._asked.recipes(finalists))
        if self._asked.greedy:
            self._greedy_soup(finalists[: self._asked.finalists], alone)
        # All processes have the same evaluations, but a user's own guard or score may differ between them.
        compared = {index: self._compare(evaluation, alone) for index, (_, evaluation) in self._found.items()}
        place = winning_candidate(list(compared.values()), self._asked.level)
        place = self._executor.processes.from_main(place)
        winner = best if place is None else list(compared)[place]
        candidates = [
            Candidate(recipe, evaluation.scores, compared[index].difference, compared[index].p_value, index == winner)
            for index, (recipe, evaluation) in self._found.items()
        ]
        self._executor.discard([index for index in self._found if index != winner])
        return winner, candidates

    def _evaluate(self, recipes: Sequence[Recipe]) -> list[int]:
        """Make and evaluate candidates; one that cannot be made is left out with a warning. Returns their indices."""
        made: dict[int, Recipe] = {}
        for recipe in recipes:
            index = next(self._indices)
            try:
                self._executor.combine(index, recipe)
            except ConfigurationError as error:
                warnings.warn(f"candidate left out: {recipe}: {error}", UserWarning, stacklevel=2)
            else:
                made[index] = recipe
        scored = self._scored(list(made)) if made else {}
        self._found |= {index: (recipe, scored[index]) for index, recipe in made.items()}
        return list(made)

    def _scored(self, indices: Sequence[int]) -> Mapping[int, AnyEvaluation]:
        return self._executor.evaluate("test", indices, **self._guards.measurements)

    def _greedy_soup(self, finalists: Sequence[int], alone: AnyEvaluation) -> None:
        """Add each finalist to the soup that does not lower the score; only the last soup stays a candidate."""
        uniform = {recipe for recipe, _ in self._found.values()}
        soup, score, present = [finalists[0]], self._score(alone), None
        for agent in finalists[1:]:
            for index in self._evaluate([self._asked.combined([*soup, agent])]):
                found = self._score(self._found[index][1])
                if found >= score:
                    soup, score, present, index = [*soup, agent], found, index, present  # noqa: PLW2901
                if index is not None:
                    self._drop(index)
        if present is not None and self._found[present][0] in uniform:
            self._drop(present)

    def _score(self, evaluation: AnyEvaluation) -> float:
        return float(self._terms(evaluation).mean())

    def _drop(self, index: int) -> None:
        del self._found[index]
        self._executor.discard([index])

    def _compare(self, evaluation: AnyEvaluation, alone: AnyEvaluation) -> Comparison:
        found = compare_pairwise(self._terms(evaluation), self._terms(alone))
        if self._guards.excess(evaluation) != 0:
            return Comparison(found.difference, float("nan"))
        if self._guards.excess(alone) != 0:
            # No score makes up for a bound that the best agent breaks and the candidate holds.
            return Comparison(found.difference, 0.0)
        return found
