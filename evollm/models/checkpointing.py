"""Gradient checkpointing that recomputes with the adapter of its forward pass.

The switch of transformers only works in training mode, which would turn dropout on, and recomputes with whatever
adapter is active when the backward pass runs. Both are wrong for several adapters on one base.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

ContextFactory = Callable[[], AbstractContextManager[Any]]


def checkpoint_layers(model: nn.Module, enabled: Callable[[], bool], recompute_context: ContextFactory) -> int:
    """Make the model's repeated layers recompute their activations in the backward pass.

    Args:
        model: A transformers model.
        enabled: Asked at each forward pass; False leaves that pass alone.
        recompute_context: Called in the forward pass; the context that it returns is entered by the recomputation.

    Returns:
        How many layers can be checkpointed; 0 when the model declares none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = _checkpointed(layer.forward, enabled, recompute_context)
    return len(layers)


def _checkpointed(
    forward: Callable[..., Any], enabled: Callable[[], bool], recompute_context: ContextFactory
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (enabled() and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        context = recompute_context()
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), context), **kwargs)

    return run
