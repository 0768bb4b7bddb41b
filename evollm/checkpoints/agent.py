"""One agent as a folder: adapters that PEFT can load, and the agent's attributes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from evollm.checkpoints.files import replace_folder
from evollm.errors import CheckpointError, ConfigurationError
from evollm.models import AdapterState, SharedBase
from evollm.models.shared_base import LORA_PROVENANCE

ATTRIBUTES = "attributes.pt"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
REQUIRED = frozenset({"algorithm", "base_name", "hyperparameters", "settings", "hp_config"})

# Fields that may differ between two LoRA configurations that compute the same.
_NOT_COMPARED = LORA_PROVENANCE | {"auto_mapping", "task_type", "lora_dropout"}


@dataclass(frozen=True)
class AgentFolder:
    """What a checkpoint folder of one agent holds.

    Attributes:
        adapters: The adapters by role; one subfolder each.
        attributes: Plain data: algorithm, hyperparameters, counters, generator state.
        optimizer: State of the optimizer, None when it was not saved.
    """

    adapters: Mapping[str, AdapterState]
    attributes: Mapping[str, Any]
    optimizer: Mapping[str, Any] | None

    def adapter(self, role: str) -> AdapterState:
        """The adapter in this role.

        Raises:
            CheckpointError: The folder has none.
        """
        if role not in self.adapters:
            raise CheckpointError(f"the checkpoint has no {role} adapter, only {sorted(self.adapters)}")
        return self.adapters[role]


def write_agent_folder(path: str | Path, agent: AgentFolder, base_name: str) -> None:
    """Write a checkpoint folder; it appears whole or not at all.

    Args:
        path: Folder to write or replace.
        agent: What to write.
        base_name: Name or path of the base model, for whoever loads an adapter.
    """
    with replace_folder(path) as folder:
        for role, state in agent.adapters.items():
            write_adapter(folder / role, state, base_name)
        torch.save({**agent.attributes, "optimizer": agent.optimizer}, folder / ATTRIBUTES)


class HasActor(Protocol):
    """An agent, as far as its actor goes."""

    base: SharedBase

    @property
    def actor_adapter(self) -> str:
        """Name of the actor on the base."""


def save_llm_checkpoint(agent: HasActor, path: str | Path) -> None:
    """Write an agent's tuned adapter alone, to deploy: `PeftModel.from_pretrained(base_model, path)` loads it.

    Args:
        agent: The agent.
        path: Folder to write or replace.
    """
    with replace_folder(path) as folder:
        write_adapter(folder, agent.base.export(agent.actor_adapter), agent.base.name)


def write_adapter(folder: Path, state: AdapterState, base_name: str) -> None:
    """Write one adapter as `PeftModel.from_pretrained` reads it."""
    folder.mkdir(exist_ok=True)
    config = copy.deepcopy(state.config)
    config.base_model_name_or_path = base_name or None
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(dict(state.tensors), folder / WEIGHTS, metadata={"format": "pt"})


def read_agent_folder(path: str | Path) -> AgentFolder:
    """Read a checkpoint folder without running anything that is in it.

    Raises:
        CheckpointError: The folder, or a file of it, is missing, damaged or not plain data.
    """
    path = Path(path)
    if not (path / ATTRIBUTES).is_file():
        fault = f"it has no {ATTRIBUTES}" if path.is_dir() else "there is no such folder"
        raise CheckpointError(f"{path} is not an agent's checkpoint: {fault}")
    try:
        attributes = torch.load(path / ATTRIBUTES, map_location="cpu", weights_only=True)
        adapters = {folder.parent.name: _read_adapter(folder.parent) for folder in sorted(path.glob(f"*/{CONFIG}"))}
    except (pickle.UnpicklingError, SafetensorError, OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(attributes, dict) or not attributes.keys() >= REQUIRED:
        raise CheckpointError(f"{path}: {ATTRIBUTES} is not an agent's, it lacks some of {sorted(REQUIRED)}")
    return AgentFolder(adapters, attributes, attributes.pop("optimizer", None))


def _read_adapter(folder: Path) -> AdapterState:
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{folder} holds a {type(config).__name__}, not a LoRA adapter")
    return AdapterState(config, load_file(folder / WEIGHTS))


def check_same_lora(current: LoraConfig, saved: LoraConfig) -> None:
    """Raise unless two LoRA configurations compute the same.

    Raises:
        ConfigurationError: They differ; the message lists each field with both values.
    """
    differing = [
        f"{field.name}: {getattr(current, field.name)!r} here, {getattr(saved, field.name)!r} in the checkpoint"
        for field in fields(current)
        if field.name not in _NOT_COMPARED and getattr(current, field.name) != getattr(saved, field.name, None)
    ]
    if differing:
        raise ConfigurationError(
            "lora_config",
            "differs from the checkpoint's",
            f"build the agent with the same one ({'; '.join(differing)})",
        )
