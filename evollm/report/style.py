"""The lines, colours and legends of the report's pictures, and the conversion of figures to SVG and PNG.

The colours are those of Okabe and Ito, which colour-blind people can tell apart. Colour is never the only sign: the
winner's line is thick, the runner-up's is dashed, and a diverged agent has a cross.
"""

from __future__ import annotations

import importlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from evollm.errors import MissingExtraError
from evollm.runs.record import Life, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

P = TypeVar("P")

WINNER, RUNNER_UP, DIVERGED, OTHER, INK, FRAME = "#0072B2", "#009E73", "#D55E00", "#8C929A", "#24292F", "#9AA0A6"
PANEL = (5.0, 2.9)
# Labels in a legend; `add_legend` adapts the winner's to the run.
LINE, SECOND, OTHERS, BROKEN = "winner's line", "runner-up", "others", "diverged"
# Pixels per inch of a PNG: twice those of the page, for screens of high resolution.
DPI = 144
# The marker of a diverged agent.
CROSS: dict[str, Any] = {"marker": "x", "color": DIVERGED, "linestyle": "none", "markeredgewidth": 2, "label": BROKEN}
# Marks pages and pictures that evollm has written, and may replace.
SOFTWARE = "evollm"
FEW_TICKS = range(3, 7)
_SETTINGS = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FRAME,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FRAME,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "xtick.color": FRAME,
    "ytick.color": FRAME,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    # Text elements instead of paths: smaller, searchable, and the page can colour them.
    "svg.fonttype": "none",
    # Fixed, so that equal runs give equal files.
    "svg.hashsalt": "evollm",
    # Off, so that a dollar sign in a user's text begins no formula.
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        name: File name of the PNG without its suffix.
        alt: Text alternative, for screen readers.
        svg: An `svg` element with a transparent background.
        width: Width in CSS pixels.
        figure: The matplotlib figure.
    """

    name: str
    alt: str
    svg: str
    width: int
    figure: Figure = field(repr=False)

    def png(self) -> bytes:
        """The picture as PNG bytes, on a white background."""
        content = io.BytesIO()
        self.figure.savefig(content, format="png", dpi=DPI, facecolor="white", metadata={"Software": SOFTWARE})
        return content.getvalue()


def require_matplotlib() -> Any:
    """Import matplotlib.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "the report") from error


@contextmanager
def drawing() -> Iterator[None]:
    """Use the report's style inside the block; the user's matplotlib settings are restored afterwards."""
    matplotlib = require_matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def new_panel(title: str, *, size: tuple[float, float] = PANEL, xlabel: str = "step") -> tuple[Figure, Axes]:
    """Return an empty panel, made without pyplot, so that no window system and no global state is needed."""
    figure = require_matplotlib().figure.Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel(xlabel)
    return figure, axes


def to_picture(figure: Figure, name: str, alt: str) -> Picture:
    """Draw a figure; other characters of the name than letters, digits, "_" and "-" become hyphens."""
    name = re.sub(r"[^\w-]", "-", name)
    svg = io.StringIO()
    no_metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(svg, format="svg", transparent=True, metadata=no_metadata)
    text = svg.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # The page has several pictures, and an id must be unique on a page.
    text = re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match[1]}{name}-", text)
    return Picture(name, alt, text.strip(), round(figure.get_figwidth() * 96), figure)


def line_style(record: RunRecord, life: Life, *, on_line: bool) -> dict[str, Any]:
    """Return matplotlib's keyword arguments for the line of an agent; `add_legend` finds the line by its label."""
    if on_line:
        return {"color": WINNER, "linewidth": 2.4, "zorder": 4, "label": LINE}
    if record.ended is not None and life.birth.index == record.ended.runner_up:
        # Drawn over the winner's line, so that it is visible where both coincide.
        return {"color": RUNNER_UP, "linewidth": 1.6, "linestyle": (0, (4, 1.5)), "zorder": 5, "label": SECOND}
    return {"color": OTHER, "linewidth": 1.1, "alpha": 0.75, "zorder": 2, "label": OTHERS}


@dataclass(frozen=True)
class DrawnLine(Generic[P]):
    """A line of a picture over the steps.

    Attributes:
        life: The agent at the end of the line.
        on_line: Whether the line is the winner's.
        points: The points in the order of their steps.
    """

    life: Life
    on_line: bool
    points: Sequence[P]


def drawn_lines(record: RunRecord, points: Mapping[int, Sequence[P]], step: Callable[[P], int]) -> list[DrawnLine[P]]:
    """Join the points of each agent to a line that begins at its parent's last point before the agent's birth.

    The winner and its ancestors are one line. An ancestor that lived on after the birth of its child on that line gets
    another line from then on.

    Args:
        record: The run.
        points: The points of each agent, in the order of their steps.
        step: Returns the steps done at a point.

    Returns:
        The lines, without those that have no point; the winner's is the last, and so drawn over the others.
    """
    found: list[DrawnLine[P]] = []
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
            found.append(DrawnLine(life, False, [*before, *own]))
    return [*found, *([DrawnLine(record.line[-1], True, line)] if line else [])]


def mark_diverged(axes: Axes, x: float, y: float) -> None:
    """Draw a cross at the last point of a diverged agent."""
    axes.plot([x], [y], markersize=7, zorder=5, **CROSS)


def add_legend(axes: Axes, record: RunRecord, *, bands: bool = False) -> None:
    """Draw a legend of the visible lines in one row below the panel; none for a single agent without bands.

    The limits of the axes must be set before.
    """
    if len(record.lives) == 1 and not bands:
        return
    seen = {line.get_label() for line in axes.get_lines() if _is_visible(axes, line)}
    line = "winner's line" if len(record.line) > 1 else "winner" if len(record.lives) > 1 else "agent"
    entries: dict[str, dict[str, Any]] = {
        LINE: {"color": WINNER, "linewidth": 2.4, "label": f"{line}{', 95 %' if bands else ''}"},
        SECOND: {"color": RUNNER_UP, "linewidth": 1.6, "linestyle": (0, (4, 1.5)), "label": SECOND},
        OTHERS: {"color": OTHER, "linewidth": 1.1, "label": OTHERS},
        BROKEN: CROSS,
    }
    handles = [handle for name, style in entries.items() if name in seen for handle in axes.plot([], [], **style)]
    figure = axes.get_figure()
    assert figure is not None
    if handles:
        figure.legend(
            handles=handles, loc="outside lower left", ncols=len(handles), handlelength=1.8, columnspacing=1.2
        )


def _is_visible(axes: Axes, line: Line2D) -> bool:
    """Whether a part of a line is within the limits of its axes."""
    x, y = (np.asarray(values, dtype=float) for values in line.get_data())
    finite = np.isfinite(x) & np.isfinite(y)
    limits = (sorted(axes.get_xlim()), sorted(axes.get_ylim()))
    return bool(finite.any()) and all(
        values[finite].max() >= low and values[finite].min() <= high
        for values, (low, high) in zip((x, y), limits, strict=True)
    )


def write_beside(axes: Axes, text: str, x: float, y: float, *, offset: tuple[float, float], va: str = "center") -> None:
    """Write a small text beside a point, at an offset in points (1/72 inch)."""
    axes.annotate(
        text, (x, y), xytext=offset, textcoords="offset points", va=va, fontsize=8.5, color=INK, zorder=6, clip_on=False
    )


def shortened(text: str, length: int) -> str:
    """Return a text of at most this length, cut with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def whole_steps(axes: Axes) -> None:
    """Place the ticks of the x axis at whole numbers."""
    axes.xaxis.set_major_locator(importlib.import_module("matplotlib.ticker").MaxNLocator(6, integer=True))


def log_ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers within a range, so that the labels do not overlap."""
    decades = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    if len(decades) >= FEW_TICKS.stop:
        return decades[:: math.ceil(len(decades) / (FEW_TICKS.stop - 1))]
    ticker = importlib.import_module("matplotlib.ticker")
    for parts in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [float(tick) for tick in ticker.LogLocator(subs=parts).tick_values(low, high)]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) in FEW_TICKS:
            return inside
    return [low * (high / low) ** share for share in (0.1, 0.5, 0.9)]


def limits_of(values: Sequence[float]) -> tuple[float, float] | None:
    """Return a range without outliers, such as the values of a diverging agent; None if there are no outliers."""
    finite = np.array([value for value in values if np.isfinite(value)])
    if len(finite) < 8:  # noqa: PLR2004
        return None
    low, high = np.percentile(finite, [3, 97])
    span = max(float(high - low), 1e-9)
    if finite.max() <= high + 2 * span and finite.min() >= low - 2 * span:
        return None
    return max(float(finite.min()), float(low) - 0.3 * span), min(float(finite.max()), float(high) + 0.3 * span)
