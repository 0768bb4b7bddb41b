"""The faster ways to compute log-probs that gave right results for a base in a trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# JSON types of the fields; the others are boolean.
_TYPES: Mapping[str, tuple[type, ...]] = {"longest": (int,), "floor": (int, float), "reasons": (list,)}
# Absent from older checkpoints, whose runs took no such path.
_LATER = {"own_samples": False}


@dataclass(frozen=True)
class FastPaths:
    """The faster ways that gave right log-probs for a base and a LoRA configuration; see `evollm.models.probe`.

    Attributes:
        shared_prompt: Packed pairs, each with its prompt once.
        tiled_head: The head applied in tiles, to the hidden states of completion tokens only.
        stacking: Several adapters in one forward pass.
        longest: Longest sequence of the trial, in tokens.
        reasons: Why ways are not used, one sentence each, for a warning.
        explicit_positions: Padded batches of several sequences, with position ids.
        implicit_positions: Padded batches of several sequences, without position ids.
        floor: Difference of a completion's log-prob that rounding alone makes, in nats; see `evollm.models.rounding`.
        own_samples: Several adapters in one forward pass, each with samples of its own.
    """

    shared_prompt: bool = True
    tiled_head: bool = True
    stacking: bool = True
    longest: int = 0
    reasons: tuple[str, ...] = ()
    explicit_positions: bool = True
    implicit_positions: bool = True
    floor: float = 0.0
    own_samples: bool = True

    def goes_alone(self, explicit_positions: bool) -> bool:
        """Whether each sequence needs a forward pass of its own, since no batch of several gives right log-probs.

        Args:
            explicit_positions: Whether position ids may be passed.
        """
        padded = self.implicit_positions or (explicit_positions and self.explicit_positions)
        return not (self.shared_prompt or padded)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_dict(cls, data: Any) -> FastPaths:
        """The inverse of `to_dict`.

        Raises:
            ValueError: Keys or types of values are others.
        """
        names = {part.name for part in fields(cls)}
        if isinstance(data, Mapping):
            data = {**_LATER, **data}
        if not isinstance(data, Mapping) or data.keys() != names:
            raise ValueError(f"fast paths have {sorted(names)}, not {data!r}")
        # Not by isinstance, since a bool is an int as well.
        if not all(type(value) in _TYPES.get(name, (bool,)) for name, value in data.items()):
            raise ValueError(f"{data!r} are not fast paths")
        if not all(isinstance(reason, str) for reason in data["reasons"]):
            raise ValueError(f"{data['reasons']!r} are not reasons")
        return cls(**{**data, "reasons": tuple(data["reasons"])})

    def __and__(self, other: FastPaths) -> FastPaths:
        """The ways that are right in both trials."""
        return FastPaths(
            shared_prompt=self.shared_prompt and other.shared_prompt,
            tiled_head=self.tiled_head and other.tiled_head,
            stacking=self.stacking and other.stacking,
            longest=min(self.longest, other.longest),
            reasons=self.reasons + other.reasons,
            explicit_positions=self.explicit_positions and other.explicit_positions,
            implicit_positions=self.implicit_positions and other.implicit_positions,
            floor=max(self.floor, other.floor),
            own_samples=self.own_samples and other.own_samples,
        )
