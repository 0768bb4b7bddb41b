"""The section on the workers of a run: which members they held in which steps, and what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evollm.pace import spoken
from evollm.runs.events import Placed, WorkerHome, WorkerLoss
from evollm.runs.record import RunRecord

# Of a worker whose members have changed more often, only the last times are written out.
MAX_WRITTEN_SPANS = 6


def where_it_ran(record: RunRecord) -> dict[str, Any] | None:
    """The values of the section; None of a run that had one worker all the time."""
    held = _held(record) if record.placements else {}
    if len({home.worker for home in held}) < 2:  # noqa: PLR2004 - more than one
        return None
    machines = sorted({home.machine for home in held})
    where = machines[0] if len(machines) == 1 else f"{len(machines)} machines"
    text = f"Members were divided among workers on {where}; each trains its members by itself, on a base of its own."
    sentences = [text, *(f"In {_steps(*span)} all members were in one process." for span in _alone(record))]
    return {
        "text": " ".join([*sentences, _cost(record.losses)]).strip(),
        "rows": [
            {"worker": home.worker, "machine": home.machine, "process": home.process, "held": _written(spans)}
            for home, spans in sorted(held.items(), key=lambda item: (item[0].worker, item[1][0][0]))
        ],
        "losses": [_loss(loss) for loss in record.losses],
    }


def _held(record: RunRecord) -> dict[WorkerHome, list[tuple[int, int, tuple[int, ...]]]]:
    """For each worker the first and the last step of a time, and the members that it held in it."""
    found: dict[WorkerHome, list[tuple[int, int, tuple[int, ...]]]] = {}
    for placed, last in _with_ends(record):
        for home, members in zip(placed.homes, placed.members, strict=True):
            spans = found.setdefault(home, [])
            own = tuple(sorted(members))
            if spans and spans[-1][1:] == (placed.step - 1, own):
                spans[-1] = (spans[-1][0], last, own)
            elif placed.step <= last:
                spans.append((placed.step, last, own))
    return {home: spans for home, spans in found.items() if spans}


def _alone(record: RunRecord) -> list[tuple[int, int]]:
    """The first and the last step of each time in which a resumed run had no workers."""
    return [(one.step, last) for one, last in _with_ends(record) if not one.homes and one.step <= last]


def _with_ends(record: RunRecord) -> list[tuple[Placed, int]]:
    """The placements, each with the last step for which it holds."""
    ends = [one.step - 1 for one in record.placements[1:]] + [record.last_step]
    return list(zip(record.placements, ends, strict=True))


def _written(spans: Sequence[tuple[int, int, tuple[int, ...]]]) -> str:
    parts = []
    for first, last, members in spans[-MAX_WRITTEN_SPANS:]:
        who = f"{', '.join(map(str, members))}" if members else "none"
        parts.append(f"{who} ({_steps(first, last)})")
    return ("..., " if len(spans) > MAX_WRITTEN_SPANS else "") + "; ".join(parts)


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _cost(losses: Sequence[WorkerLoss]) -> str:
    if not losses:
        return ""
    count = "One worker was" if len(losses) == 1 else f"{len(losses)} workers were"
    return f"{count} lost, for which the run waited {spoken(sum(loss.seconds for loss in losses))}."


def _loss(loss: WorkerLoss) -> str:
    went_on = "another process took its place" if loss.replaced else "its members went on with the other workers"
    why = loss.why.rstrip(".")
    return (
        f"Step {loss.step}: worker {loss.home.worker} on {loss.home.machine} was lost ({why}); {went_on}, "
        f"after {spoken(loss.seconds)}."
    )
