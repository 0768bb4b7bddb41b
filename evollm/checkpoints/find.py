"""Which agent is meant where a folder is given: an agent's own, or the best one of a run or of a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from evollm.checkpoints.agent import ATTRIBUTES
from evollm.checkpoints.agent import CONFIG as ADAPTER
from evollm.checkpoints.atomic import existing_folder
from evollm.checkpoints.steps import STATE, has_populations, newest_population, read_state
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
    """An agent's folder, and why it is that one.

    Attributes:
        path: The folder.
        remark: What to know of the choice, in a line; "" where it is the folder that was given, or a run's last word.
        index: The agent's number, of one in a checkpoint.
        step: Steps done, of one in a checkpoint.
    """

    path: Path
    remark: str = ""
    index: int | None = None
    step: int | None = None


def find_agent(field: str, path: object) -> FoundAgent:
    """The agent that a folder stands for.

    Args:
        field: What the user calls the folder, for messages.
        path: Folder of an agent, or of its actor; of a run: its best agent, and of one that has not ended the best of
            its newest checkpoint; of a checkpoint, or of several: the best of the newest.

    Raises:
        ConfigurationError: This is no path.
        CheckpointError: The run has no agent to take, or what it has is damaged.
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
        elite: Where its best agent is, once it has ended.
        checkpoints: Where its checkpoints are.

    Raises:
        CheckpointError: There is none, or what there is is damaged.
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
    """The best agent of a checkpoint, by the last scores before it was written.

    Args:
        folder: The checkpoint.
        what: What it was found as, to begin the remark with.

    Raises:
        CheckpointError: It is damaged.
    """
    state = read_state(folder)
    names = state["agents"]
    try:
        known = {int(index): tuple(map(float, found)) for index, found in state.get("fitnesses", {}).items()}
        plans = [EvolutionPlan.from_dict(plan) for plan in state.get("evolutions", [])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {STATE} is not a population's: {error!r}") from error
    if not names:
        raise CheckpointError(f"{folder}: {STATE} names no agents")
    parents = {birth.index: birth.parent for birth in plans[-1].births} if plans else {}
    numbers = [int(name.removeprefix("agent-")) for name in names]
    fitnesses = [_fitness(number, known, parents) for number in numbers]
    best = rank(fitnesses)[0]
    how = "the best" if is_finite(fitnesses[best]) else "the first, since none has been scored,"
    remark = f"{what}: agent {numbers[best]} is taken, {how} of the checkpoint of step {state['step']}"
    return FoundAgent(inside(folder, names[best]), remark, numbers[best], state["step"])


def _fitness(number: int, known: dict[int, Fitness], parents: dict[int, int | None]) -> Fitness:
    """An agent's fitness; its parent's where it was born after the last scoring."""
    parent = parents.get(number)
    unknown = (float("nan"),)
    return known.get(number, unknown if parent is None else known.get(parent, unknown))


def check_is_base(field: str, model: object) -> None:
    """Refuse the folder of a run or of an agent where that of a model is asked for, and say what is to be given.

    Raises:
        ConfigurationError: It is one.
    """
    if not isinstance(model, str | os.PathLike) or not str(model):
        return
    folder = Path(expanded(model))
    try:
        # An adapter by itself, as exports are, is a base; what else an agent has lies in folders below its own.
        is_agent = (folder / ATTRIBUTES).is_file() and not (folder / ADAPTER).is_file()
        what = "a run" if is_run(folder) else "an agent" if is_agent else ""
    except (OSError, ValueError):  # No path at all.
        return
    if what:
        actor = (folder / ELITE if what == "a run" else folder) / _ACTOR
        fix = f"is the folder of {what}: give its base and start_from={model}, or {actor}, an adapter for its base"
        raise ConfigurationError(field, str(model), fix)
