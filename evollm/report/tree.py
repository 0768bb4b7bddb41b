"""Where the agents of a run stand in the drawing of its family tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evollm.hpo import Birth, Mutation, format_value
from evollm.runs.record import RunRecord, Scored


@dataclass(frozen=True)
class Node:
    """One agent in one generation.

    Attributes:
        generation: Its column.
        row: Its row, 0 for the winner's line.
        parent_row: The row of its parent in the column before, None for a founder or a fresh agent.
        birth: Who it is.
        on_line: Whether it is the winner or one of its ancestors.
        culled: Whether nothing of it is in the next generation, though there is one.
        diverged: Whether it has diverged in this generation.
        score: At the last evaluation of this generation, None if there was none.
    """

    generation: int
    row: int
    parent_row: int | None
    birth: Birth
    on_line: bool
    culled: bool
    diverged: bool
    score: Scored | None

    @property
    def origin(self) -> str:
        """What it does not share with its parent, in a few words."""
        if self.birth.parent is None:
            return "fresh" if self.generation else "founder"
        if self.birth.elite or self.birth.parent == self.birth.index:
            return "kept"
        return ", ".join(map(change, self.birth.mutations)) or "copy"


def change(mutation: Mutation) -> str:
    """Write a mutation briefly: `lr x1.2`, or `loss_type ipo`."""
    after = format_value(mutation.after) if mutation.factor is None else f"\N{MULTIPLICATION SIGN}{mutation.factor:g}"
    return f"{mutation.name} {after}"


def in_words(mutation: Mutation) -> str:
    """Write a mutation for a sentence: `lr from 1.0e-4 to 1.2e-4`."""
    return f"{mutation.name} from {format_value(mutation.before)} to {format_value(mutation.after)}"


def family_tree(record: RunRecord) -> list[Node]:
    """Place every agent of every generation so that no two lines of descent cross.

    Children stand in the order of their parents, and the winner's line on top.
    """
    nodes: list[Node] = []
    rows: dict[int, int] = {}
    scores = {(scored.generation, scored.agent): scored for scored in record.evaluations}
    for generation, births in enumerate(record.generations):
        line = _line_member(record, generation)
        ordered = sorted(
            births,
            key=lambda birth: (
                birth.index != line,
                -1 if birth.parent is None else rows.get(birth.parent, len(rows)),
                birth.index,
            ),
        )
        heirs = _parents(record.generations, generation + 1)
        for row, birth in enumerate(ordered):
            life = record.lives[birth.index]
            nodes.append(
                Node(
                    generation=generation,
                    row=row,
                    parent_row=None if birth.parent is None else rows.get(birth.parent),
                    birth=birth,
                    on_line=birth.index == line,
                    culled=heirs is not None and birth.index not in heirs,
                    diverged=life.diverged and generation == life.generations[1],
                    score=scores.get((generation, birth.index)),
                )
            )
        rows = {birth.index: row for row, birth in enumerate(ordered)}
    return nodes


def _line_member(record: RunRecord, generation: int) -> int | None:
    """Who of the winner's line is in this generation."""
    for life in reversed(record.line):
        if life.generations[0] <= generation:
            return life.birth.index
    return None


def _parents(generations: Sequence[Sequence[Birth]], generation: int) -> set[int | None] | None:
    """Who has a child in this generation, or is kept in it; None when there is no such generation."""
    return {birth.parent for birth in generations[generation]} if generation < len(generations) else None
