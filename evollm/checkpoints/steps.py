"""The checkpoints of a run, a folder for each step: found, pruned, and read as far as they are plain data."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from evollm.checkpoints.atomic import existing_folder, remove_discarded, remove_folder, verify
from evollm.errors import CheckpointError
from evollm.own_files import inside, read_bytes

STATE = "population.json"
ARRAYS = "population.safetensors"
# The folder, in a checkpoint, of the agent of the best evaluation so far.
BEST_SO_FAR = "best"
REQUIRED = frozenset({"step", "agents"})
# A pattern of the names that a run gives to its checkpoints.
STEP_FOLDER = r"step-\d{6,}"
_AGENT = re.compile(r"agent-\d+")


def newest_population(folder: Path) -> Path | None:
    """The whole checkpoint of the most steps in a folder; the folders' names play no part.

    Warns of each that is newer and damaged, naming the file.

    Returns:
        Its path, None if there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, and every one is damaged.
    """
    # A folder set aside counts while the one that was to replace it is not there.
    found = sorted({existing_folder(_visible(path)) for path in _folders(folder) if not _is_unfinished(path)})
    faults, whole = [], {}
    for path in found:
        try:
            verify(path)
            whole[path] = int(read_state(path)["step"])
        except CheckpointError as error:
            faults.append(str(error))
    for fault in faults:
        warnings.warn(f"a checkpoint is damaged and left out: {fault}", UserWarning, stacklevel=2)
    if faults and not whole:
        raise CheckpointError(f"every checkpoint is damaged: {'; '.join(faults)}")
    return max(whole, key=lambda path: whole[path], default=None)


def has_populations(folder: Path) -> bool:
    """Whether a folder holds checkpoints, damaged ones included."""
    return any((path / STATE).exists() for path in _folders(folder) if not _is_unfinished(path))


def prune_populations(folder: Path, keep_last: int, newest: Path) -> None:
    """Remove all checkpoints but the `keep_last` of the most steps; `newest` stays in any case."""
    remove_discarded(folder, STEP_FOLDER)
    steps = {}
    for path in _folders(folder):
        if not path.name.startswith(".") and path != newest:
            try:
                steps[path] = int(read_state(path)["step"])
            except CheckpointError:
                # Not ours to judge: whoever resumes is told what is wrong with it.
                continue
    older = sorted(steps, key=lambda path: steps[path], reverse=True)
    for path in older[keep_last - 1 :]:
        remove_folder(path)


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, without links to others."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return [path for path in entries if path.is_dir() and not path.is_symlink()]


def _is_unfinished(path: Path) -> bool:
    """Whether a process has died, or is still at work, in writing or removing a folder."""
    return path.name.startswith(".") and path.name.endswith((".new", ".gone"))


def _visible(path: Path) -> Path:
    """The path that a folder set aside was written to."""
    name = path.name
    return path.with_name(name[1:-4]) if name.startswith(".") and name.endswith(".old") else path


def read_state(path: Path) -> dict[str, Any]:
    """The part of a population's folder that is JSON, with at least its agents and its step.

    Raises:
        CheckpointError: It is missing, or something else.
    """
    try:
        state = json.loads(read_bytes(inside(path, STATE)))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {STATE} cannot be read ({error})") from error
    if not isinstance(state, dict) or not state.keys() >= REQUIRED:
        raise CheckpointError(f"{path}: {STATE} is not a population's, it lacks some of {sorted(REQUIRED)}")
    agents = state["agents"]
    if not isinstance(agents, list) or not all(isinstance(name, str) and _AGENT.fullmatch(name) for name in agents):
        raise CheckpointError(f"{path}: {STATE} names no folders of agents: {agents!r}")
    if isinstance(state["step"], bool) or not isinstance(state["step"], int) or state["step"] < 0:
        raise CheckpointError(f"{path}: {STATE} has no number of steps: {state['step']!r}")
    return state


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of a population's folder that are no agent's.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        found: dict[str, NDArray[np.generic]] = load(read_bytes(inside(path, ARRAYS)))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {ARRAYS} cannot be read ({error})") from error
    return found
