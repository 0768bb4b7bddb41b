"""Pictures of scores: over the run, at the last evaluation, and at the end of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from evollm.hpo import AnyEvaluation, rank
from evollm.report.statistics import Interval, score_interval
from evollm.report.style import (
    FRAME,
    OTHER,
    PANEL,
    RUNNER_UP,
    WINNER,
    DrawnLine,
    Picture,
    add_legend,
    drawn_lines,
    limits_of,
    line_style,
    mark_diverged,
    new_panel,
    to_picture,
    whole_steps,
    write_beside,
)
from evollm.runs.record import RunRecord, Scored
from evollm.runs.words import Score, Words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Height of a row of the interval pictures, in inches.
ROW = 0.34


def held_out_pictures(record: RunRecord) -> list[Picture]:
    """One picture for each score: the score of each agent at each evaluation, with bands."""
    return [_held_out(record, score) for score in _recorded(record.words, record.evaluations)]


def last_evaluation_pictures(record: RunRecord) -> list[Picture]:
    """One picture for each score: the agents of the last evaluation, the fittest on top; none for a single agent."""
    latest = [scored for scored in record.latest_evaluation if scored.scores]
    if len(latest) < 2:  # noqa: PLR2004
        return []
    ordered = [latest[place] for place in rank([scored.fitness for scored in latest])]
    pictures = []
    for score in _recorded(record.words, latest):
        rows = {f"agent {scored.agent}": _interval(scored, score) for scored in ordered}
        colors = [
            line_style(record, record.lives[scored.agent], on_line=scored is record.winning_evaluation)["color"]
            for scored in ordered
        ]
        title = f"last evaluation: {score.title}"
        alt = f"{score.title} of each agent at step {ordered[0].step} with 95 % intervals"
        pictures.append(_intervals("last", score, title, alt, rows, colors))
    return pictures


def final_pictures(
    words: Words, pairs: Mapping[str, AnyEvaluation], names: Mapping[str, str], *, unbiased: bool
) -> list[Picture]:
    """One picture for each score: the final scores with their intervals.

    Args:
        words: The words of the algorithm.
        pairs: The evaluations row by row, by role.
        names: The label of each role; roles that `pairs` lacks are left out.
        unbiased: Whether the rows are those of the `final` split, by which nothing was selected.
    """
    present = {role: name for role, name in names.items() if role in pairs}
    colors = [{"after": WINNER, "runner_up": RUNNER_UP}.get(role, OTHER) for role in present]
    pictures = []
    for score in words.shown:
        rows = {name: score_interval(pairs[role], score.name) for role, name in present.items()}
        on = "final" if unbiased else "held-out"
        alt = f"{score.title} of {', '.join(rows)} with 95 % intervals"
        pictures.append(_intervals("final", score, f"{on}: {score.title}", alt, rows, colors))
    return pictures


def _recorded(words: Words, evaluations: Sequence[Scored]) -> list[Score]:
    """The shown scores that an evaluation has."""
    return [score for score in words.shown if any(score.name in scored.scores for scored in evaluations)]


def _interval(scored: Scored, score: Score) -> Interval:
    if scored.pairs is None:
        return Interval(scored.scores[score.name], float("nan"), float("nan"))
    return score_interval(scored.pairs, score.name)


def _held_out(record: RunRecord, score: Score) -> Picture:
    figure, axes = new_panel(score.title, size=PANEL)
    by_agent: dict[int, list[Scored]] = {}
    for scored in record.evaluations:
        if score.name in scored.scores:
            by_agent.setdefault(scored.agent, []).append(scored)
    shown: list[float] = []
    for line in drawn_lines(record, by_agent, lambda scored: scored.step):
        shown += _draw(axes, record, line, score)
    limits = limits_of(shown)
    if limits is not None:
        axes.set_ylim(*limits)
    if score.is_share:
        axes.set_ylim(max(-0.03, axes.get_ylim()[0]), min(1.03, axes.get_ylim()[1]))
    axes.set_xlim(0, record.last_step * 1.03)
    whole_steps(axes)
    add_legend(axes, record, bands=any(scored.pairs is not None for scored in record.evaluations))
    alt = f"{score.title} of every agent at each evaluation, with 95 % bands"
    return to_picture(figure, f"held-out-{_slug(score)}", alt)


def _slug(score: Score) -> str:
    """The score's name as part of a picture's name."""
    return score.name.replace("_", "-").replace("/", "-")


def _draw(axes: Axes, record: RunRecord, line: DrawnLine[Scored], score: Score) -> list[float]:
    """Draw one line with its band, and return the values that the axis should show."""
    style = line_style(record, line.life, on_line=line.on_line)
    steps = [scored.step for scored in line.points]
    intervals = [_interval(scored, score) for scored in line.points]
    values = [interval.value for interval in intervals]
    lows, highs = [interval.low for interval in intervals], [interval.high for interval in intervals]
    axes.plot(steps, values, marker="o", markersize=4.5 if line.on_line else 3, **style)
    alpha, color = (0.2 if line.on_line else 0.06), style["color"]
    if len(steps) > 1:
        axes.fill_between(steps, lows, highs, color=color, alpha=alpha, linewidth=0)
    else:
        axes.vlines(steps, lows, highs, color=color, alpha=max(2 * alpha, 0.25), linewidth=3)
    if line.life.diverged:
        mark_diverged(axes, steps[-1], values[-1])
    return [*values, *lows, *highs] if line.on_line else values


def _intervals(
    kind: str, score: Score, title: str, alt: str, rows: Mapping[str, Interval], colors: Sequence[str]
) -> Picture:
    """Draw one row for each interval: a dot, a bar and the value."""
    figure, axes = new_panel(title, size=(PANEL[0], 0.85 + ROW * len(rows)), xlabel="")
    for row, (interval, color) in enumerate(zip(rows.values(), colors, strict=True)):
        axes.plot(
            [interval.low, interval.high], [row, row], color=color, linewidth=3, alpha=0.55, solid_capstyle="butt"
        )
        axes.plot([interval.value], [row], marker="o", color=color, markersize=6, linestyle="none")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    finite = [edge for one in rows.values() for edge in (one.value, one.low, one.high) if np.isfinite(edge)]
    if finite:
        low, high = min(finite), max(finite)
        room = max(high - low, 1e-3)
        axes.set_xlim(low - 0.06 * room, high + 0.22 * room)
        if score.is_share:
            axes.set_xticks([tick for tick in axes.get_xticks() if low - 0.06 * room <= tick <= 1 + 1e-9])
    for row, interval in enumerate(rows.values()):
        right = interval.high if np.isfinite(interval.high) else interval.value
        if np.isfinite(right):
            form = score.format_spec if interval.value else score.format_spec.strip("+")
            write_beside(axes, format(interval.value, form), right, row, offset=(7, 0))
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(FRAME)
    return to_picture(figure, f"{kind}-{_slug(score)}", alt)
