"""Who came from whom in a run, from its records, and from its checkpoints where the records are damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evollm.errors import CheckpointError
from evollm.hpo import Birth, EvolutionPlan, ancestry
from evollm.hpo.hyperparameters import Value
from evollm.own_files import inside, read_bytes
from evollm.runs.events import Evolved
from evollm.runs.folder import CHECKPOINTS, LINEAGE
from evollm.runs.lines import read_lines

# The part of a checkpoint that is JSON.
STATE = "population.json"

# One (step, hyperparameters) for the founder, and one for each change.
Schedule = list[tuple[int, dict[str, Value]]]


@dataclass(frozen=True)
class Lineage:
    """The generations of a run.

    Attributes:
        founders: The first one.
        evolutions: Those that led to the others, in their order.
    """

    founders: Sequence[Birth]
    evolutions: Sequence[Evolved]

    def line(self, index: int) -> list[tuple[int, Birth]]:
        """An agent's ancestors and itself: one birth for each generation, with the step at which it began."""
        births = ancestry([evolution.plan for evolution in self.evolutions], index)
        births = births or [birth for birth in self.founders if birth.index == index]
        generations = [self.founders, *(evolution.plan.births for evolution in self.evolutions)]
        # A fresh agent's line begins in a later generation than the first.
        first = next(n for n, born in enumerate(generations) if births[0].index in {birth.index for birth in born})
        steps = [0, *(evolution.step for evolution in self.evolutions)]
        return list(zip(steps[first : first + len(births)], births, strict=True))

    def schedule(self, index: int) -> Schedule:
        """The hyperparameters of an agent's line, wherever they changed."""
        found: Schedule = []
        for step, birth in self.line(index):
            values = dict(birth.hyperparameters)
            if not found or found[-1][1] != values:
                found.append((step, values))
        return found


def read_lineage(run_dir: Path) -> Lineage:
    """Read the lineage of a run; what its file has lost is taken from the newest checkpoint that knows it.

    Raises:
        CheckpointError: Neither says which agents the run began with, or what they say is no lineage.
    """
    try:
        lines = read_lines(inside(run_dir, LINEAGE))
        recorded = _lineage(
            [birth for line in lines if line["kind"] == "founders" for birth in line["births"]],
            [line for line in lines if line["kind"] == "evolution"],
        )
        if not _is_whole(recorded):
            saved = _from_checkpoints(run_dir)
            if saved is not None:
                later = [one for one in recorded.evolutions if one.plan.generation >= len(saved.evolutions)]
                recorded = Lineage(saved.founders, [*saved.evolutions, *later])
        if recorded.founders and _is_whole(recorded):
            _check_descent(recorded)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{run_dir / LINEAGE} holds lines that are not of a run: {error!r}") from error
    if not recorded.founders:
        raise CheckpointError(f"{run_dir / LINEAGE} does not say which agents the run began with")
    if not _is_whole(recorded):
        raise CheckpointError(f"{run_dir / LINEAGE} has lost evolutions, and no checkpoint knows them")
    return recorded


def _lineage(founders: Sequence[Mapping[str, Any]], evolutions: Sequence[Mapping[str, Any]]) -> Lineage:
    return Lineage(
        [Birth.from_dict(birth) for birth in founders],
        [Evolved(int(line["step"]), EvolutionPlan.from_dict(line)) for line in evolutions],
    )


def _check_descent(lineage: Lineage) -> None:
    """Refuse agents that descend from none of the generation before, or from themselves.

    Raises:
        ValueError: There is one.
    """
    if any(birth.parent is not None for birth in lineage.founders):
        raise ValueError("a founder has a parent")
    known = present = {birth.index for birth in lineage.founders}
    for evolution in lineage.evolutions:
        for birth in evolution.plan.births:
            is_kept = birth.parent == birth.index and birth.index in present
            is_new = birth.index not in known and (birth.parent is None or birth.parent in present)
            if not (is_kept or is_new):
                raise ValueError(f"agent {birth.index} cannot come from agent {birth.parent}")
        present = {birth.index for birth in evolution.plan.births}
        known = known | present


def _is_whole(lineage: Lineage) -> bool:
    """Whether the generations follow each other from the first on."""
    numbers = [evolution.plan.generation for evolution in lineage.evolutions]
    return bool(lineage.founders) and numbers == list(range(len(numbers)))


def _from_checkpoints(run_dir: Path) -> Lineage | None:
    """What the checkpoint of the most evolutions says; None where none says anything."""
    found = []
    folder = run_dir / CHECKPOINTS
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            state = json.loads(read_bytes(inside(folder, f"{path.name}/{STATE}")))
            found.append(_lineage(state["founders"], state["evolutions"]))
        except (OSError, CheckpointError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return max(found, key=lambda lineage: len(lineage.evolutions), default=None)
