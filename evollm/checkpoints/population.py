"""The checkpoint of a population as a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from evollm.checkpoints.agent import (
    ATTRIBUTES,
    AgentFolder,
    read_adapter,
    read_agent_folder,
    write_adapter,
    write_agent,
)
from evollm.checkpoints.atomic import existing_folder, replace_folder, seal, verify
from evollm.checkpoints.steps import ARRAYS, BEST_SO_FAR, STATE, read_arrays, read_state
from evollm.errors import CheckpointError
from evollm.models import AdapterState
from evollm.models.reference_cache import ReferenceCache

REFERENCE_LOGPROBS = "reference_logprobs.safetensors"
FIXED_REFERENCE = "fixed_reference"


@dataclass(frozen=True)
class Population:
    """Everything that a run needs to resume.

    Attributes:
        agents: The agents in the order of the population.
        state: Counters, generator states, positions and settings as JSON values; `step` is one of them.
        arrays: State that is not JSON.
        fixed_reference: The reference adapter of the scores, if it is not the reference of an agent.
        reference_logprobs: The cached reference log-probs.
        best_so_far: The agent of the best evaluation so far, as it was then; None if there was no evaluation.
    """

    agents: Sequence[AgentFolder]
    state: Mapping[str, Any]
    arrays: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    fixed_reference: AdapterState | None = None
    reference_logprobs: ReferenceCache = field(default_factory=ReferenceCache)
    best_so_far: AgentFolder | None = None


def write_population(path: Path, population: Population, base_name: str) -> None:
    """Write a population's folder; after a failure there is the old folder, or none.

    Each agent has a subfolder `agent-<index>`, which is a complete checkpoint of the agent; so is the subfolder `best`.

    Args:
        path: Folder to write or replace.
        population: The contents.
        base_name: Name or path of the base model, which PEFT reads from `adapter_config.json`.
    """
    agents = {f"agent-{agent.attributes['index']}": agent for agent in population.agents}
    names = list(agents)
    if population.best_so_far is not None:
        agents[BEST_SO_FAR] = population.best_so_far
    with replace_folder(path) as folder:
        for name, agent in agents.items():
            (folder / name).mkdir()
            write_agent(folder / name, agent, base_name)
            seal(folder / name)
        if population.fixed_reference is not None:
            write_adapter(folder / FIXED_REFERENCE, population.fixed_reference, base_name)
        (folder / ARRAYS).write_bytes(save(dict(population.arrays)))
        population.reference_logprobs.save(folder / REFERENCE_LOGPROBS)
        text = json.dumps({**population.state, "agents": names})
        (folder / STATE).write_text(text + "\n", encoding="utf-8")


def read_population(path: Path) -> Population:
    """Read a population's folder without running code from it.

    Raises:
        CheckpointError: A file is missing, damaged or not plain data; the message names it.
    """
    path = existing_folder(path)
    files = verify(path)
    missing = {STATE, ARRAYS, REFERENCE_LOGPROBS} - set(files)
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of a population: it lacks {sorted(missing)}")
    state = read_state(path)
    cache = ReferenceCache()
    cache.load(path / REFERENCE_LOGPROBS)
    has_reference = any(name.startswith(f"{FIXED_REFERENCE}/") for name in files)
    return Population(
        [read_agent_folder(path / name) for name in state["agents"]],
        state,
        read_arrays(path),
        read_adapter(path / FIXED_REFERENCE) if has_reference else None,
        cache,
        read_agent_folder(path / BEST_SO_FAR) if f"{BEST_SO_FAR}/{ATTRIBUTES}" in files else None,
    )
