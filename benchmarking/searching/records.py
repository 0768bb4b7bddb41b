"""What is measured, as one checked file for a seed: a recorded sweep, or what a run of a strategy reached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Measured:
    """Arrays, and what they are about. Log-ratios are log pi - log ref of a completion in nats, (…, 2, pairs).

    Attributes:
        about: Data, seed, model, sizes, machine, versions.
    """

    about: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write the file, and its SHA-256 beside it.

        Where the base is in bfloat16, whose log-ratios have a noise of a third of a nat, numbers are kept in float16.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: value for name, value in vars(self).items() if name != "about"}
        if self.about.get("dtype") == "bfloat16":
            arrays = {name: _converted(value, np.float32, np.float16) for name, value in arrays.items()}
        part = path.with_suffix(".part.npz")
        np.savez_compressed(part, about=np.array(json.dumps(self.about)), **arrays)
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        part.replace(path)
        path.with_suffix(".sha256").write_text(f"{digest}  {path.name}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file, whose checksum must be right."""
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != path.with_suffix(".sha256").read_text(encoding="utf-8").split()[0]:
            raise SystemExit(f"{path} is damaged: its SHA-256 is {found}")
        with np.load(path) as arrays:
            values = {name: _converted(arrays[name], np.float16, np.float32) for name in arrays.files}
        return cls(json.loads(str(values.pop("about"))), **values)


@dataclass(frozen=True, eq=False)
class Searched(Measured):
    """The winner of one run of a strategy; `about` says what the run has spent, too.

    Attributes:
        selection: (2, selection pairs) log-ratios, chosen first.
        final: (2, final pairs).
        kl: (measured pairs,) KL(pi || ref) over the vocabulary, summed over the chosen completion's tokens.
    """

    selection: Array
    final: Array
    kl: Array


@dataclass(frozen=True, eq=False)
class Record(Measured):
    """One seed's sweep; `about` lists `founders` and `candidates` in the order of the arrays.

    Attributes:
        selection: (founders, rungs, 2, selection pairs) log-ratios.
        final: (founders, 2, final pairs) log-ratios at the end of the run.
        kl: (founders, measured pairs) KL(pi || ref) over the vocabulary, summed over the chosen completion's tokens.
        candidates_selection: (candidates, 2, selection pairs): merges, scaled adapters, earlier weights.
        candidates_final: (candidates, 2, final pairs).
        candidates_kl: (candidates, measured pairs).
        losses: (founders, steps) the training loss.
        step_operations: (steps, 2) floating-point operations of a member's training step, and of the reference's pass.
        pair_operations: (selection pairs,) those of a member's forward pass.
    """

    selection: Array
    final: Array
    kl: Array
    candidates_selection: Array
    candidates_final: Array
    candidates_kl: Array
    losses: Array
    step_operations: Array
    pair_operations: Array


def _converted(value: Array, before: type, after: type) -> Array:
    return value.astype(after) if value.dtype == before else value
