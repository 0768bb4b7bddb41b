"""Which lines a picture of points over the steps has: the winner's line as one, and each other agent's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from evollm.runs.record import Life, RunRecord

P = TypeVar("P")


@dataclass(frozen=True)
class Path(Generic[P]):
    """A line to draw.

    Attributes:
        life: The agent at its end.
        on_line: Whether it is the winner's line.
        points: In the order of their steps.
    """

    life: Life
    on_line: bool
    points: Sequence[P]


def paths(record: RunRecord, points: Mapping[int, Sequence[P]], step: Callable[[P], int]) -> list[Path[P]]:
    """Join the points of each agent, beginning where its parent was when it was born.

    An ancestor of the winner that lived on beside its heir leaves the winner's line at the heir's birth.

    Args:
        record: The run.
        points: Of each agent, in the order of their steps.
        step: The steps done at a point.

    Returns:
        The winner's line last, to be drawn over the others; nothing for agents without a point of their own.
    """
    found: list[Path[P]] = []
    line: list[P] = []
    for index, life in record.lives.items():
        own = [point for point in points.get(index, []) if step(point) > life.steps[0] or life.birth.parent is None]
        parent = life.birth.parent
        before = [] if parent is None else [one for one in points.get(parent, []) if step(one) <= life.steps[0]][-1:]
        if index in record.line_ends:
            end = record.line_ends[index]
            line += [point for point in own if step(point) <= end]
            before, own = line[-1:], [point for point in own if step(point) > end]
        if own:
            found.append(Path(life, False, [*before, *own]))
    return [*found, *([Path(record.line[-1], True, line)] if line else [])]
