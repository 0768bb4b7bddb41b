"""The repeated layers of a model: recomputed in the backward pass, compiled, or run once for several adapters.

The checkpointing of transformers works only in training mode, which turns dropout on, and recomputes a layer with the
adapter that is active in the backward pass rather than with that of the forward pass. Each layer is compiled by itself,
inside its checkpoint, since torch.compile cannot trace a checkpoint that switches adapters.
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

from evollm.processes import Processes

ContextFactory = Callable[[], AbstractContextManager[Any]]


@dataclass
class FanOut:
    """Running the layers below the first adapter once for all adapters (members) of a forward pass.

    Layers below `first` hold no adapter of a member, so that their outputs are equal for all members. They run on one
    row, and are skipped in further passes over the same tokens. They have no trainable weights, so autograd records
    nothing there.

    Attributes:
        first: Index of the first layer that runs on one row per member.
        members: Number of members of the current pass.
        hidden: (1, N, D) the input of layer `first`; None until it has been computed.
        in_tuple: Whether the layers below `first` return their hidden states in a tuple.
    """

    first: int
    members: int
    hidden: Tensor | None = None
    in_tuple: bool = False


class LayerStack:
    """The layers that a model declares as checkpointable (`GradientCheckpointingLayer`), in their order.

    Args:
        model: The model; `forward` of its layers is replaced.
        recompute_context: Called in the forward pass of each checkpointed layer; the recomputation of the layer runs in
            the context that it returns.

    Attributes:
        checkpointing: Whether activations are recomputed in the backward pass.
        fan_out: See `FanOut`; None: all rows run through all layers.
        gathered: Context manager in which layers of a sharded base have all their weights; None: the base is not
            sharded.
        regroup: Shards a sharded base over other processes; None: the base is not sharded, or only over all.
        routed_from: Index of the first layer with adapters of the rows that the present forward pass routes; None: no
            rows are routed. Compiled code is for routed rows and for training: other passes, above all those of the
            probe, are too various to compile.
    """

    def __init__(self, model: nn.Module, recompute_context: ContextFactory) -> None:
        self.recompute_context = recompute_context
        self.checkpointing = False
        self.fan_out: FanOut | None = None
        self.routed_from: int | None = None
        self.gathered: Callable[[Sequence[nn.Module]], AbstractContextManager[Any]] | None = None
        self.regroup: Callable[[Processes], None] | None = None
        self.modules = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._forwards = [_LayerForward(layer, index, self) for index, layer in enumerate(self.modules)]

    def __len__(self) -> int:
        return len(self.modules)

    def compile(self, **options: Any) -> None:
        """Compile each layer with `torch.compile` and these options."""
        for forward in self._forwards:
            forward.compile(**options)


class _LayerForward:
    """Replacement of a layer's `forward`."""

    def __init__(self, layer: nn.Module, index: int, stack: LayerStack) -> None:
        self._layer = layer
        self._plain: Callable[..., Any] = layer.forward
        self._compiled: Callable[..., Any] | None = None
        self._index = index
        self._stack = stack
        layer.forward = self

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output; below `fan_out.first` the layer is skipped once `fan_out.hidden` is known."""
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
        # Sharded layers are always recomputed: autograd would save their gathered weights until the backward pass.
        recompute = self._stack.checkpointing or self._stack.gathered is not None
        if not (recompute and torch.is_grad_enabled()):
            return self._with_weights(*args, **kwargs)
        context = self._stack.recompute_context()
        return checkpoint(
            self._with_weights,
            *args,
            use_reentrant=False,
            # In evaluation mode layers draw no random numbers.
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), context),
            **kwargs,
        )

    def _with_weights(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._plain
        if self._compiled is not None and (self._stack.routed_from is not None or torch.is_grad_enabled()):
            forward = self._in_graphs
        if self._stack.gathered is None:
            return forward(*args, **kwargs)
        with self._stack.gathered([self._layer]):
            return forward(*args, **kwargs)

    def _in_graphs(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self._compiled is not None
        # The input of the first layer with adapters, whose rows may be one, without a gradient, must not need code of
        # its own. Autograd must record nothing in the layers below, whose outputs may serve several passes.
        hidden_states = hidden_states.contiguous()
        first = self._stack.routed_from
        if torch.is_grad_enabled() and first is not None and self._index >= first:
            hidden_states = hidden_states if hidden_states.requires_grad else hidden_states.detach().requires_grad_()
        return self._compiled(hidden_states, *args, **kwargs)

    def compile(self, **options: Any) -> None:
        self._compiled = torch.compile(self._plain, **options)
