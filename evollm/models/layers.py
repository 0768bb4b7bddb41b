"""The repeated layers of a model: recomputed in the backward pass, compiled, or run once for several members.

The checkpointing of transformers only works in training mode, which would turn dropout on, and recomputes with
whatever adapter is active when the backward pass runs. Both are wrong for several adapters on one base. Compilation
is for each layer by itself, inside its checkpoint: the compiler cannot trace a checkpoint that switches adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

ContextFactory = Callable[[], AbstractContextManager[Any]]


@dataclass
class FanOut:
    """From which layer on each member has its own hidden states.

    The layers below hold no member's adapter. They run once, on one row, for all members of a pass, and not at all in
    the next pass over the same tokens. Nothing in them requires a gradient, so autograd records nothing.

    Attributes:
        first: Index of the first layer that runs for each member.
        members: Members of the present pass.
        hidden: (1, N, D) the input of layer `first`, once it is known.
        in_tuple: Whether the layers below give their hidden states in a tuple.
    """

    first: int
    members: int
    hidden: Tensor | None = None
    in_tuple: bool = False


class LayerStack:
    """All layers that a model declares as checkpointable, in their order.

    Args:
        model: The model; the layers' forward passes are replaced.
        recompute_context: Called in each checkpointed forward pass; the recomputation enters what it returns.

    Attributes:
        checkpointing: Whether activations are recomputed in the backward pass.
        fan_out: Where the members of the present pass part; None: all rows go through all layers.
        gathered: Makes layers' weights whole inside a block, where each process holds a share of them; None: they are
            whole.
    """

    def __init__(self, model: nn.Module, recompute_context: ContextFactory) -> None:
        self.recompute_context = recompute_context
        self.checkpointing = False
        self.fan_out: FanOut | None = None
        self.gathered: Callable[[Sequence[nn.Module]], AbstractContextManager[Any]] | None = None
        self.modules = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._forwards = [_LayerForward(layer, index, self) for index, layer in enumerate(self.modules)]

    def __len__(self) -> int:
        return len(self.modules)

    def compile(self, **options: Any) -> None:
        """Compile each layer with `torch.compile` and these options."""
        for forward in self._forwards:
            forward.compile(**options)


class _LayerForward:
    """Stands in for a layer's `forward`."""

    def __init__(self, layer: nn.Module, index: int, stack: LayerStack) -> None:
        self._layer = layer
        self._plain: Callable[..., Any] = layer.forward
        self._forward = self._plain
        self._index = index
        self._stack = stack
        layer.forward = self

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, or not, as the stack says."""
        fan_out = self._stack.fan_out
        if fan_out is None or self._index > fan_out.first:
            return self._run(hidden_states, *args, **kwargs)
        if self._index == fan_out.first:
            if fan_out.hidden is None:
                fan_out.hidden = hidden_states
            return self._run(fan_out.hidden.expand(fan_out.members, -1, -1), *args, **kwargs)
        if fan_out.hidden is not None:
            return (hidden_states,) if fan_out.in_tuple else hidden_states
        output = self._run(hidden_states, *args, **kwargs)
        fan_out.in_tuple = isinstance(output, tuple)
        return output

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # What autograd saves of a sharded layer would keep its whole weights in memory until the backward pass.
        recompute = self._stack.checkpointing or self._stack.gathered is not None
        if not (recompute and torch.is_grad_enabled()):
            return self._with_weights(*args, **kwargs)
        context = self._stack.recompute_context()
        return checkpoint(
            self._with_weights,
            *args,
            use_reentrant=False,
            # Nothing in evaluation mode draws numbers.
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), context),
            **kwargs,
        )

    def _with_weights(self, *args: Any, **kwargs: Any) -> Any:
        if self._stack.gathered is None:
            return self._forward(*args, **kwargs)
        with self._stack.gathered([self._layer]):
            return self._forward(*args, **kwargs)

    def compile(self, **options: Any) -> None:
        self._forward = torch.compile(self._plain, **options)
