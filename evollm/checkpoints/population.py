"""A whole population as a folder, and a run's folder of such folders."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from evollm.checkpoints.agent import AgentFolder, read_adapter, read_agent_folder, write_adapter, write_agent
from evollm.checkpoints.atomic import (
    existing_folder,
    remove_discarded,
    remove_folder,
    replace_folder,
    seal,
    verify,
)
from evollm.errors import CheckpointError
from evollm.models import AdapterState
from evollm.models.reference_cache import ReferenceCache
from evollm.own_files import inside, read_bytes

STATE = "population.json"
TENSORS = "population.safetensors"
REFERENCE_LOGPROBS = "reference_logprobs.safetensors"
FIXED_REFERENCE = "fixed_reference"
REQUIRED = frozenset({"step", "agents"})
# A pattern of the names that a run gives to its checkpoints.
STEP_FOLDER = r"step-\d{6,}"
_AGENT = re.compile(r"agent-\d+")


@dataclass(frozen=True)
class Population:
    """Everything that a run needs to go on.

    Attributes:
        agents: The agents in their order.
        state: Counters, generators, positions, settings: JSON values, among them `step`.
        tensors: What JSON is too narrow for.
        fixed_reference: The adapter that scores are measured against, where it is no agent's reference.
        reference_logprobs: The reference log-probs known so far.
    """

    agents: Sequence[AgentFolder]
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    fixed_reference: AdapterState | None = None
    reference_logprobs: ReferenceCache = field(default_factory=ReferenceCache)


def write_population(path: Path, population: Population, base_name: str) -> None:
    """Write a population's folder; it appears whole or not at all.

    Each agent is a subfolder `agent-<index>` that loads by itself.

    Args:
        path: Folder to write or replace.
        population: What to write.
        base_name: Name or path of the base model, for whoever loads an adapter.
    """
    names = [f"agent-{agent.attributes['index']}" for agent in population.agents]
    with replace_folder(path) as folder:
        for name, agent in zip(names, population.agents, strict=True):
            (folder / name).mkdir()
            write_agent(folder / name, agent, base_name)
            seal(folder / name)
        if population.fixed_reference is not None:
            write_adapter(folder / FIXED_REFERENCE, population.fixed_reference, base_name)
        (folder / TENSORS).write_bytes(save(dict(population.tensors)))
        population.reference_logprobs.save(folder / REFERENCE_LOGPROBS)
        text = json.dumps({**population.state, "agents": names})
        (folder / STATE).write_text(text + "\n", encoding="utf-8")


def read_population(path: Path) -> Population:
    """Read a population's folder without running anything that is in it.

    Raises:
        CheckpointError: A file is missing, damaged or not plain data; the message names it.
    """
    path = existing_folder(path)
    files = verify(path)
    missing = {STATE, TENSORS, REFERENCE_LOGPROBS} - set(files)
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of a population: it lacks {sorted(missing)}")
    state = read_state(path)
    cache = ReferenceCache()
    cache.load(path / REFERENCE_LOGPROBS)
    try:
        tensors = load_file(path / TENSORS)
        fixed_reference = (
            read_adapter(path / FIXED_REFERENCE)
            if any(name.startswith(f"{FIXED_REFERENCE}/") for name in files)
            else None
        )
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return Population(
        [read_agent_folder(path / name) for name in state["agents"]], state, tensors, fixed_reference, cache
    )


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
