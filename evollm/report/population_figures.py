"""Pictures of the population: its family tree and its hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evollm.hpo import format_value
from evollm.report.style import (
    DIVERGED,
    FRAME,
    INK,
    OTHER,
    PANEL,
    WINNER,
    Picture,
    add_legend,
    line_style,
    log_ticks,
    mark_diverged,
    new_panel,
    to_picture,
    whole_steps,
    write_beside,
)
from evollm.report.tree import Node, family_tree
from evollm.runs.record import Life, RunRecord
from evollm.runs.words import Words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches of one agent's box and of its place.
BOX, PLACE = (1.42, 0.42), (1.78, 0.54)
# More columns than these have dots in place of boxes.
BOXED_GENERATIONS = 16
# No picture is wider, however many generations there are.
WIDEST = 40.0
# Inches of a page that is narrow.
NARROW = 4.6
DOT_PLACE = (0.45, 0.3)
# Dashes of a box that has no heirs.
CULLED = (0, (2.5, 2))
# Evolutions and values of the winner's line are marked while there are no more than these.
FEW_EVOLUTIONS = 24
FEW_VALUES = 8
# Characters of a title that fit over a panel.
LONGEST_TITLE = 48


def tree_picture(record: RunRecord) -> Picture:
    """Every agent of every generation, its descent, what mutated and how it scored; the winner's line on top."""
    nodes = family_tree(record)
    columns, rows = len(record.generations), 1 + max(node.row for node in nodes)
    boxed = columns <= BOXED_GENERATIONS
    width, height = PLACE if boxed else (min(DOT_PLACE[0], WIDEST / columns), DOT_PLACE[1])
    size = (max(columns * width, 3.5) + 0.1, rows * height + 0.85)
    figure, axes = new_panel("", size=size, xlabel="")
    figure.set_layout_engine("none")
    axes.set_position((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
    top = 0.5

    def left(node_generation: int) -> float:
        return 0.05 + node_generation * width

    def middle(row: int) -> float:
        return top + (row + 0.5) * height

    for node in sorted(nodes, key=lambda node: node.on_line):
        if node.parent_row is not None:
            end = left(node.generation) if boxed else left(node.generation) + width / 2
            start = left(node.generation - 1) + (BOX[0] if boxed else width / 2)
            _connect(axes, (start, middle(node.parent_row)), (end, middle(node.row)), node.on_line)
    for node in nodes:
        if boxed:
            score, x, y = _score(node, record.words), left(node.generation), middle(node.row)
            _box(axes, node, score, x, y, is_winner=_is_winner(record, node))
        else:
            _dot(axes, node, left(node.generation) + width / 2, middle(node.row), is_winner=_is_winner(record, node))
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


def _is_winner(record: RunRecord, node: Node) -> bool:
    return node.generation == len(record.generations) - 1 and node.birth.index == record.winner


def _connect(axes: Axes, start: tuple[float, float], end: tuple[float, float], on_line: bool) -> None:
    """An S-shaped line from a parent to its child."""
    share = np.linspace(0, 1, 16)
    bend = share**2 * (3 - 2 * share)
    x, y = start[0] + share * (end[0] - start[0]), start[1] + bend * (end[1] - start[1])
    color, width = (WINNER, 2.6) if on_line else (OTHER, 1.0)
    axes.plot(x, y, solid_capstyle="round", color=color, linewidth=width, zorder=2)


def _look(node: Node) -> tuple[str, Any, float]:
    """Colour, kind of line and its width."""
    if node.diverged:
        return DIVERGED, "-", 1.4
    if node.on_line:
        return WINNER, "-", 2.0
    return (OTHER, CULLED, 0.9) if node.culled else (OTHER, "-", 1.1)


def _box(axes: Axes, node: Node, score: str, x: float, y: float, *, is_winner: bool) -> None:
    color, line, linewidth = _look(node)
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
    axes.text(x + 0.08, y + 0.105, _fit(node.origin), va="center", fontsize=8, color=INK, zorder=5)


def _dot(axes: Axes, node: Node, x: float, y: float, *, is_winner: bool) -> None:
    color, _, _ = _look(node)
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


def _fit(text: str, length: int = 20) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


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
    # A tree that is wider than a narrow page is seen from its right end.
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


def schedule_pictures(record: RunRecord) -> list[Picture]:
    """One panel for each hyperparameter that differs between agents: its value over the steps."""
    return [_schedule(record, name) for name in varying(record)]


def varying(record: RunRecord) -> list[str]:
    """Hyperparameters that are not the same in all agents."""
    lives = list(record.lives.values())
    names = [name for name in lives[0].birth.hyperparameters if name in (record.config.get("hp_config") or {name})]
    return [name for name in names if len({format_value(life.birth.hyperparameters[name]) for life in lives}) > 1]


def _schedule(record: RunRecord, name: str) -> Picture:
    values = {index: life.birth.hyperparameters[name] for index, life in record.lives.items()}
    categorical = any(not isinstance(value, int | float) for value in values.values())
    heights = _levels(record, name) if categorical else {index: float(value) for index, value in values.items()}
    figure, axes = new_panel(_fit(name, LONGEST_TITLE), size=PANEL)
    for index, life in record.lives.items():
        # One of the winner's line that lived on beside its heir is on the line until then.
        start, style = record.line_ends.get(index, life.steps[0]), line_style(record, life, on_line=False)
        if start < life.steps[1]:
            axes.plot([start, life.steps[1]], [heights[index]] * 2, solid_capstyle="butt", **style)
        parent = life.birth.parent
        if (
            parent is not None
            and index not in record.line_ends
            and heights.get(parent, heights[index]) != heights[index]
        ):
            fine = {**style, "linewidth": style["linewidth"] * 0.6}
            axes.plot([life.steps[0]] * 2, [heights[parent], heights[index]], **fine)
        if life.diverged:
            mark_diverged(axes, life.steps[1], heights[index])
    ends = [(step, heights[life.birth.index]) for life in record.line for step in _on_line(record, life)]
    if ends:
        axes.plot(
            *zip(*ends, strict=True), solid_joinstyle="miter", **line_style(record, record.line[-1], on_line=True)
        )
    _scale(axes, list(heights.values()), categorical, sorted({format_value(value) for value in values.values()}))
    if not categorical:
        _write_values(axes, record.line, heights)
    axes.set_xlim(-0.02 * record.last_step, record.last_step * 1.02)
    whole_steps(axes)
    for boundary in record.boundaries[1:-1] if len(record.evolutions) <= FEW_EVOLUTIONS else ():
        axes.axvline(boundary, color=FRAME, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
    add_legend(axes, record)
    path = ", then ".join(dict.fromkeys(format_value(life.birth.hyperparameters[name]) for life in record.line))
    return to_picture(figure, f"schedule-{name}", f"{name} of every agent over the steps; the winner's line: {path}")


def _on_line(record: RunRecord, life: Life) -> tuple[int, int]:
    """From when to when an agent of the winner's line is on it."""
    return life.steps[0], record.line_ends[life.birth.index]


def _levels(record: RunRecord, name: str) -> dict[int, float]:
    """Heights for agents with the same choice: one beside the other, the winner's line in the middle."""
    choices = sorted({format_value(life.birth.hyperparameters[name]) for life in record.lives.values()})
    lanes = _lanes([life for index, life in record.lives.items() if index not in record.line_ends])
    count = 1 + max(lanes.values(), default=0)
    return {
        index: choices.index(format_value(life.birth.hyperparameters[name]))
        + (0.26 * (2 * (lanes[index] + 0.5) / count - 1) if index in lanes else 0.0)
        for index, life in record.lives.items()
    }


def _lanes(lives: Sequence[Life]) -> dict[int, int]:
    """For each agent the first lane that is free when it is born: no two that live at the same time share one."""
    free_from: list[int] = []
    lanes = {}
    for life in lives:
        born, left = life.steps
        lane = next((lane for lane, step in enumerate(free_from) if step <= born), len(free_from))
        free_from[lane : lane + 1] = [left]
        lanes[life.birth.index] = lane
    return lanes


def _scale(axes: Axes, heights: Sequence[float], categorical: bool, choices: Sequence[str]) -> None:
    if categorical:
        axes.set_yticks(range(len(choices)), choices)
        axes.set_ylim(-0.5, len(choices) - 0.5)
    elif min(heights) > 0:
        low, high = min(heights), max(heights)
        margin = (high / low) ** 0.12
        axes.set_yscale("log")
        axes.set_ylim(low / margin, high * margin**1.6)
        ticks = log_ticks(low / margin, high * margin)
        axes.set_yticks(ticks, [format_value(float(f"{tick:.2g}")) for tick in ticks])
        axes.set_yticks([], minor=True)


def _write_values(axes: Axes, line: Sequence[Life], heights: dict[int, float]) -> None:
    """Write each new value of the winner's line above it, where there is room for it."""
    if not line:
        return
    last = line[-1].steps[1]
    written, before = -last, None
    for life in line if len(line) <= FEW_VALUES else (line[0], line[-1]):
        start, value = life.steps[0], heights[life.birth.index]
        if value != before and start - written >= last * 0.11:
            write_beside(axes, format_value(value), start, value, offset=(3, 4), va="bottom")
            written = start
        before = value
