"""Compares and merges the LoRA configurations of a checkpoint and of the agent that loads it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from evollm.errors import ConfigurationError
from evollm.models import AdapterState
from evollm.models.fingerprints import LORA_PROVENANCE

# Fields that do not change the output of the adapter.
_NOT_COMPARED = LORA_PROVENANCE | {"auto_mapping", "task_type", "lora_dropout"}


def differing_fields(current: LoraConfig, saved: LoraConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields that make two configurations compute differently: name to (current, saved)."""
    values = {field.name: (getattr(current, field.name), getattr(saved, field.name, None)) for field in fields(current)}
    return {
        name: (one, other)
        for name, (one, other) in values.items()
        if name not in _NOT_COMPARED and _comparable(one) != _comparable(other)
    }


def _comparable(value: Any) -> Any:
    """Sort names, which PEFT has as sets and files as lists; None for an empty collection."""
    if isinstance(value, list | tuple | set | frozenset):
        return sorted(value) or None
    return value or None if isinstance(value, Mapping) else value


def check_same_lora(current: LoraConfig, saved: LoraConfig) -> None:
    """Check that two LoRA configurations compute the same.

    Raises:
        ConfigurationError: The configurations differ; the message lists each field with both values.
    """
    differing = differing_fields(current, saved)
    if differing:
        listed = "; ".join(
            f"{name}: {one!r} here, {other!r} in the checkpoint" for name, (one, other) in differing.items()
        )
        raise ConfigurationError(
            "lora_config",
            "differs from the checkpoint's",
            f"build the agent with the same one, or load with merge_lora_configs=True ({listed})",
        )


def merge_lora_configs(current: LoraConfig, saved: LoraConfig) -> tuple[LoraConfig, list[str]]:
    """Merge two configurations: the larger rank, the union of the target modules, else the current value.

    Args:
        current: The configuration of the agent that loads.
        saved: The configuration of the checkpoint.

    Returns:
        The merged configuration, and the names of the other fields that differ, which have the current value.

    Raises:
        ConfigurationError: The target modules are patterns, which have no union.
    """
    merged = copy.deepcopy(current)
    differing = differing_fields(current, saved)
    merged.r = max(current.r, saved.r)
    if "target_modules" in differing:
        if isinstance(current.target_modules, str) or isinstance(saved.target_modules, str):
            raise ConfigurationError(
                "lora_config.target_modules", current.target_modules, f"has no union with {saved.target_modules!r}"
            )
        union = {*(current.target_modules or ()), *(saved.target_modules or ())}
        merged.target_modules = sorted(union)
    return merged, sorted(differing.keys() - {"r", "target_modules"})


def pad_adapter(saved: AdapterState, fresh: AdapterState) -> dict[str, Tensor]:
    """Put a saved adapter's weights into the shapes of a fresh adapter of at least its rank, with the same output.

    The saved weights are the top left slice; the other ranks keep the fresh A, and their B is 0. If the two
    configurations scale the product B A differently, B is multiplied by the ratio.

    Args:
        saved: The adapter to load.
        fresh: A newly initialised adapter with the merged configuration.

    Raises:
        ConfigurationError: The fresh adapter lacks a saved weight, or has it in a smaller shape.
    """
    padded = {}
    factor = _scaling(saved.config) / _scaling(fresh.config)
    for name, tensor in fresh.tensors.items():
        padded[name] = torch.zeros_like(tensor) if "lora_B" in name else tensor.clone()
    for name, tensor in saved.tensors.items():
        if name not in padded or any(old > new for old, new in zip(tensor.shape, padded[name].shape, strict=True)):
            raise ConfigurationError("adapter weights", name, "has no place in an adapter of the merged configuration")
        place = tuple(slice(size) for size in tensor.shape)
        padded[name][place] = tensor * factor if "lora_B" in name else tensor
    return padded


def _scaling(config: LoraConfig) -> float:
    patterns: Mapping[str, Any] = {**(config.rank_pattern or {}), **(config.alpha_pattern or {})}
    if patterns:
        raise ConfigurationError("lora_config.rank_pattern", patterns, "cannot be merged with another configuration")
    return float(config.lora_alpha) / (math.sqrt(config.r) if config.use_rslora else config.r)
