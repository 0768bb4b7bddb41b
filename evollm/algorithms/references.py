"""What agents are compared with: log-probs of frozen weights, and the rows on which these are not finite."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import torch

from evollm.algorithms.agent import OWN, REFERENCE, LLMAgent
from evollm.data.samples import Batch
from evollm.errors import DataError
from evollm.models.engine import Engine, Item
from evollm.models.logprobs import CompletionSums
from evollm.processes import Processes

A = TypeVar("A", bound=LLMAgent)

Rows: TypeAlias = tuple[int, ...]
# From agents, their batch, and rows on which an agent's own log-prob is not finite, to the rows that each can learn
# from and be scored on.
Judge: TypeAlias = Callable[[Sequence[A], Batch, Sequence[int]], Sequence[Rows]]

# Of rows that are named, the first ones.
MOST_NAMED = 20
REASON = "the frozen base, or the reference on it, gives log-probs that are not finite"
BROKEN = "the base is broken, or numbers get too large for its type: load it anew, in bfloat16 or float32"


def reference_logprobs(
    agents: Sequence[LLMAgent], batch: Batch, reference: str | None = OWN, *, up_to_shorter: bool = False
) -> list[CompletionSums]:
    """Log-probs of the batch's samples under each agent's reference, computed once for each reference and sample.

    Those of the other rows are what they would be without the rows on which they are not finite, bit for bit.

    Args:
        agents: Agents of one base.
        batch: B samples.
        reference: Name of a frozen adapter, None for the base without adapter; by default each agent's own.
        up_to_shorter: Whether sums up to the shortest completion's length are given too.

    Returns:
        (B,) float64 tensors on the CPU for each agent.
    """
    base, options = agents[0].base, agents[0].pass_options
    names = [agent.adapter(REFERENCE) if reference == OWN else reference for agent in agents]
    fingerprints = [base.adapters.fingerprint(name) for name in names]
    # By content: references of different names may hold the same weights.
    distinct = dict(zip(fingerprints, names, strict=True))
    adapters = list(distinct.values())

    def sums_of(samples: Batch, numbers: Sequence[int]) -> list[CompletionSums]:
        items = Item.on(samples, [adapters[number] for number in numbers])
        return [one.sums(up_to_shorter=up_to_shorter) for one in Engine.of(base).logprobs(items, options)]

    def compute(missing: Batch, numbers: Sequence[int]) -> list[CompletionSums]:
        found = sums_of(missing, numbers)
        finite = finite_rows(found)
        if len(finite) in (0, len(missing)):
            return found
        # Once more, for roundings depend on what shares a pass.
        again = sums_of(missing.select(finite), numbers)
        return [first.with_rows(finite, second) for first, second in zip(found, again, strict=True)]

    found = base.reference_cache.get(list(distinct), batch, compute, up_to_shorter=up_to_shorter)
    by_fingerprint = dict(zip(distinct, found, strict=True))
    return [by_fingerprint[fingerprint] for fingerprint in fingerprints]


def finite_rows(found: Sequence[CompletionSums]) -> list[int]:
    """The rows on which all log-probs are finite, whoever gives them."""
    columns = torch.stack([column for one in found for column in one.columns])
    return [row for row, finite in enumerate(torch.isfinite(columns).all(dim=0).tolist()) if finite]


def other_rows(rows: Sequence[int], count: int) -> list[int]:
    """The rows of a batch of `count` that are not among these."""
    return sorted({*range(count)} - {*rows})


def leave_out(agents: Sequence[LLMAgent], batch: Batch) -> None:
    """Say of rows that they are left out, once of each; or refuse them, if the agents were made to.

    Args:
        agents: Agents whose base or reference gives log-probs that are not finite on each pair of the batch.
        batch: At least one pair, with `rows`.

    Raises:
        DataError: `drop_nonfinite_rows` is False.
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
    """The rows of a batch by their split and their positions in the user's dataset."""
    assert batch.rows is not None
    numbers = sorted(batch.rows)
    listed = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = f", ... ({len(numbers)} in all)" if len(numbers) > MOST_NAMED else ""
    return f"{batch.split_name} {'row' if len(numbers) == 1 else 'rows'} {listed}{more}"
