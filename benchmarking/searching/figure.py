"""The picture of final scores against compute."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evollm.report.style import DIVERGED, OTHER, RUNNER_UP, WINNER, drawing, require_matplotlib
from searching.contestants import STRATEGIES
from searching.outcomes import REFERENCE, Outcome, mean_runs
from searching.statistics import hierarchical

# Colour and marker of a kind of contestant.
KINDS = {
    "whole runs": (OTHER, "s"),
    "random search by accuracy, then margin": (RUNNER_UP, "o"),
    "halving, replayed": (WINNER, "o"),
    "runs of the library": (DIVERGED, "^"),
}
TICKS = (1, 1.5, 2, 3, 4, 6, 8)
SCORES = (("final accuracy", "right", ".2f"), ("final log-loss (nats, less is better)", "losses", ".3f"))
# So bad that the others could not be told apart: its score is written at the lower edge.
OUTSIDE = "default settings"
# Contestants whose prices differ by less have one label, the best first.
TOGETHER = 1.035
ROOM = 0.1
SMALL = {"textcoords": "offset points", "ha": "center", "fontsize": 7.5}


def draw(found: Mapping[str, Mapping[int, Outcome]], title: str, path: Path) -> None:
    """Draw both final scores with 95 % intervals, better ones higher, and the numbers of the table.

    Args:
        found: Outcomes by name and seed.
        title: Of the picture.
        path: Of the file; its suffix says the form.
    """
    with drawing():
        figure = require_matplotlib().figure.Figure(figsize=(12, 8), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        for axes, (label, score, form) in zip(figure.subplots(1, 2), SCORES, strict=True):
            _panel(axes, found, score, form)
            axes.set_title(label, loc="left", fontsize=10.5)
        names = [f"{number}  {name}" for number, name in enumerate(found, start=1)]
        blank = importlib.import_module("matplotlib.lines").Line2D([], [], linestyle="none")
        figure.legend([blank] * len(names), names, loc="outside lower left", ncols=2, handlelength=0, fontsize=7.5)
        figure.savefig(path, dpi=144, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Any, found: Mapping[str, Mapping[int, Outcome]], score: str, form: str) -> None:
    points = {
        name: (mean_runs(by_seed), *hierarchical([getattr(one, score).mean(axis=0) for one in by_seed.values()]))
        for name, by_seed in found.items()
    }
    by_price = sorted(points, key=lambda name: points[name][0])
    up = -1 if score == "losses" else 1
    numbers = {name: str(number) for number, name in enumerate(found, start=1)}
    groups: list[list[str]] = []
    for name in by_price:
        runs, mean, low, high = points[name]
        color, marker = KINDS[_kind(name)]
        if name == OUTSIDE:
            axes.annotate(
                f"{numbers[name]}: {mean:.3f}",
                (runs, 0.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                **SMALL,
            )
            continue
        axes.vlines(runs, low, high, color=color, alpha=0.3, linewidth=2)
        axes.plot([runs], [mean], color=color, marker=marker, markersize=5, linestyle="none", zorder=4)
        if groups and runs <= TOGETHER * points[groups[-1][0]][0]:
            groups[-1].append(name)
        else:
            groups.append([name])
    for group in groups:
        best_first = sorted(group, key=lambda name: -up * points[name][1])
        top = max((points[name][3 if up > 0 else 2] for name in group), key=lambda end: up * end)
        label = "\n".join(
            ", ".join(numbers[name] for name in best_first[at : at + 2]) for at in range(0, len(group), 2)
        )
        axes.annotate(label, (points[group[0]][0], top), xytext=(0, 4), zorder=5, **SMALL)
    searched = [points[name] for name in by_price if _kind(name) == [*KINDS][1]]
    runs, means, lows, highs = zip(*searched, strict=True)
    axes.plot(runs, means, color=RUNNER_UP, linewidth=1.4)
    axes.fill_between(runs, lows, highs, color=RUNNER_UP, alpha=0.12, linewidth=0)
    axes.axhline(points[REFERENCE][1], color=RUNNER_UP, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: format(value, form))
    axes.set_xlabel("compute, in runs of one agent")
    # Room for the numbers above the intervals.
    low, high = axes.get_ylim()
    axes.set_ylim((low, high + ROOM * (high - low)) if up > 0 else (high, low - ROOM * (high - low)))
    for kind, (color, marker) in KINDS.items():
        if any(_kind(name) == kind for name in found):
            axes.plot([], [], color=color, marker=marker, linestyle="none", label=kind)
    axes.legend(loc="lower right", fontsize=8)


def _kind(name: str) -> str:
    whole, random, halved, run = KINDS
    if name not in STRATEGIES:
        return run
    if name.startswith("random") and name.count(",") == 1:
        return random
    return whole if name.startswith(("default", "grid", "random", "spread,")) else halved
