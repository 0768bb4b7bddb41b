"""Rotary embeddings with dynamic NTK scaling: their longest sequence, and a reset before each forward pass."""

from __future__ import annotations

from typing import Any

from torch import nn

_LONGEST = "max_seq_len_cached"
_FREQUENCIES = "inv_freq"
_DYNAMIC = "dynamic"


def longest_sequence(config: Any) -> int | None:
    """The longest sequence of a text configuration, in tokens; None: the configuration does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return None
    parameters = getattr(config, "rope_parameters", None) or {}
    if _DYNAMIC in str(parameters.get("rope_type")):
        return int(positions * parameters.get("factor", 1))
    return int(positions)


def forget_longest_sequences(model: nn.Module) -> None:
    """Reset dynamically scaled frequencies before each forward pass.

    Dynamic NTK scaling (`rope_type="dynamic"`) of transformers keeps the frequencies of the longest sequence so far
    until a sequence fits the model's original length. Without a reset, log-probs would depend on earlier passes.
    """
    for module in model.modules():
        if _dynamic_prefixes(module):
            module.register_forward_pre_hook(_reset)


def _dynamic_prefixes(module: Any) -> list[str]:
    """Prefixes of the attribute names of a module's dynamically scaled frequencies, one for each layer type."""
    if not (hasattr(module, _LONGEST) and hasattr(module, "rope_type")):
        return []
    types = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
    return [f"{kind}_" if kind else "" for kind, rope_type in types.items() if _DYNAMIC in str(rope_type)]


def _reset(module: Any, inputs: object) -> None:
    del inputs
    original = module.original_max_seq_len
    for prefix in _dynamic_prefixes(module):
        if getattr(module, f"{prefix}{_LONGEST}", module.max_seq_len_cached) != original:
            frequencies = getattr(module, f"{prefix}original_{_FREQUENCIES}")
            device = getattr(module, f"{prefix}{_FREQUENCIES}").device
            setattr(module, f"{prefix}{_FREQUENCIES}", frequencies.to(device))
            setattr(module, f"{prefix}{_LONGEST}", original)
