"""Who came from whom in a run, from its records, and from its checkpoints where the records are damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evollm.errors import CheckpointError
from evollm.hpo.lineage import Birth, EvolutionPlan
from evollm.own_files import inside, read_bytes
from evollm.runs.folder import CHECKPOINTS, LINEAGE
from evollm.runs.lines import read_lines

# The part of a checkpoint that is JSON.
STATE = "population.json"


@dataclass(frozen=True)
class Lineage:
    """The generations of a run.

    Attributes:
        founders: The first one.
        evolutions: Each with the step after which it was carried out, in their order.
    """

    founders: Sequence[Birth]
    evolutions: Sequence[tuple[int, EvolutionPlan]]


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
                later = [pair for pair in recorded.evolutions if pair[1].generation >= len(saved.evolutions)]
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
        [(int(line["step"]), EvolutionPlan.from_dict(line)) for line in evolutions],
    )


def _check_descent(lineage: Lineage) -> None:
    """Refuse agents that descend from none of the generation before, or from themselves.

    Raises:
        ValueError: There is one.
    """
    if any(birth.parent is not None for birth in lineage.founders):
        raise ValueError("a founder has a parent")
    known = present = {birth.index for birth in lineage.founders}
    for _, plan in lineage.evolutions:
        for birth in plan.births:
            is_kept = birth.parent == birth.index and birth.index in present
            is_new = birth.index not in known and (birth.parent is None or birth.parent in present)
            if not (is_kept or is_new):
                raise ValueError(f"agent {birth.index} cannot come from agent {birth.parent}")
        present = {birth.index for birth in plan.births}
        known = known | present


def _is_whole(lineage: Lineage) -> bool:
    """Whether the generations follow each other from the first on."""
    numbers = [plan.generation for _, plan in lineage.evolutions]
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
