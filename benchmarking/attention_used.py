"""Which attention a model runs by on its device: a figure of the slow one must not pass for one of the fast one."""

from __future__ import annotations

from typing import Any

import torch

from evollm import DPO
from evollm.models import attention
from evollm.models.engine import Engine

try:
    from evollm.models.flash import why_not_flash
except ImportError:

    def why_not_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
        """Why packed pairs do not go through the flash kernel; "" where they do."""
        return "" if attention._has_varlen_kernel(device, dtype, head_size) else "not tried, or refused"


def population_attention(agent: DPO) -> str:
    """That of an agent's latest pass, in words."""
    engine, network = Engine.of(agent.base), agent.base.network
    said = getattr(engine, "attention", "")
    if said:
        return str(said)
    if not all(known.shared_prompt for known in engine.paths.values()):
        return network_attention(network)
    return packed_attention(network.device, network.dtype, head_size(network.config))


def network_attention(network: Any) -> str:
    """That of the model by itself, by the name that transformers has for it."""
    return f"the model's own ({network.config._attn_implementation})"


def packed_attention(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """That of packed pairs with heads of this size."""
    refusal = why_not_flash(device, dtype, head_size)
    return f"no flash ({refusal})" if refusal else "flash"


def head_size(config: Any) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
