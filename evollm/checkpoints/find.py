"""Finds the agent for a given folder: the folder's own, or the best agent of a run or of a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from evollm.checkpoints.agent import ATTRIBUTES
from evollm.checkpoints.agent import CONFIG as ADAPTER
from evollm.checkpoints.atomic import existing_folder
from evollm.checkpoints.steps import BEST_SO_FAR, STATE, has_populations, newest_population, read_state
from evollm.checks import expanded, usable_path
from evollm.errors import CheckpointError, ConfigurationError
from evollm.hpo import EvolutionPlan, Fitness, is_finite, rank
from evollm.own_files import inside
from evollm.runs import has_ended
from evollm.runs.folder import CHECKPOINTS, ELITE, is_run

_ACTOR = "actor"


class NoAgentError(CheckpointError):
    """A run has not ended and has saved no agent yet."""


@dataclass(frozen=True)
class FoundAgent:
    """The folder of an agent, and how it was chosen.

    Attributes:
        path: The folder.
        remark: A sentence about the choice; "" if the folder is the given one, or the best agent of a run that ended.
        index: The agent's index, for an agent in a checkpoint.
        step: Steps done, for an agent in a checkpoint.
    """

    path: Path
    remark: str = ""
    index: int | None = None
    step: int | None = None


def find_agent(field: str, path: object) -> FoundAgent:
    """Find the agent for a folder.

    Args:
        field: The name of the user's argument, for error messages.
        path: Folder of an agent or of its actor; of a run, for its best agent, or, while the run has not ended, the
            best agent of its newest checkpoint; of a checkpoint, or of several, for the best agent of the newest.

    Raises:
        ConfigurationError: `path` is not a path.
        CheckpointError: The run has saved no agent, or its files are damaged.
    """
    folder = existing_folder(usable_path(field, path))
    if folder.name == _ACTOR and (folder.parent / ATTRIBUTES).is_file():
        return FoundAgent(folder.parent)
    if (folder / ATTRIBUTES).is_file() or not folder.is_dir():
        return FoundAgent(folder)
    if (folder / STATE).is_file():
        return best_of_checkpoint(folder, str(folder))
    if is_run(folder):
        return best_of_run(folder, inside(folder, ELITE), inside(folder, CHECKPOINTS))
    newest = newest_population(folder) if has_populations(folder) else None
    return FoundAgent(folder) if newest is None else best_of_checkpoint(newest, str(folder))


def best_of_run(run_dir: Path, elite: Path, checkpoints: Path) -> FoundAgent:
    """The best agent of a run, which may not have ended.

    Args:
        run_dir: The run folder.
        elite: Folder of the best agent, which is written when the run ends.
        checkpoints: Folder of the checkpoints.

    Raises:
        CheckpointError: The run has saved no agent, or its files are damaged.
    """
    ended = has_ended(run_dir)
    saved = existing_folder(elite)
    if ended and saved.is_dir():
        return FoundAgent(saved)
    newest = newest_population(checkpoints)
    if newest is not None:
        return best_of_checkpoint(newest, str(run_dir) if ended else f"{run_dir}: the run has not ended")
    if ended:
        raise CheckpointError(f"{run_dir}: the run kept neither its best agent nor a checkpoint in its folder")
    raise NoAgentError(f"{run_dir}: the run has not ended and has saved no checkpoint yet, so it has no agent to take")


def best_of_checkpoint(folder: Path, what: str) -> FoundAgent:
    """The best agent of a checkpoint: the best of its members, or the copy of an agent that was better before.

    Args:
        folder: The checkpoint.
        what: The beginning of the remark.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    state = read_state(folder)
    names = state["agents"]
    try:
        known = {int(index): tuple(map(float, found)) for index, found in state.get("fitnesses", {}).items()}
        plans = [EvolutionPlan.from_dict(plan) for plan in state.get("evolutions", [])]
        kept = state.get("best") or {"index": 0, "step": 0, "fitness": ["nan"]}
        index, step, fitness = int(kept["index"]), int(kept["step"]), tuple(map(float, kept["fitness"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {STATE} is not a population's: {error!r}") from error
    if not names:
        raise CheckpointError(f"{folder}: {STATE} names no agents")
    parents = {birth.index: birth.parent for birth in plans[-1].births} if plans else {}
    numbers = [int(name.removeprefix("agent-")) for name in names]
    fitnesses = [_fitness(number, known, parents) for number in numbers]
    best = rank(fitnesses)[0]
    if is_finite(fitness) and rank([fitnesses[best], fitness])[0] == 1:
        remark = f"{what}: agent {index} is taken as it was after step {step}, at the best evaluation so far"
        return FoundAgent(inside(folder, BEST_SO_FAR), remark, index, step)
    how = "the best" if is_finite(fitnesses[best]) else "the first, since none has been scored,"
    remark = f"{what}: agent {numbers[best]} is taken, {how} of the checkpoint of step {state['step']}"
    return FoundAgent(inside(folder, names[best]), remark, numbers[best], state["step"])


def _fitness(number: int, known: dict[int, Fitness], parents: dict[int, int | None]) -> Fitness:
    """An agent's fitness, or its parent's if the agent was born after the last evaluation."""
    parent = parents.get(number)
    unknown = (float("nan"),)
    return known.get(number, unknown if parent is None else known.get(parent, unknown))


def check_is_base(field: str, model: object) -> None:
    """Check that a model is not the folder of a run or of an agent.

    Raises:
        ConfigurationError: It is one; the message says which argument to use.
    """
    if not isinstance(model, str | os.PathLike) or not str(model):
        return
    folder = Path(expanded(model))
    try:
        # An exported adapter, which has its configuration in the folder itself, can be a base.
        is_agent = (folder / ATTRIBUTES).is_file() and not (folder / ADAPTER).is_file()
        what = "a run" if is_run(folder) else "an agent" if is_agent else ""
    except (OSError, ValueError):  # not a valid path
        return
    if what:
        actor = (folder / ELITE if what == "a run" else folder) / _ACTOR
        fix = f"is the folder of {what}: give its base and start_from={model}, or {actor}, an adapter for its base"
        raise ConfigurationError(field, str(model), fix)
