"""Lengths of greedy answers to held-out prompts, of members and of the references that they are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evollm.hpo import AnswerSampling
from evollm.llm_envs import DatasetGym
from evollm.models import SharedBase
from evollm.models.generation import greedy_lengths


class AnswerLengths:
    """Adds the lengths of answers to evaluations; a reference answers a prompt once in a run.

    Args:
        base: The base.
        env: The gym with the held-out rows.
    """

    def __init__(self, base: SharedBase, env: DatasetGym) -> None:
        self._base = base
        self._env = env
        # Lengths of a reference's answers, cut at so many tokens, by the position of the prompt in the split. Names of
        # adapters are never used twice, so a name stands for its weights.
        self._known: dict[tuple[str, str | None, int], dict[int, int]] = {}

    def added(
        self,
        found: Sequence[Any],
        adapters: Sequence[tuple[str, str | None]],
        split: str,
        rows: int | None,
        asked: AnswerSampling,
    ) -> list[Any]:
        """The evaluations with the lengths of both answers to the first of their prompts.

        Args:
            found: The evaluations of a split, just made.
            adapters: For each of them the actor and the reference; None: the base without adapter.
            split: `test` or `final`.
            rows: The rows of the evaluations, None: all.
            asked: How many prompts are answered, and where answers are cut.
        """
        answered = evaluated_positions(self._base, self._env, split, rows)[: asked.prompts]
        own, theirs = self._lengths([actor for actor, _ in adapters], split, answered, asked), []
        for _, reference in adapters:
            known = self._known.setdefault((split, reference, asked.max_new_tokens), {})
            if new := [position for position in answered if position not in known]:
                known |= zip(new, self._lengths([reference], split, new, asked)[0], strict=True)
            theirs.append([known[position] for position in answered])
        unknown = [math.nan] * (len(found[0]) - len(answered))
        return [
            replace(one, answer_lengths=np.array([*mine, *unknown]), reference_lengths=np.array([*other, *unknown]))
            for one, mine, other in zip(found, own, theirs, strict=True)
        ]

    def _lengths(
        self, adapters: Sequence[str | None], split: str, positions: Sequence[int], asked: AnswerSampling
    ) -> list[list[int]]:
        """For each adapter the lengths of its answers to the prompts at these positions of a split."""
        prompts = [self._env.evaluation_pairs(split)[position].prompt_ids for position in positions]
        return greedy_lengths(self._base, adapters, prompts, self._env.tokenizer, asked.max_new_tokens)


def evaluated_positions(base: SharedBase, env: DatasetGym, split: str, rows: int | None) -> list[int]:
    """Positions in a split of the rows of the last evaluation, which was on so many, without those left out."""
    left_out = base.reference_cache.left_out
    return sorted(
        int(position)
        for positions, batch in env.eval_batches(split, rows=rows)
        for position, key in zip(positions, batch.keys(), strict=True)
        if (split, key) not in left_out
    )
