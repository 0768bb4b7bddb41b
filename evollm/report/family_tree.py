"""The family tree of a run: where each agent stands in it, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evollm.hpo import Birth, Mutation, format_value
from evollm.report.style import DIVERGED, INK, OTHER, WINNER, Picture, new_panel, shortened, to_picture
from evollm.runs.record import RunRecord, Scored
from evollm.runs.words import Words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches of an agent's box, and of the cell around it.
BOX, CELL = (1.42, 0.42), (1.78, 0.54)
# With more generations agents are drawn as dots.
MAX_BOXED_GENERATIONS = 16
DOT_CELL = (0.45, 0.3)
# The largest width of the picture in inches.
MAX_WIDTH = 40.0
# The width in inches that a narrow screen shows.
NARROW = 4.6
# Dash pattern of a box without children.
CULLED = (0, (2.5, 2))


@dataclass(frozen=True)
class Node:
    """One agent in one generation.

    Attributes:
        generation: The node's column.
        row: The node's row, 0 for the winner's line.
        parent_row: The row of the parent in the column before, None for a founder or a fresh agent.
        second_row: The row of the second parent, None for an agent without one.
        birth: The agent's birth in this generation.
        on_line: Whether the agent is the winner or an ancestor of it.
        culled: Whether the next generation has neither the agent nor a child of it.
        diverged: Whether the agent has diverged in this generation.
        score: The winner's evaluation, or the last one of the agent in this generation; None if there was none.
    """

    generation: int
    row: int
    parent_row: int | None
    second_row: int | None
    birth: Birth
    on_line: bool
    culled: bool
    diverged: bool
    score: Scored | None

    @property
    def origin(self) -> str:
        """How the agent differs from its parent, as a short label."""
        if self.birth.parent is None:
            return "fresh" if self.generation else "founder"
        if self.birth.elite or self.birth.parent == self.birth.index:
            return "kept"
        second = self.birth.second_parent
        crossing = [] if second is None else [f"\N{MULTIPLICATION SIGN} agent {second}"]
        return ", ".join([*crossing, *map(_short_label, self.birth.mutations)]) or "copy"


def _short_label(mutation: Mutation) -> str:
    """`lr x1.2`, or `loss_type ipo`."""
    after = format_value(mutation.after) if mutation.factor is None else f"\N{MULTIPLICATION SIGN}{mutation.factor:g}"
    return f"{mutation.name} {after}"


def family_tree(record: RunRecord) -> list[Node]:
    """Place every agent of every generation so that no two lines of descent cross, but for those of second parents.

    Children are in the order of their parents, and the winner's line is on top.
    """
    nodes: list[Node] = []
    rows: dict[int, int] = {}
    scores = {(scored.generation, scored.agent): scored for scored in record.evaluations}
    if record.winning_evaluation is not None:
        scores[record.winner_generation, record.winning_evaluation.agent] = record.winning_evaluation
    for generation, births in enumerate(record.generations):
        # The youngest agent of the winner's line that is not born later than this generation.
        line = reversed(record.line) if generation <= record.winner_generation else ()
        on_line = next((one.birth.index for one in line if one.generations[0] <= generation), None)
        ordered = sorted(
            births,
            key=lambda birth: (
                birth.index != on_line,
                -1 if birth.parent is None else rows.get(birth.parent, len(rows)),
                birth.index,
            ),
        )
        is_last = generation == len(record.generations) - 1
        parents = set() if is_last else {one for birth in record.generations[generation + 1] for one in birth.parents}
        for row, birth in enumerate(ordered):
            life = record.lives[birth.index]
            nodes.append(
                Node(
                    generation=generation,
                    row=row,
                    parent_row=None if birth.parent is None else rows.get(birth.parent),
                    second_row=None if birth.second_parent is None else rows.get(birth.second_parent),
                    birth=birth,
                    on_line=birth.index == on_line,
                    culled=not is_last and birth.index not in parents,
                    diverged=life.diverged and generation == life.generations[1],
                    score=scores.get((generation, birth.index)),
                )
            )
        rows = {birth.index: row for row, birth in enumerate(ordered)}
    return nodes


def tree_picture(record: RunRecord) -> Picture:
    """Draw every agent of every generation with parent, mutations and scores; the winner's line is on top."""
    nodes = family_tree(record)
    columns, rows = len(record.generations), 1 + max(node.row for node in nodes)
    boxed = columns <= MAX_BOXED_GENERATIONS
    width, height = CELL if boxed else (min(DOT_CELL[0], MAX_WIDTH / columns), DOT_CELL[1])
    size = (max(columns * width, 3.5) + 0.1, rows * height + 0.85)
    figure, axes = new_panel("", size=size, xlabel="")
    figure.set_layout_engine("none")
    axes.set_position((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))

    def left(generation: int) -> float:
        return 0.05 + generation * width

    def middle(row: int) -> float:
        return 0.5 + (row + 0.5) * height

    for node in sorted(nodes, key=lambda node: node.on_line):
        for row, on_line in ((node.parent_row, node.on_line), (node.second_row, False)):
            if row is None:
                continue
            end = left(node.generation) if boxed else left(node.generation) + width / 2
            start = left(node.generation - 1) + (BOX[0] if boxed else width / 2)
            _connect(axes, (start, middle(row)), (end, middle(node.row)), on_line)
    for node in nodes:
        is_winner = node.generation == record.winner_generation and node.birth.index == record.winner
        x, y = left(node.generation), middle(node.row)
        if boxed:
            _box(axes, node, _score(node, record.words), x, y, is_winner=is_winner)
        else:
            _dot(axes, node, x + width / 2, y, is_winner=is_winner)
    for generation in range(columns) if boxed else range(0, columns, max(1, columns // 12)):
        first, last = record.boundaries[generation] + 1, record.boundaries[generation + 1]
        steps = f"step {last}" if first >= last else f"steps {first}\N{EN DASH}{last}"
        label = f"generation {generation}\n{steps}" if boxed else str(generation)
        place = {"x": left(generation)} if boxed else {"x": left(generation) + width / 2, "ha": "center"}
        axes.text(y=0.06, s=label, va="top", fontsize=8.5, color=INK, linespacing=1.25, **place)
    _tree_legend(axes, nodes, size[1] - 0.16, boxed=boxed)
    drawn = f"Family tree of {len(record.lives)} agents over {columns} generations"
    line = ", ".join(map(str, record.line_ends))
    return to_picture(figure, "family-tree", f"{drawn}; the winner's line is {line or 'not known'}")


def _connect(axes: Axes, start: tuple[float, float], end: tuple[float, float], on_line: bool) -> None:
    """Draw an S-shaped line from a parent to its child."""
    share = np.linspace(0, 1, 16)
    bend = share**2 * (3 - 2 * share)
    x, y = start[0] + share * (end[0] - start[0]), start[1] + bend * (end[1] - start[1])
    color, width = (WINNER, 2.6) if on_line else (OTHER, 1.0)
    axes.plot(x, y, solid_capstyle="round", color=color, linewidth=width, zorder=2)


def _outline(node: Node) -> tuple[str, Any, float]:
    """Colour, line style and line width of a node."""
    if node.diverged:
        return DIVERGED, "-", 1.4
    if node.on_line:
        return WINNER, "-", 2.0
    return (OTHER, CULLED, 0.9) if node.culled else (OTHER, "-", 1.1)


def _box(axes: Axes, node: Node, score: str, x: float, y: float, *, is_winner: bool) -> None:
    color, line, linewidth = _outline(node)
    (width, height), corner = BOX, 0.07
    turns = np.linspace(0, np.pi / 2, 4)
    corners = [(width - corner, height - corner, 0), (corner, height - corner, 1), (corner, corner, 2)]
    corners.append((width - corner, corner, 3))
    xs = np.concatenate([x + cx + corner * np.cos(turns + quarter * np.pi / 2) for cx, _, quarter in corners])
    ys = np.concatenate(
        [y - height / 2 + cy + corner * np.sin(turns + quarter * np.pi / 2) for _, cy, quarter in corners]
    )
    axes.fill(xs, ys, facecolor=color, alpha=0.13 if node.on_line or node.diverged else 0.0, linewidth=0, zorder=3)
    axes.fill(xs, ys, facecolor="none", edgecolor=color, linestyle=line, linewidth=linewidth, zorder=4)
    name = f"{node.birth.index}{' ★' if is_winner else ''}"
    axes.text(x + 0.08, y - 0.085, name, va="center", fontsize=9.5, fontweight="bold", color=INK, zorder=5)
    axes.text(x + width - 0.07, y - 0.085, score, va="center", ha="right", fontsize=8.5, color=INK, zorder=5)
    axes.text(x + 0.08, y + 0.105, shortened(node.origin, 20), va="center", fontsize=8, color=INK, zorder=5)


def _dot(axes: Axes, node: Node, x: float, y: float, *, is_winner: bool) -> None:
    color, _, _ = _outline(node)
    if is_winner:
        axes.plot([x], [y], marker="*", color=color, markersize=13, zorder=4)
        axes.text(
            x, y - 0.13, str(node.birth.index), va="bottom", ha="center", fontsize=8.5, fontweight="bold", color=INK
        )
        return
    marker = "x" if node.diverged else "o"
    face = "none" if node.culled and not node.on_line else color
    axes.plot([x], [y], marker=marker, color=color, markerfacecolor=face, markersize=6, markeredgewidth=1.4, zorder=4)


def _score(node: Node, words: Words) -> str:
    if node.diverged:
        return "diverged"
    scores = {} if node.score is None else node.score.scores
    return "  ".join(format(scores[one.name], one.short_format_spec) for one in words.shown if one.name in scores)


def _tree_legend(axes: Axes, nodes: Sequence[Node], y: float, *, boxed: bool) -> None:
    entries: list[tuple[str, str, dict[str, Any]]] = []
    if any(node.on_line for node in nodes):
        entries.append(("winner's line", WINNER, {"linewidth": 2.6}))
    if any(node.culled for node in nodes):
        dashed = {"linestyle": CULLED, "linewidth": 1.0}
        circle = {"linestyle": "none", "marker": "o", "markerfacecolor": "none", "markersize": 6}
        entries.append(("left without heirs", OTHER, dashed if boxed else circle))
    if any(node.diverged for node in nodes):
        cross = {"linestyle": "none", "marker": "x", "markeredgewidth": 1.4}
        entries.append(("diverged", DIVERGED, {"linewidth": 1.6} if boxed else cross))
    # A page that is narrower than the tree shows its right end.
    widths = [0.5 + 0.068 * len(label) for label, _, _ in entries]
    x = max(0.05, axes.get_xlim()[1] - sum(widths)) if axes.get_xlim()[1] > NARROW else 0.05
    for (label, color, style), width in zip(entries, widths, strict=True):
        axes.plot(
            [x, x + 0.26] if "marker" not in style else [x + 0.13],
            [y] * (1 + ("marker" not in style)),
            color=color,
            **style,
        )
        axes.text(x + 0.32, y, label, va="center", fontsize=8.5, color=INK)
        x += width
