"""Scoring, for any number of agents of one algorithm on one base at once: all of them on the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from evollm.algorithms.agent import LLMAgent
from evollm.algorithms.references import BROKEN, REASON, Judge, finite_rows, leave_out, other_rows
from evollm.algorithms.step import policy_logprobs
from evollm.data.samples import Batch, IntArray, Sample
from evollm.errors import DataError
from evollm.models.logprobs import MemberLogprobs

if TYPE_CHECKING:
    from evollm.llm_envs import DatasetGym

A = TypeVar("A", bound=LLMAgent)


def scored_batches(
    usable_rows: Judge[A], agents: Sequence[A], env: DatasetGym, split: str
) -> Iterator[tuple[IntArray, Batch, list[MemberLogprobs]]]:
    """Go once through the rows of a split on which all agents can be scored.

    Args:
        usable_rows: On which each of them can be.
        agents: Agents of one base.
        env: The environment.
        split: `test` or `final`.

    Yields:
        Positions of some pairs in the split, these pairs as a batch, and their log-probs under each agent's actor.

    Raises:
        DataError: There is no such row, or rows are left out by agents with `drop_nonfinite_rows=False`.
    """
    pairs = env.evaluation_pairs(split)
    unusable: list[Sample] = []
    for positions, batch in env.eval_batches(split):
        rows, policies = _score(usable_rows, agents, batch)
        unusable += [pairs[position] for position in positions[other_rows(rows, len(batch))]]
        if rows:
            yield positions[rows], batch.select(rows), policies
    if len(unusable) == len(pairs):
        raise DataError(f"{split}_dataset", f"{len(pairs)} rows", f"on every one {REASON}: {BROKEN}")
    if unusable:
        leave_out(agents, Batch(unusable, split))


def _score(usable_rows: Judge[A], agents: Sequence[A], batch: Batch) -> tuple[list[int], list[MemberLogprobs]]:
    """The rows of a batch on which all agents can be scored, and each actor's log-probs there."""
    rows = sorted(set.intersection(*(set(usable) for usable in usable_rows(agents, batch, ()))))
    if not rows:
        return rows, []
    kept = batch.select(rows)
    policies = policy_logprobs(agents, kept)
    suspects = other_rows(finite_rows([policy.sums() for policy in policies]), len(kept))
    if suspects and any(len(usable) < len(kept) for usable in usable_rows(agents, kept, suspects)):
        fewer, policies = _score(usable_rows, agents, kept)
        rows = [rows[row] for row in fewer]
    return rows, policies
