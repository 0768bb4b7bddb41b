"""What a run has spent, as plain data: floating-point operations by kind, and in runs of one agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What passes through the base are made for; `final` are the evaluations before and after training.
KINDS = ("training", "evaluation", "references", "probe", "final")


@dataclass(frozen=True)
class Spent:
    """The compute of a run up to a step, by the formula of `evollm.models.flops`.

    Attributes:
        operations: Floating-point operations by kind, `KINDS`.
        one_run: The operations of one agent that makes all steps of the run by itself, by kind; a mean over batches for
            steps that are not done yet.
        member_steps: Steps, added up over the members.
    """

    operations: Mapping[str, float]
    one_run: Mapping[str, float]
    member_steps: int

    @property
    def by_kind(self) -> dict[str, float]:
        """What was spent on each kind, in runs of one agent."""
        unit = sum(self.one_run.values())
        return {kind: self.operations.get(kind, 0) / unit for kind in KINDS} if unit else dict.fromkeys(KINDS, 0.0)

    @property
    def runs(self) -> float:
        """What was spent in all, in runs of one agent."""
        return sum(self.by_kind.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{kind} {share:.2f}" for kind, share in self.by_kind.items() if share)
        return f"{self.runs:.2f} runs of one agent: {parts}; {sum(self.operations.values()):.3g} FLOPs"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "operations": dict(self.operations),
            "one_run": dict(self.one_run),
            "member_steps": self.member_steps,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spent:
        """Read the result of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: A value is missing or of the wrong type.
        """
        operations, one_run = (
            {kind: float(data[name].get(kind, 0)) for kind in KINDS} for name in ("operations", "one_run")
        )
        return cls(operations, one_run, int(data["member_steps"]))
