"""Pictures of the hyperparameters over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evollm.hpo import format_value
from evollm.report.style import (
    FRAME,
    PANEL,
    Picture,
    add_legend,
    line_style,
    log_ticks,
    mark_diverged,
    new_panel,
    shortened,
    to_picture,
    whole_steps,
    write_beside,
)
from evollm.runs.record import Life, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Evolutions and values of the winner's line are marked up to these numbers.
MAX_MARKED_EVOLUTIONS = 24
MAX_MARKED_VALUES = 8
# Characters of a title that fit over a panel.
MAX_TITLE = 48


def hyperparameter_pictures(record: RunRecord) -> list[Picture]:
    """One panel for each hyperparameter that differs between agents: the values over the steps."""
    lives = list(record.lives.values())
    names = [name for name in lives[0].birth.hyperparameters if name in (record.config.get("hp_config") or {name})]
    return [
        _values_over_steps(record, name)
        for name in names
        if len({format_value(life.birth.hyperparameters[name]) for life in lives}) > 1
    ]


def _values_over_steps(record: RunRecord, name: str) -> Picture:
    values = {index: life.birth.hyperparameters[name] for index, life in record.lives.items()}
    categorical = any(not isinstance(value, int | float) for value in values.values())
    heights = _heights(record, name) if categorical else {index: float(value) for index, value in values.items()}
    figure, axes = new_panel(shortened(name, MAX_TITLE), size=PANEL)
    for index, life in record.lives.items():
        # An ancestor of the winner that lived on after the birth of its child on the line gets a line from then on.
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
    points = [
        (step, heights[life.birth.index])
        for life in record.line
        for step in (life.steps[0], record.line_ends[life.birth.index])
    ]
    if points:
        style = line_style(record, record.line[-1], on_line=True)
        axes.plot(*zip(*points, strict=True), solid_joinstyle="miter", **style)
    _scale(axes, list(heights.values()), categorical, sorted({format_value(value) for value in values.values()}))
    if not categorical:
        _write_values(axes, record.line, heights)
    axes.set_xlim(-0.02 * record.last_step, record.last_step * 1.02)
    whole_steps(axes)
    for boundary in record.boundaries[1:-1] if len(record.evolutions) <= MAX_MARKED_EVOLUTIONS else ():
        axes.axvline(boundary, color=FRAME, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
    add_legend(axes, record)
    path = ", then ".join(dict.fromkeys(format_value(life.birth.hyperparameters[name]) for life in record.line))
    return to_picture(figure, f"schedule-{name}", f"{name} of every agent over the steps; the winner's line: {path}")


def _heights(record: RunRecord, name: str) -> dict[int, float]:
    """Heights of a categorical parameter: agents with the same choice side by side, the winner's line in the middle."""
    choices = sorted({format_value(life.birth.hyperparameters[name]) for life in record.lives.values()})
    lanes = _lanes([life for index, life in record.lives.items() if index not in record.line_ends])
    count = 1 + max(lanes.values(), default=0)
    return {
        index: choices.index(format_value(life.birth.hyperparameters[name]))
        + (0.26 * (2 * (lanes[index] + 0.5) / count - 1) if index in lanes else 0.0)
        for index, life in record.lives.items()
    }


def _lanes(lives: Sequence[Life]) -> dict[int, int]:
    """Give each agent the first lane that is free at its birth, so that agents of one time have different lanes."""
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
    """Write each new value of the winner's line above the line, where there is room."""
    if not line:
        return
    last = line[-1].steps[1]
    written, before = -last, None
    for life in line if len(line) <= MAX_MARKED_VALUES else (line[0], line[-1]):
        start, value = life.steps[0], heights[life.birth.index]
        if value != before and start - written >= last * 0.11:
            write_beside(axes, format_value(value), start, value, offset=(3, 4), va="bottom")
            written = start
        before = value
