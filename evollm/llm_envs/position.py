"""Where a gym is in its batches, and what a saved position may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evollm.checks import whole_number
from evollm.errors import ConfigurationError

STATE_KEYS = frozenset({"seed", "epoch", "index", "awaiting_action", "num_pairs", "batch_size"})


@dataclass(frozen=True)
class Position:
    """A position in the batches of a split.

    Attributes:
        epoch: The current epoch, from 0.
        index: Batches of the current epoch that were served.
        awaiting_action: Whether the last served batch still waits for `step`.
    """

    epoch: int = 0
    index: int = 0
    awaiting_action: bool = False


def check_state(state: Mapping[str, Any], present: Mapping[str, Any], num_batches: int) -> None:
    """Refuse a saved position that is none of a gym's, whose own `state_dict` is `present`.

    Raises:
        ConfigurationError: A key is missing or unknown, a value is out of range, or it is of other data or sizes.
    """
    if not isinstance(state, Mapping) or set(state) != STATE_KEYS:
        keys = list(state) if isinstance(state, Mapping) else type(state).__name__
        raise ConfigurationError("state", keys, f"pass what state_dict() gave; its keys are {sorted(STATE_KEYS)}")
    for name in ("seed", "epoch", "index"):
        whole_number(f"state[{name!r}]", state[name], 0)
    if state["index"] > num_batches:
        raise ConfigurationError("state['index']", state["index"], f"an epoch has {num_batches} batches")
    if not isinstance(state["awaiting_action"], bool) or (state["awaiting_action"] and not state["index"]):
        raise ConfigurationError("state['awaiting_action']", state["awaiting_action"], "pass what state_dict() gave")
    for name in ("num_pairs", "batch_size"):
        whole_number(f"state[{name!r}]", state[name], 1)
        if state[name] != present[name]:
            raise ConfigurationError(
                f"state[{name!r}]",
                state[name],
                f"this environment has {present[name]}; build it from the same data and sizes",
            )
