"""Evaluation of several agents of one algorithm on one base at once, all on the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from evollm.algorithms.agent import LLMAgent
from evollm.algorithms.references import BROKEN, REASON, Judge, finite_rows, leave_out, other_rows
from evollm.algorithms.step import policy_logprobs
from evollm.data.samples import Batch, IntArray, Sample
from evollm.errors import DataError
from evollm.models.budget import rows_at_a_time
from evollm.models.logprobs import MemberLogprobs

if TYPE_CHECKING:
    from evollm.llm_envs import DatasetGym

A = TypeVar("A", bound=LLMAgent)


def scored_batches(
    usable_rows: Judge[A], agents: Sequence[A], env: DatasetGym, split: str, rows: int | None = None
) -> Iterator[tuple[IntArray, Batch, list[MemberLogprobs]]]:
    """Iterate once over rows of a split that are usable for all agents.

    A row that is not usable for one agent is left out for all, since agents are compared on the same rows; an
    evaluation of other agents may have it.

    Args:
        usable_rows: Gives the rows of a batch on which each agent can be scored.
        agents: Agents of one base.
        env: The environment.
        split: `test` or `final`.
        rows: The number of rows, as of `DatasetGym.eval_batches`.

    Yields:
        Positions of rows in the split, the batch of these rows, and its log-probs under each agent's actor.

    Raises:
        DataError: No row is usable, or some are not and an agent has `drop_nonfinite_rows=False`.
    """
    pairs = env.evaluation_pairs(split)
    unusable: list[Sample] = []
    seen = 0
    size = rows_at_a_time(agents[0].base.device.type, env.batch_size)
    for positions, batch in env.eval_batches(split, size, rows):
        usable, policies = _score(usable_rows, agents, batch)
        unusable += [pairs[position] for position in positions[other_rows(usable, len(batch))]]
        seen += len(batch)
        if usable:
            yield positions[usable], batch.select(usable), policies
    if len(unusable) == seen:
        raise DataError(f"{split}_dataset", f"{seen} rows", f"on every one {REASON}: {BROKEN}")
    agents[0].base.reference_cache.left_out = {(split, sample.key) for sample in unusable}
    if unusable:
        leave_out(agents, Batch(unusable, split))


def _score(usable_rows: Judge[A], agents: Sequence[A], batch: Batch) -> tuple[list[int], list[MemberLogprobs]]:
    """The rows of a batch that are usable for all agents, and their log-probs under each agent's actor."""
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
