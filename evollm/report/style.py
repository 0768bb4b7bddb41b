"""How the report's pictures look, and how a figure becomes a picture.

Colours are those of Okabe and Ito, which people tell apart whatever their colour vision, and never the only sign: the
winner's line is thick, the runner-up's dashed, a diverged agent has a cross.
"""

from __future__ import annotations

import importlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from evollm.errors import MissingExtraError
from evollm.runs.record import Life, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

WINNER, RUNNER_UP, DIVERGED, OTHER, INK, FRAME = "#0072B2", "#009E73", "#D55E00", "#8C929A", "#24292F", "#9AA0A6"
PANEL = (5.0, 2.9)
# What lines are called in a legend; that of the winner depends on the run.
LINE, SECOND, OTHERS, BROKEN = "winner's line", "runner-up", "others", "diverged"
# Pixels of a PNG for each inch: twice those of a page, for sharp screens.
DPI = 144
# By this a picture is known as evollm's.
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
    # Text stays text: small, searchable, and a page can colour it.
    "svg.fonttype": "none",
    # Equal runs give equal files.
    "svg.hashsalt": "evollm",
    # A dollar sign in a text of somebody's begins no formula.
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Picture:
    """A figure, drawn.

    Attributes:
        name: Of its PNG, without the suffix.
        alt: What it shows, for who cannot see it.
        svg: An `svg` element that stands for itself, with transparent ground.
        width: In CSS pixels.
        figure: What it was drawn from.
    """

    name: str
    alt: str
    svg: str
    width: int
    figure: Figure = field(repr=False)

    def png(self) -> bytes:
        """The same on white."""
        content = io.BytesIO()
        self.figure.savefig(content, format="png", dpi=DPI, facecolor="white", metadata={"Software": SOFTWARE})
        return content.getvalue()


def require_matplotlib() -> Any:
    """The module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "the report") from error


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the report's style inside the block, without changing anybody's settings."""
    matplotlib = require_matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def new_panel(title: str, *, size: tuple[float, float] = PANEL, xlabel: str = "step") -> tuple[Figure, Axes]:
    """An empty panel; no window system and no global state of pyplot is involved."""
    figure = require_matplotlib().figure.Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel(xlabel)
    return figure, axes


def to_picture(figure: Figure, name: str, alt: str) -> Picture:
    """Draw a figure; of the name only letters, digits and hyphens are kept."""
    name = re.sub(r"[^\w-]", "-", name)
    svg = io.StringIO()
    nobody = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(svg, format="svg", transparent=True, metadata=nobody)
    text = svg.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Several of them share a page, on which an id may be given once.
    text = re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match[1]}{name}-", text)
    return Picture(name, alt, text.strip(), round(figure.get_figwidth() * 96), figure)


def line_style(record: RunRecord, life: Life, *, on_line: bool) -> dict[str, Any]:
    """How a line that ends at an agent is drawn, and by which name `add_legend` knows it."""
    if on_line:
        return {"color": WINNER, "linewidth": 2.4, "zorder": 4, "label": LINE}
    if record.ended is not None and life.birth.index == record.ended.runner_up:
        # Over the winner's line, under which it could not be seen where both are the same.
        return {"color": RUNNER_UP, "linewidth": 1.6, "linestyle": (0, (4, 1.5)), "zorder": 5, "label": SECOND}
    return {"color": OTHER, "linewidth": 1.1, "alpha": 0.75, "zorder": 2, "label": OTHERS}


def mark_diverged(axes: Axes, x: float, y: float) -> None:
    """A cross where an agent has ended."""
    cross: dict[str, Any] = {
        "marker": "x",
        "color": DIVERGED,
        "markeredgewidth": 2,
        "linestyle": "none",
        "label": BROKEN,
    }
    axes.plot([x], [y], markersize=7, zorder=5, **cross)


def add_legend(axes: Axes, record: RunRecord, *, bands: bool = False) -> None:
    """Say what the lines are that can be seen, in one row below the panel; nothing for an agent by itself.

    Call it when the axes have their limits.
    """
    if len(record.lives) == 1 and not bands:
        return
    seen = {line.get_label() for line in axes.get_lines() if _in_sight(axes, line)}
    line = "winner's line" if len(record.line) > 1 else "winner" if len(record.lives) > 1 else "agent"
    entries: dict[str, dict[str, Any]] = {
        LINE: {"color": WINNER, "linewidth": 2.4, "label": f"{line}{', 95 %' if bands else ''}"},
        SECOND: {"color": RUNNER_UP, "linewidth": 1.6, "linestyle": (0, (4, 1.5)), "label": SECOND},
        OTHERS: {"color": OTHER, "linewidth": 1.1, "label": OTHERS},
        BROKEN: {"marker": "x", "color": DIVERGED, "linestyle": "none", "markeredgewidth": 2, "label": BROKEN},
    }
    handles = [handle for name, style in entries.items() if name in seen for handle in axes.plot([], [], **style)]
    figure = axes.get_figure()
    assert figure is not None
    if handles:
        figure.legend(
            handles=handles, loc="outside lower left", ncols=len(handles), handlelength=1.8, columnspacing=1.2
        )


def _in_sight(axes: Axes, line: Line2D) -> bool:
    """Whether a part of a line is within the limits of its axes."""
    x, y = (np.asarray(values, dtype=float) for values in line.get_data())
    finite = np.isfinite(x) & np.isfinite(y)
    limits = (sorted(axes.get_xlim()), sorted(axes.get_ylim()))
    return bool(finite.any()) and all(
        values[finite].max() >= low and values[finite].min() <= high
        for values, (low, high) in zip((x, y), limits, strict=True)
    )


def write_beside(axes: Axes, text: str, x: float, y: float, *, offset: tuple[float, float], va: str = "center") -> None:
    """Write a small text so many points away from a place."""
    axes.annotate(
        text, (x, y), xytext=offset, textcoords="offset points", va=va, fontsize=8.5, color=INK, zorder=6, clip_on=False
    )


def whole_steps(axes: Axes) -> None:
    """Ticks of the steps at whole numbers."""
    axes.xaxis.set_major_locator(importlib.import_module("matplotlib.ticker").MaxNLocator(6, integer=True))


def log_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between two, so that their labels do not run into each other."""
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
    """A range that shows most values when a few are far out, as those of an agent that diverges; None for all."""
    finite = np.array([value for value in values if np.isfinite(value)])
    if len(finite) < 8:  # noqa: PLR2004
        return None
    low, high = np.percentile(finite, [3, 97])
    span = max(float(high - low), 1e-9)
    if finite.max() <= high + 2 * span and finite.min() >= low - 2 * span:
        return None
    return max(float(finite.min()), float(low) - 0.3 * span), min(float(finite.max()), float(high) + 0.3 * span)
