"""The checkpoint folder of one agent: adapters in PEFT's format, and the agent's attributes."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from evollm.checkpoints.atomic import existing_folder, replace_folder, verify
from evollm.checks import usable_path
from evollm.errors import CheckpointError, EvoLLMError
from evollm.models import AdapterState, SharedBase
from evollm.models.adapters.lora_config import lora_config_from, write_lora_config
from evollm.models.adapters.merging import save_base
from evollm.own_files import inside, read_bytes
from evollm.safe_load import read_plain

ATTRIBUTES = "attributes.pt"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
BASE = "base"
_FIX = "give the folder of an agent, such as RUN/elite, or that of a run"
REQUIRED = frozenset({"algorithm", "base_name", "base_fingerprint", "hyperparameters", "settings", "hp_config"})


@dataclass(frozen=True)
class AgentFolder:
    """The contents of an agent's checkpoint folder.

    Attributes:
        adapters: The adapters by role; each has a subfolder.
        attributes: Plain data: algorithm, hyperparameters, counters, generator state.
        optimizer: State of the optimizer, None if it was not saved.
        base: Folder of the base's weights, None if they were not saved.
        is_adapter: Whether the folder itself is the actor's adapter, as `save_llm_checkpoint` writes it.
    """

    adapters: Mapping[str, AdapterState]
    attributes: Mapping[str, Any]
    optimizer: Mapping[str, Any] | None
    base: Path | None = None
    is_adapter: bool = False

    def adapter(self, role: str) -> AdapterState:
        """The adapter with this role.

        Raises:
            CheckpointError: The folder has no such adapter.
        """
        if role not in self.adapters:
            raise CheckpointError(f"the checkpoint has no {role} adapter, only {sorted(self.adapters)}")
        return self.adapters[role]


def write_agent_folder(path: str | Path, agent: AgentFolder, base_name: str, base: SharedBase | None = None) -> None:
    """Write a checkpoint folder; after a failure there is the old folder, or none.

    Args:
        path: Folder to write or replace.
        agent: The contents.
        base_name: Name or path of the base model, which PEFT reads from `adapter_config.json`.
        base: Write the weights of this base, too, into the subfolder `base`; None: leave them out.
    """
    with replace_folder(path) as folder:
        write_agent(folder, agent, base_name)
        if base is not None:
            save_base(base, folder / BASE)


def write_agent(folder: Path, agent: AgentFolder, base_name: str) -> None:
    """Write an agent's adapters and attributes into an existing folder."""
    for role, state in agent.adapters.items():
        write_adapter(folder / role, state, base_name)
    write_attributes(folder, agent)


def write_attributes(folder: Path, agent: AgentFolder) -> None:
    """Write an agent's attributes and optimizer state into an existing folder."""
    # Through memory, since torch.save to a full disk raises a RuntimeError, and write_bytes an OSError.
    data = io.BytesIO()
    torch.save({**agent.attributes, "optimizer": agent.optimizer}, data)
    (folder / ATTRIBUTES).write_bytes(data.getbuffer())


def write_adapter(folder: Path, state: AdapterState, base_name: str) -> None:
    """Write one adapter in the format of `PeftModel.from_pretrained`."""
    folder.mkdir(exist_ok=True)
    write_lora_config(state.config, folder, base_name or None)
    (folder / WEIGHTS).write_bytes(save(dict(state.tensors), metadata={"format": "pt"}))


def read_agent_folder(path: str | Path) -> AgentFolder:
    """Read a checkpoint folder without running code from it.

    Raises:
        CheckpointError: The folder, or a file of it, is missing, damaged or not plain data; the message names it.
    """
    path = existing_folder(usable_path("path", path))
    if not path.is_dir():
        raise CheckpointError(f"{path} is not an agent's checkpoint: there is no such folder; {_FIX}")
    files = verify(path)
    is_adapter = CONFIG in files
    if ATTRIBUTES not in files:
        raise CheckpointError(f"{path} is not an agent's checkpoint: it has no {ATTRIBUTES}; {_FIX}")
    attributes = read_plain(path / ATTRIBUTES)
    if not isinstance(attributes, dict) or not attributes.keys() >= REQUIRED:
        raise CheckpointError(f"{path}: {ATTRIBUTES} is not an agent's, it lacks some of {sorted(REQUIRED)}")
    roles = [name.removesuffix(f"/{CONFIG}") for name in files if name.endswith(f"/{CONFIG}")]
    adapters = {role: read_adapter(path / role) for role in sorted(roles) if "/" not in role and role != BASE}
    if is_adapter:
        adapters = {"actor": read_adapter(path)}
    base = path / BASE if any(name.startswith(f"{BASE}/") for name in files) else None
    return AgentFolder(adapters, attributes, attributes.pop("optimizer", None), base, is_adapter)


def read_adapter(folder: Path) -> AdapterState:
    """Read one adapter in PEFT's format.

    Raises:
        CheckpointError: The adapter is missing, damaged, or not LoRA; the message names the folder.
    """
    try:
        config = lora_config_from(json.loads(read_bytes(inside(folder, CONFIG))))
        return AdapterState(config, load(read_bytes(inside(folder, WEIGHTS))))
    except (EvoLLMError, SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be read as a LoRA adapter: {error}") from error
