"""Which trackers a run reports to."""

from __future__ import annotations

from collections.abc import Sequence

from evollm.checks import nearest_name, switch
from evollm.errors import ConfigurationError
from evollm.tracking.trackers import TRACKERS

NONE = "none"


def tracker_names(report_to: str | Sequence[str] | None, *, wb: bool = False, tensorboard: bool = False) -> list[str]:
    """The trackers that were asked for, each once.

    Args:
        report_to: A name of `TRACKERS` or a list of names; "none" or None: none.
        wb: The same as the name `wandb`.
        tensorboard: The same as the name `tensorboard`.

    Raises:
        ConfigurationError: A name is not known, or "none" stands beside others.
    """
    names = [report_to] if isinstance(report_to, str) else report_to
    if names is None:
        names = []
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError("report_to", report_to, f"must be a name or a list of names: {', '.join(TRACKERS)}")
    for name in names:
        if name not in (*TRACKERS, NONE):
            nearest = nearest_name(name, [*TRACKERS, NONE])
            fix = f"{name!r} is no tracker; the nearest is {nearest!r}, known are {', '.join((*TRACKERS, NONE))}"
            raise ConfigurationError("report_to", report_to, fix)
    if NONE in names and len(names) > 1:
        raise ConfigurationError("report_to", report_to, f"{NONE!r} stands alone")
    switched = {"wandb": switch("wb", wb), "tensorboard": switch("tensorboard", tensorboard)}
    return [name for name in TRACKERS if name in names or switched.get(name)]
