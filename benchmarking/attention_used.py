"""Which attention and head a model runs by: a figure of a slow one must not pass for one of a fast one."""

from __future__ import annotations

from typing import Any

import torch

from evollm import DPO
from evollm.models.engine import Engine
from evollm.models.flash import why_not_flash
from evollm.models.fused_head import why_not_fused


def population_attention(agent: DPO) -> str:
    """That of an agent's latest pass, in words."""
    return Engine.of(agent.base).attention


def network_attention(network: Any) -> str:
    """That of the model by itself, by the name that transformers has for it."""
    return f"the model's own ({network.config._attn_implementation})"


def packed_attention(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """That of packed pairs with heads of this size."""
    refusal = why_not_flash(device, dtype, head_size)
    return f"no flash ({refusal})" if refusal else "flash"


def population_head(agent: DPO) -> str:
    """What computes log-probs and gradients from an agent's logits."""
    weight = agent.base.network.get_output_embeddings().weight
    refusal = why_not_fused(weight.device, weight.dtype, len(weight))
    return f"torch's operators ({refusal})" if refusal else "one Triton kernel"
