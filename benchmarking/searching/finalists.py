"""What is compared with the best configuration at the end: earlier weights, scaled adapters, merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from evollm.models import AdapterState
from searching.records import Array
from searching.scores import SCORES

FACTORS = (0.5, 0.75, 1.25, 1.5, 2.0)
SOUPS = (2, 3, 4)
EARLIER = 3


@dataclass(frozen=True)
class Candidate:
    """Weights made without training.

    Attributes:
        kind: `earlier`, `scaled`, `average` (of the products B A, exactly), `linear` (of A and of B by themselves).
        members: The founders that it is made of.
        options: The factor, or the rung.
        state: The adapter.
    """

    kind: str
    members: Sequence[int]
    options: Mapping[str, Any]
    state: AdapterState = field(repr=False)

    @property
    def name(self) -> str:
        """For people."""
        return " ".join([self.kind, *(f"{value:g}" for value in self.options.values()), "of", *map(str, self.members)])

    @property
    def is_answered(self) -> bool:
        """Whether its answers are sampled."""
        return self.kind == "average" and len(self.members) == max(SOUPS)

    def described(self) -> dict[str, Any]:
        """Without weights."""
        return {"kind": self.kind, "members": list(self.members), **self.options}


def candidates_of(selection: Array, kept: Sequence[Sequence[AdapterState]]) -> list[Candidate]:
    """The candidates of a sweep.

    Args:
        selection: (founders, rungs, 2, pairs) log-ratios.
        kept: For each rung the adapters of all founders.
    """
    margins = selection[:, :, 0] - selection[:, :, 1]
    score = SCORES["log_loss"]
    last = [score(margins[founder, -1]) for founder in range(len(margins))]
    ranked = [int(number) for number in np.argsort(last)[::-1]]
    best, states = ranked[0], kept[-1]
    found = [Candidate("scaled", [best], {"factor": factor}, scaled(states[best], factor)) for factor in FACTORS]
    for size in SOUPS:
        members = ranked[:size]
        few = [states[member] for member in members]
        found += [Candidate("average", members, {}, average(few)), Candidate("linear", members, {}, linear(few))]
    top = [states[member] for member in ranked[: SOUPS[1]]]
    found.append(Candidate("average", ranked[: SOUPS[1]], {"factor": 1.5}, scaled(average(top), 1.5)))
    earlier = [(score(margins[f, rung]), rung, f) for f in range(len(margins)) for rung in range(margins.shape[1] - 1)]
    for _, rung, founder in sorted(earlier, reverse=True)[:EARLIER]:
        found.append(Candidate("earlier", [founder], {"rung": rung}, kept[rung][founder]))
    return found


def scaled(state: AdapterState, factor: float) -> AdapterState:
    """The adapter with `factor` times its change of the base's weights."""
    return replace(state, tensors={k: v * factor if "lora_B" in k else v for k, v in state.tensors.items()})


def average(states: Sequence[AdapterState]) -> AdapterState:
    """The mean of the adapters' changes of the base's weights, exactly, with the sum of their ranks."""
    joined = {}
    for key in states[0].tensors:
        parts = [state.tensors[key] for state in states]
        joined[key] = torch.cat(parts, dim=0) if "lora_A" in key else torch.cat(parts, dim=1)
    config = replace(states[0].config, r=states[0].config.r * len(states))
    # The scaling alpha / r has become smaller by the number of members, as a mean wants it.
    return AdapterState(config, joined)


def linear(states: Sequence[AdapterState]) -> AdapterState:
    """The means of A and of B."""
    means = {key: torch.stack([state.tensors[key] for state in states]).mean(dim=0) for key in states[0].tensors}
    return replace(states[0], tensors=means)
