"""The repeated layers of a model: recomputed in the backward pass, or compiled, with any adapter.

The checkpointing of transformers only works in training mode, which would turn dropout on, and recomputes with
whatever adapter is active when the backward pass runs. Both are wrong for several adapters on one base. Compilation
is for each layer by itself, inside its checkpoint: the compiler cannot trace a checkpoint that switches adapters.
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


class LayerForward:
    """Stands in for a layer's `forward`.

    Args:
        layer: The layer, whose forward pass is replaced.
        enabled: Asked at each forward pass; True checkpoints it.
        recompute_context: Called in the forward pass; the context that it returns is entered by the recomputation.
    """

    def __init__(self, layer: nn.Module, enabled: Callable[[], bool], recompute_context: ContextFactory) -> None:
        self._plain: Callable[..., Any] = layer.forward
        self._forward = self._plain
        self._enabled = enabled
        self._recompute_context = recompute_context
        layer.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, checkpointed where that is enabled."""
        if not (self._enabled() and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        context = self._recompute_context()
        return checkpoint(
            self._forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), context), **kwargs
        )

    def compile(self, **options: Any) -> None:
        """Compile the layer with `torch.compile` and these options."""
        self._forward = torch.compile(self._plain, **options)


def wrap_layers(model: nn.Module, enabled: Callable[[], bool], recompute_context: ContextFactory) -> list[LayerForward]:
    """Replace the forward pass of every layer that the model declares as checkpointable; see `LayerForward`."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [LayerForward(layer, enabled, recompute_context) for layer in layers]
