"""Answers to held-out prompts for a judge, of members and of the references that they are compared with."""

from __future__ import annotations

from collections.abc import Sequence

from evollm.execution.answer_lengths import evaluated_positions
from evollm.hpo import AnswerPair, AnswerSampling
from evollm.llm_envs import DatasetGym
from evollm.models import SharedBase
from evollm.models.generation import Question, answers_to, text_of_answer


class ComparedAnswers:
    """Generates answers; a reference answers a prompt once in a run.

    Args:
        base: The base.
        env: The gym with the held-out rows.
    """

    def __init__(self, base: SharedBase, env: DatasetGym) -> None:
        self._base = base
        self._env = env
        # The answers of a reference, by what was asked and the position of the prompt in the split. Names of adapters
        # are never used twice, so a name stands for its weights.
        self._known: dict[tuple[str, str | None, AnswerSampling], dict[int, str]] = {}

    def of(
        self, adapters: Sequence[tuple[str, str | None]], split: str, rows: int | None, asked: AnswerSampling
    ) -> list[list[AnswerPair]]:
        """For each actor and its reference (None: the base without adapter) their answers to the evaluated prompts.

        Args:
            adapters: Actors with their references.
            split: `test` or `final`, which has just been evaluated.
            rows: The rows of that evaluation, None: all.
            asked: What is generated.
        """
        samples, prompts = self._env.evaluation_pairs(split), self._env.reports[split].prompts
        evaluated = evaluated_positions(self._base, self._env, split, rows)
        # A prompt of several rows is answered once: what is said of it again would not be independent.
        first: dict[bytes, tuple[int, int]] = {}
        for place, position in enumerate(evaluated):
            first.setdefault(samples[position].prompt_ids.tobytes(), (place, position))
        chosen = list(first.values())[: asked.prompts]
        positions = [position for _, position in chosen]
        own, theirs = self._answers([actor for actor, _ in adapters], split, positions, asked), []
        for _, reference in adapters:
            known = self._known.setdefault((split, reference, asked), {})
            if new := [position for position in positions if position not in known]:
                known |= zip(new, self._answers([reference], split, new, asked)[0], strict=True)
            theirs.append([known[position] for position in positions])

        def pair_of(number: int, mine: str, other: str) -> AnswerPair:
            place, position = chosen[number]
            sample = samples[position]
            return AnswerPair(_row(sample.row), prompts[position], mine, other, place, sample.set_name)

        numbers = range(len(chosen))
        return [list(map(pair_of, numbers, mine, other)) for mine, other in zip(own, theirs, strict=True)]

    def _answers(
        self, adapters: Sequence[str | None], split: str, positions: Sequence[int], asked: AnswerSampling
    ) -> list[list[str]]:
        """For each adapter its answers to the prompts at these positions of a split."""
        samples, tokenizer = self._env.evaluation_pairs(split), self._env.tokenizer
        questions = [
            Question(adapter, samples[position].prompt_ids, asked.temperature, (asked.seed, position))
            for adapter in adapters
            for position in positions
        ]
        found = answers_to(self._base, questions, tokenizer, asked.max_new_tokens, top_p=asked.top_p)
        texts, count = [text_of_answer(answer, tokenizer) for answer in found], len(positions)
        return [texts[number * count : (number + 1) * count] for number in range(len(adapters))]


def _row(row: int | None) -> int:
    return -1 if row is None else row
