"""How many tokens a pass takes, and whether it recomputes activations: found at the first pass of a kind and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from evollm.models.budget import affordable_tokens, default_budget, should_recompute
from evollm.models.shared_base import SharedBase
from evollm.models.slow_settings import is_card, needless_checkpointing
from evollm.processes import Processes

# From whether activations are recomputed to the bytes that a pass of one member saves for each token.
SavedPerToken = Callable[[bool], float]


@dataclass
class PassBudgets:
    """The budgets of a base's passes.

    Attributes:
        base: The base.
        budgets: Most tokens in a pass, by whether it is for training, recomputes activations, and has a tiled head.
        affordable: With and without a tiled head: tokens of which the activations fit into memory.
    """

    base: SharedBase
    budgets: dict[tuple[bool, bool, bool], int] = field(default_factory=dict)
    affordable: dict[bool, int] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget what was found."""
        self.budgets.clear()
        self.affordable.clear()

    def budget(self, saved: SavedPerToken, *, training: bool, recompute: bool, tiled: bool) -> int:
        """The budget for a kind of pass where the user gives none."""
        kind = training, recompute, tiled
        if kind not in self.budgets:
            found = default_budget(self.base, saved(recompute), training=training, tiled=tiled)
            self.budgets[kind] = Processes.present().smallest(found)
        return self.budgets[kind]

    def recomputes(
        self, asked: bool | None, saved: SavedPerToken, *, tiled: bool, token_budget: int | None, longest: int
    ) -> tuple[bool, str]:
        """Whether activations are computed again in the backward pass: as the user says, or as memory needs it.

        What is kept is for how many tokens memory has room, and not what follows from it: a longer sample may come.

        Args:
            asked: What the user says; None: as memory needs it.
            saved: Bytes for each token.
            tiled: Whether the head is tiled.
            token_budget: Most tokens in a pass, as the user says.
            longest: Tokens of the longest sample.

        Returns:
            It, and what the user should know of it.
        """
        base, device = self.base, self.base.device.type
        if asked is False or not base.can_checkpoint or base.is_sharded or (asked and not is_card(device)):
            # The layers of a sharded base are recomputed in any case.
            return bool(asked) or (asked is None and base.is_sharded), ""
        if tiled not in self.affordable:
            found = affordable_tokens(base, saved(False), tiled=tiled)
            self.affordable[tiled] = Processes.present().smallest(found)
        room = self.affordable[tiled]
        if asked:
            return True, needless_checkpointing(device, room, token_budget, longest)
        return should_recompute(room, device, token_budget, longest), ""

    def state_dict(self) -> dict[str, Any]:
        """What was found so far, as JSON."""
        return {
            "budgets": [[*kind, budget] for kind, budget in self.budgets.items()],
            "affordable": [[tiled, tokens] for tiled, tokens in self.affordable.items()],
        }

    @classmethod
    def from_state(cls, base: SharedBase, state: Any) -> PassBudgets:
        """Those that `state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: `state` is something else.
        """
        found = cls(base)
        for *kind, budget in state["budgets"]:
            one, two, three = kind
            if not all(isinstance(value, bool) for value in kind) or type(budget) is not int or budget < 1:
                raise ValueError(f"{[*kind, budget]!r} is not a budget")
            found.budgets[one, two, three] = budget
        # Absent from earlier checkpoints, whose agents all say whether they recompute.
        for tiled, tokens in state.get("affordable", []):
            if not isinstance(tiled, bool) or type(tokens) is not int or tokens < 0:
                raise ValueError(f"{[tiled, tokens]!r} is no room for activations")
            found.affordable[tiled] = tokens
        return found
