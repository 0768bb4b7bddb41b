"""Log-probs under frozen references, and the treatment of rows on which reference log-probs are not finite."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import torch

from evollm.algorithms.agent import OWN, REFERENCE, LLMAgent
from evollm.data.samples import Batch
from evollm.errors import DataError
from evollm.models.engine import Engine, Item
from evollm.models.flops import REFERENCES
from evollm.models.logprobs import CompletionSums
from evollm.models.reference_cache import ReferenceCache
from evollm.processes import Processes

A = TypeVar("A", bound=LLMAgent)

Rows: TypeAlias = tuple[int, ...]
# (agents, their batch, rows on which an actor's log-prob is not finite) -> the rows on which each agent can be trained
# and scored.
Judge: TypeAlias = Callable[[Sequence[A], Batch, Sequence[int]], Sequence[Rows]]

# Most rows that a message lists.
MOST_NAMED = 20
REASON = "the frozen base, or the reference on it, gives log-probs that are not finite"
BROKEN = "the base is broken, or numbers get too large for its type: load it anew, in bfloat16 or float32"


def reference_logprobs(
    agents: Sequence[LLMAgent],
    batch: Batch,
    reference: str | None = OWN,
    *,
    up_to_shorter: bool = False,
    cache: ReferenceCache | None = None,
) -> list[CompletionSums]:
    """Log-probs of the batch's samples under each agent's reference, computed once for each reference and sample.

    Log-probs of finite rows are bit-identical to those of a batch without the non-finite rows.

    Args:
        agents: Agents of one base.
        batch: B samples.
        reference: Name of a frozen adapter; None: the base without adapter; by default each agent's reference.
        up_to_shorter: Whether to include the sums up to the shortest completion's length.
        cache: What is computed is kept here; None: with the base, for good.

    Returns:
        (B,) float64 tensors on the CPU for each agent.
    """
    base, options = agents[0].base, agents[0].pass_options
    names = [agent.adapter(REFERENCE) if reference == OWN else reference for agent in agents]
    fingerprints = [base.adapters.fingerprint(name) for name in names]
    # Keyed by content, since references of different names may hold the same weights.
    distinct = dict(zip(fingerprints, names, strict=True))
    adapters = list(distinct.values())

    def sums_of(samples: Batch, numbers: Sequence[int]) -> list[CompletionSums]:
        items = Item.on(samples, [adapters[number] for number in numbers])
        return [one.sums(up_to_shorter=up_to_shorter) for one in Engine.of(base).logprobs(items, options, REFERENCES)]

    def compute(missing: Batch, numbers: Sequence[int]) -> list[CompletionSums]:
        found = sums_of(missing, numbers)
        finite = finite_rows(found)
        if len(finite) in (0, len(missing)):
            return found
        # Recomputed without the non-finite rows, since rounding depends on which rows share a pass.
        again = sums_of(missing.select(finite), numbers)
        return [first.with_rows(finite, second) for first, second in zip(found, again, strict=True)]

    cache = base.reference_cache if cache is None else cache
    found = cache.get(list(distinct), batch, compute, up_to_shorter=up_to_shorter)
    by_fingerprint = dict(zip(distinct, found, strict=True))
    return [by_fingerprint[fingerprint] for fingerprint in fingerprints]


def finite_rows(found: Sequence[CompletionSums]) -> list[int]:
    """The rows on which the log-probs of all items of `found` are finite."""
    columns = torch.stack([column for one in found for column in one.columns])
    return [row for row, finite in enumerate(torch.isfinite(columns).all(dim=0).tolist()) if finite]


def other_rows(rows: Sequence[int], count: int) -> list[int]:
    """The rows of a batch of size `count` that are not in `rows`."""
    return sorted({*range(count)} - {*rows})


def leave_out(agents: Sequence[LLMAgent], batch: Batch) -> None:
    """Warn once for each row that it is left out, or raise if an agent has `drop_nonfinite_rows=False`.

    Args:
        agents: Agents whose base or reference gives non-finite log-probs on each row of the batch.
        batch: At least one sample, with `rows`.

    Raises:
        DataError: An agent has `drop_nonfinite_rows=False`.
    """
    if not all(agent.settings.drop_nonfinite_rows for agent in agents):
        fix = f"on {_named(batch)} {REASON}: correct or remove what stands there, or leave it out with True"
        raise DataError("drop_nonfinite_rows", False, fix)
    told_of = agents[0].base.reference_cache.told_of
    names = [(batch.split_name, key) for key in batch.keys()]  # noqa: SIM118 - not a mapping
    new = [row for row, name in enumerate(names) if name not in told_of]
    told_of.update(names)
    if new and Processes.present().is_main:
        warnings.warn(f"left out: {_named(batch.select(new))}, for there {REASON}", UserWarning, stacklevel=2)


def _named(batch: Batch) -> str:
    """The rows of a batch in words: the split, the set if there are several, and positions in the user's dataset."""
    assert batch.rows is not None
    rows_of: dict[str, list[int]] = {}
    for sample, row in zip(batch, batch.rows, strict=True):
        rows_of.setdefault(sample.set_name, []).append(row)
    return "; ".join(
        f"{batch.split_name} {_numbered(sorted(rows))}{f' of {name}' if name else ''}" for name, rows in rows_of.items()
    )


def _numbered(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = f", ... ({len(numbers)} in all)" if len(numbers) > MOST_NAMED else ""
    return f"{'row' if len(numbers) == 1 else 'rows'} {listed}{more}"
