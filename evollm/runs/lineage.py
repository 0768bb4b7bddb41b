"""The lineage of a run, read from `lineage.jsonl`, and from the checkpoints where that file is damaged."""

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

# The JSON file of a checkpoint.
STATE = "population.json"

# (step, hyperparameters) at the beginning and after each change.
HyperparameterSchedule = list[tuple[int, dict[str, Value]]]


@dataclass(frozen=True)
class Lineage:
    """The generations of a run.

    Attributes:
        founders: The first generation.
        evolutions: The later generations, in their order.
    """

    founders: Sequence[Birth]
    evolutions: Sequence[Evolved]

    def before(self, step: int) -> Lineage:
        """The lineage at the evaluation after so many steps: without an evolution at that step, which comes later."""
        return Lineage(self.founders, [evolution for evolution in self.evolutions if evolution.step < step])

    def ancestry(self, index: int) -> list[tuple[int, Birth]]:
        """An agent's ancestors and the agent: one birth for each generation, with the step at which it began.

        Of two parents the first one counts; `family` has both.
        """
        births = ancestry([evolution.plan for evolution in self.evolutions], index)
        births = births or [birth for birth in self.founders if birth.index == index]
        generations = [self.founders, *(evolution.plan.births for evolution in self.evolutions)]
        # If the oldest ancestor is a fresh agent, its generation is not the first.
        first = next(n for n, born in enumerate(generations) if births[0].index in {birth.index for birth in born})
        steps = [0, *(evolution.step for evolution in self.evolutions)]
        return list(zip(steps[first : first + len(births)], births, strict=True))

    def family(self, index: int) -> list[tuple[int, tuple[Birth, ...]]]:
        """All ancestors of an agent by either parent, and the agent: for each generation its step and their births."""
        steps = [0, *(evolution.step for evolution in self.evolutions)]
        generations = [self.founders, *(evolution.plan.births for evolution in self.evolutions)]
        wanted, found = {index}, []
        for step, births in zip(reversed(steps), reversed(generations), strict=True):
            here = tuple(birth for birth in births if birth.index in wanted)
            if here:
                found.append((step, here))
                wanted = {parent for birth in here for parent in birth.parents}
        return found[::-1]

    def schedule(self, index: int) -> HyperparameterSchedule:
        """The hyperparameters over an agent's ancestry, one entry for each change."""
        schedule: HyperparameterSchedule = []
        for step, birth in self.ancestry(index):
            values = dict(birth.hyperparameters)
            if not schedule or schedule[-1][1] != values:
                schedule.append((step, values))
        return schedule


def read_lineage(run_dir: Path) -> Lineage:
    """Read the lineage of a run; evolutions that its file lacks are taken from the checkpoint with most evolutions.

    Raises:
        CheckpointError: The founders or an evolution are in neither, or the records contradict each other.
    """
    try:
        lines = read_lines(inside(run_dir, LINEAGE))
        recorded = _lineage(
            [birth for line in lines if line["kind"] == "founders" for birth in line["births"]],
            [line for line in lines if line["kind"] == "evolution"],
        )
        if not _is_complete(recorded):
            saved = _from_checkpoints(run_dir)
            if saved is not None:
                later = [one for one in recorded.evolutions if one.plan.generation >= len(saved.evolutions)]
                recorded = Lineage(saved.founders, [*saved.evolutions, *later])
        if _is_complete(recorded):
            _check_parents(recorded)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{run_dir / LINEAGE} holds lines that are not of a run: {error!r}") from error
    if not recorded.founders:
        raise CheckpointError(f"{run_dir / LINEAGE} does not say which agents the run began with")
    if not _is_complete(recorded):
        raise CheckpointError(f"{run_dir / LINEAGE} has lost evolutions, and no checkpoint has them")
    return recorded


def _lineage(founders: Sequence[Mapping[str, Any]], evolutions: Sequence[Mapping[str, Any]]) -> Lineage:
    return Lineage(
        [Birth.from_dict(birth) for birth in founders],
        [Evolved(int(line["step"]), EvolutionPlan.from_dict(line)) for line in evolutions],
    )


def _check_parents(lineage: Lineage) -> None:
    """Check that every agent is kept, fresh under a new index, or the child of agents of the generation before.

    Raises:
        ValueError: An agent is none of these.
    """
    if any(birth.parent is not None for birth in lineage.founders):
        raise ValueError("a founder has a parent")
    known = present = {birth.index for birth in lineage.founders}
    for evolution in lineage.evolutions:
        for birth in evolution.plan.births:
            is_kept = birth.parent == birth.index and birth.index in present
            is_new = birth.index not in known and set(birth.parents) <= present
            has_two = birth.second_parent is not None
            if not (is_kept or is_new) or (has_two and (is_kept or birth.parent in (None, birth.second_parent))):
                raise ValueError(f"agent {birth.index} cannot come from the agents {birth.parents}")
        present = {birth.index for birth in evolution.plan.births}
        known = known | present


def _is_complete(lineage: Lineage) -> bool:
    """Whether there are founders, and no evolution is missing between two others."""
    numbers = [evolution.plan.generation for evolution in lineage.evolutions]
    return bool(lineage.founders) and numbers == list(range(len(numbers)))


def _from_checkpoints(run_dir: Path) -> Lineage | None:
    """Return the lineage in the checkpoint with most evolutions; None if no checkpoint can be read."""
    found = []
    folder = run_dir / CHECKPOINTS
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            state = json.loads(read_bytes(inside(folder, f"{path.name}/{STATE}")))
            found.append(_lineage(state["founders"], state["evolutions"]))
        except (OSError, CheckpointError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return max(found, key=lambda lineage: len(lineage.evolutions), default=None)
