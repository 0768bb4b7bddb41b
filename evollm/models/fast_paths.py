"""Which layouts of a pass a base has been seen to compute rightly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# Types of the fields as JSON has them.
_TYPES: Mapping[str, tuple[type, ...]] = {"longest": (int,), "floor": (int, float), "reasons": (list,)}


@dataclass(frozen=True)
class FastPaths:
    """What the base and a LoRA configuration have been seen to compute rightly.

    Attributes:
        shared_prompt: Packed pairs, the prompt once.
        tiled_head: The head applied to the hidden states of completion tokens alone.
        stacking: Several members in one pass.
        longest: Longest sequence that this was tried with, in tokens.
        reasons: Why a path is not taken, for the user.
        explicit_positions: Padded sequences in one batch, with position ids.
        implicit_positions: The same without position ids.
        floor: What rounding alone makes of a completion's log-prob, in nats; see `evollm.models.rounding`.
    """

    shared_prompt: bool = True
    tiled_head: bool = True
    stacking: bool = True
    longest: int = 0
    reasons: tuple[str, ...] = ()
    explicit_positions: bool = True
    implicit_positions: bool = True
    floor: float = 0.0

    def goes_alone(self, explicit_positions: bool) -> bool:
        """Whether no batch of several sequences is right, with or, if that is asked for, without position ids."""
        padded = self.implicit_positions or (explicit_positions and self.explicit_positions)
        return not (self.shared_prompt or padded)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_dict(cls, data: Any) -> FastPaths:
        """Read what `to_dict` gave.

        Raises:
            ValueError: It is something else.
        """
        names = {part.name for part in fields(cls)}
        if not isinstance(data, Mapping) or data.keys() != names:
            raise ValueError(f"fast paths have {sorted(names)}, not {data!r}")
        # By the type itself: True is an integer, too.
        if not all(type(value) in _TYPES.get(name, (bool,)) for name, value in data.items()):
            raise ValueError(f"{data!r} are not fast paths")
        if not all(isinstance(reason, str) for reason in data["reasons"]):
            raise ValueError(f"{data['reasons']!r} are not reasons")
        return cls(**{**data, "reasons": tuple(data["reasons"])})

    def __and__(self, other: FastPaths) -> FastPaths:
        """The paths that both take."""
        return FastPaths(
            shared_prompt=self.shared_prompt and other.shared_prompt,
            tiled_head=self.tiled_head and other.tiled_head,
            stacking=self.stacking and other.stacking,
            longest=min(self.longest, other.longest),
            reasons=self.reasons + other.reasons,
            explicit_positions=self.explicit_positions and other.explicit_positions,
            implicit_positions=self.implicit_positions and other.implicit_positions,
            floor=max(self.floor, other.floor),
        )
