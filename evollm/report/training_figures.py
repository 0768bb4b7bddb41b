"""Pictures of the training: the metrics over the steps, and the use of time and memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evollm.report.style import (
    OTHER,
    PANEL,
    WINNER,
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
from evollm.runs.record import RunRecord, Timing

# Points are marked up to this number of steps.
MAX_MARKED_STEPS = 40
# The labels of the timings by their kind.
PHASES = {
    "baseline": "scoring the untuned model",
    "step": "training steps",
    "evaluation": "held-out evaluations",
    "evolution": "evolution",
    "checkpoint": "checkpoints",
    "end": "final scores, samples, saving",
}
GIB = 2**30


def training_pictures(record: RunRecord) -> list[Picture]:
    """A panel for each metric of the steps."""
    reported = {name for line in record.steps for name in line.metrics}
    return [_curve(record, name, title) for name, title in record.words.curves if name in reported]


def _curve(record: RunRecord, name: str, title: str) -> Picture:
    figure, axes = new_panel(title, size=PANEL)
    points: dict[int, list[tuple[int, float]]] = {}
    for line in record.steps:
        if name in line.metrics:
            points.setdefault(line.agent, []).append((line.step, line.metrics[name]))
    marker = "." if record.last_step <= MAX_MARKED_STEPS else None
    for drawn in drawn_lines(record, points, lambda point: point[0]):
        style = line_style(record, drawn.life, on_line=drawn.on_line)
        axes.plot(*zip(*drawn.points, strict=True), marker=marker, markersize=5, **style)
        finite = [point for point in drawn.points if np.isfinite(point[1])]
        if drawn.life.diverged and finite:
            mark_diverged(axes, *finite[-1])
    limits = limits_of([value for own in points.values() for _, value in own])
    if limits is not None:
        axes.set_ylim(*limits)
    whole_steps(axes)
    add_legend(axes, record)
    return to_picture(figure, f"training-{name.replace('/', '-').replace('_', '-')}", f"{title} of every agent by step")


def resource_pictures(record: RunRecord) -> list[Picture]:
    """The seconds of each phase, and the memory over time; no pictures if timings were not recorded."""
    spent = time_spent(record.timings)
    return [_time(spent), _memory(record.timings)] if spent else []


def time_spent(timings: Sequence[Timing]) -> dict[str, float]:
    """Return the seconds of each phase that took any, by label, in the order of the phases."""
    return {
        title: total
        for kind, title in PHASES.items()
        if (total := sum(timing.seconds for timing in timings if timing.kind == kind)) > 0
    }


def _time(spent: dict[str, float]) -> Picture:
    whole = sum(spent.values())
    figure, axes = new_panel("time (seconds)", size=(PANEL[0], 0.85 + 0.36 * len(spent)), xlabel="")
    axes.barh(range(len(spent)), list(spent.values()), color=WINNER, alpha=0.75, height=0.62)
    for row, seconds in enumerate(spent.values()):
        amount = f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"  # noqa: PLR2004
        write_beside(axes, f"{amount} s, {seconds / whole:.0%}", seconds, row, offset=(4, 0))
    axes.set_yticks(range(len(spent)), list(spent))
    axes.set_ylim(len(spent) - 0.4, -0.6)
    axes.set_xlim(0, max(spent.values()) * 1.35)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return to_picture(figure, "time", "Seconds spent in each phase of the run")


def _memory(timings: Sequence[Timing]) -> Picture:
    seconds = np.cumsum([timing.seconds for timing in timings])
    unit, length = ("minutes", 60) if seconds[-1] >= 180 else ("seconds", 1)  # noqa: PLR2004
    times, memory = seconds / length, [timing.resident_bytes / GIB for timing in timings]
    figure, axes = new_panel("memory (GiB)", size=PANEL, xlabel=unit)
    axes.plot(times, memory, color=WINNER, linewidth=2, label="process, resident")
    peaks = [timing.cuda_peak_bytes for timing in timings]
    if any(peak is not None for peak in peaks):
        gib = [np.nan if peak is None else peak / GIB for peak in peaks]
        axes.plot(times, gib, color=OTHER, linewidth=2, linestyle=(0, (4, 1.5)), label="CUDA, peak so far")
        axes.legend(loc="lower right")
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    return to_picture(figure, "memory", "Memory at each event of the run")
