"""Token budgets of passes and the default of gradient checkpointing, measured at the first pass of a kind and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from evollm.models.budget import affordable_tokens, default_budget, should_recompute
from evollm.models.shared_base import SharedBase
from evollm.models.slow_settings import is_card, needless_checkpointing
from evollm.processes import Processes

# Whether activations are recomputed -> bytes that a pass of one member saves for the backward pass, for each token.
SavedPerToken = Callable[[bool], float]


@dataclass
class PassBudgets:
    """The budgets of a base's passes.

    Attributes:
        base: The base.
        budgets: Most tokens in a pass, keyed by whether the pass trains, recomputes activations, has a tiled head.
        affordable: Number of tokens whose activations fit into memory, keyed by whether the head is tiled.
    """

    base: SharedBase
    budgets: dict[tuple[bool, bool, bool], int] = field(default_factory=dict)
    affordable: dict[bool, int] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget all measurements."""
        self.budgets.clear()
        self.affordable.clear()

    def budget(self, saved: SavedPerToken, *, training: bool, recompute: bool, tiled: bool) -> int:
        """The token budget of a kind of pass for which the user gives none."""
        kind = training, recompute, tiled
        if kind not in self.budgets:
            found = default_budget(self.base, saved(recompute), training=training, tiled=tiled)
            self.budgets[kind] = Processes.present().smallest(found)
        return self.budgets[kind]

    def recomputes(
        self, asked: bool | None, saved: SavedPerToken, *, tiled: bool, token_budget: int | None, longest: int
    ) -> tuple[bool, str]:
        """Whether activations are recomputed in the backward pass: as the user says, else if memory is too short.

        The number of affordable tokens is kept, not the decision, since a later batch may have a longer sample.

        Args:
            asked: The user's `gradient_checkpointing`; None: decided from memory.
            saved: Gives the bytes saved for each token.
            tiled: Whether the head is tiled.
            token_budget: The user's limit of tokens in a pass; None: no limit given.
            longest: Tokens of the longest sample.

        Returns:
            The decision, and a remark for the user, "" for none.
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
        """All measurements so far, as JSON."""
        return {
            "budgets": [[*kind, budget] for kind, budget in self.budgets.items()],
            "affordable": [[tiled, tokens] for tiled, tokens in self.affordable.items()],
        }

    @classmethod
    def from_state(cls, base: SharedBase, state: Any) -> PassBudgets:
        """The budgets in an output of `state_dict`.

        Raises:
            KeyError, TypeError, ValueError: `state` is not an output of `state_dict`.
        """
        found = cls(base)
        for *kind, budget in state["budgets"]:
            one, two, three = kind
            if not all(isinstance(value, bool) for value in kind) or type(budget) is not int or budget < 1:
                raise ValueError(f"{[*kind, budget]!r} is not a budget")
            found.budgets[one, two, three] = budget
        # Absent from older checkpoints, whose agents all have gradient_checkpointing set to True or False.
        for tiled, tokens in state.get("affordable", []):
            if not isinstance(tiled, bool) or type(tokens) is not int or tokens < 0:
                raise ValueError(f"{[tiled, tokens]!r} is no room for activations")
            found.affordable[tiled] = tokens
        return found
