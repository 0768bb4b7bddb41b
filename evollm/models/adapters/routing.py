"""Several adapters in one forward pass: the batch is M equal blocks of rows, and block m uses adapter m's LoRA weights.

The base's weights are multiplied once with all rows; the LoRA products are batched over the M members (as in Punica,
arXiv 2310.18547, here for training), whose weights and gradients are rows of two matrices (`stack`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from evollm.models.adapters.peft_layers import holds_any
from evollm.models.adapters.routed_lora import GraphLora, MemberLora, routed_lora
from evollm.models.adapters.stack import Stack


class AdapterRouter:
    """Replaces the forward passes of LoRA layers while rows are routed; otherwise PEFT's own run.

    Attributes:
        stack: The weights of the adapter of each block of rows; None: rows are not routed.
        routes_all: Whether all of PEFT's layers are replaced, so that no routed row depends on the active adapter.
        in_graphs: Whether the layers are compiled, so that routed LoRA layers are to be a part of their graphs.
    """

    def __init__(self) -> None:
        self.stack: Stack | None = None
        self.routes_all = True
        self.in_graphs = False
        self._layers: dict[nn.Module, _RoutedForward] = {}

    def take_over(self, model: nn.Module) -> None:
        """Replace `forward` of every LoRA layer that is not replaced yet; to be called after each new adapter."""
        self.routes_all = True
        for path, module in model.named_modules():
            if _is_routable(module) and module not in self._layers:
                self._layers[module] = _RoutedForward(module, path, self)
            self.routes_all &= module in self._layers or not isinstance(module, BaseTunerLayer)

    def can_route(self, model: nn.Module, adapters: Sequence[str]) -> bool:
        """Whether these adapters are plain LoRA on linear layers wherever they are."""
        return all(
            module in self._layers and _is_plain(module, adapters)
            for module in model.modules()
            if isinstance(module, BaseTunerLayer) and holds_any(module, adapters)
        )

    @contextmanager
    def route(self, stack: Stack | None) -> Iterator[None]:
        """Route block m of the rows through member m of the stack inside the block; None: PEFT's forward passes."""
        before = self.stack
        try:
            self._take(stack)
            yield
        finally:
            self._take(before)

    def _take(self, stack: Stack | None) -> None:
        is_other, self.stack = stack is not self.stack, stack
        if self.in_graphs and is_other:
            for forward in self._layers.values():
                forward.prepare(stack)


class _RoutedForward:
    """Replacement of a LoRA layer's `forward`."""

    def __init__(self, layer: Any, path: str, router: AdapterRouter) -> None:
        self._layer = layer
        self._path = path
        self._router = router
        self._plain: Callable[..., Tensor] = layer.forward
        self._in_graph: GraphLora | None = None
        # A method rather than this object, which compiled code would have a guard on, and be compiled for each layer;
        # a method of a class of this module, as pickle must find it.
        layer.forward = self.__call__

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the routed members, or of PEFT's layer if rows are not routed."""
        if self._in_graph is not None and not args and not kwargs:
            base = self._layer.base_layer
            return self._in_graph(x, base.weight, base.bias)
        return self._as_tensor(self._outside(x, *args, **kwargs))

    # Compiled code has guards on each member's tensors and would be compiled again for each set of members.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _outside(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        stack = self._router.stack
        if stack is None:
            return self._plain(x, *args, **kwargs)
        layer = self._layer
        if layer.merged:
            # PEFT's own forward pass would take an adapter out of the base that user code has merged into it.
            layer.unmerge()
        base = layer.base_layer
        if not stack.holds(self._path):
            return self._as_tensor(base(x, *args, **kwargs))
        lora = MemberLora(stack, self._path, *self._scaling(stack, x))
        blocks = x.reshape(len(stack.names), -1, x.shape[-1])  # (M, n, D)
        is_plain = _is_plain_linear(base) and not args and not kwargs
        weight, bias = (base.weight, base.bias) if is_plain else (None, None)
        found = routed_lora(blocks, weight, bias, lora)
        found = found.view(*x.shape[:-1], found.shape[-1])
        if is_plain:
            return found
        output = self._as_tensor(base(x, *args, **kwargs))
        return output + found.to(output.dtype)

    def prepare(self, stack: Stack | None) -> None:
        """Give the members' weights to compiled code as tensors; without a plain base layer it stays outside of it."""
        self._in_graph = None
        layer = self._layer
        if stack is None or layer.merged or not stack.holds(self._path) or not _is_plain_linear(layer.base_layer):
            return
        base = layer.base_layer
        lora = MemberLora(stack, self._path, *self._scaling(stack, base.weight))
        self._in_graph = GraphLora.of(lora, base.weight.dtype)

    def _scaling(self, stack: Stack, like: Tensor) -> tuple[float, Tensor | None]:
        """`MemberLora.alpha` and `MemberLora.factors`, for products with a tensor."""
        scalings = [self._layer.scaling.get(name) for name in stack.names]
        different = {scaling for scaling in scalings if scaling is not None}
        if len(different) == 1:
            return float(different.pop()), None
        return 1.0, stack.factors(tuple(float(one or 0.0) for one in scalings), like)

    @staticmethod
    def _as_tensor(value: object) -> Tensor:
        assert isinstance(value, Tensor)
        return value


def _is_plain_linear(layer: nn.Module) -> bool:
    """Whether x W^T + b can be computed without calling the layer: its weight is not quantised and it has no hooks."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.is_floating_point()
        # accelerate's hooks, and those of user code, may replace the method on the layer itself.
        and "forward" not in vars(layer)
        and not any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks))
    )


def _is_routable(module: nn.Module) -> bool:
    """Whether it is LoRA on a linear layer; PEFT has a class for each kind of quantised layer, named `Linear...`."""
    return isinstance(module, LoraLinear) or (
        isinstance(module, LoraLayer) and type(module).__name__.startswith("Linear")
    )


def _is_plain(layer: Any, adapters: Sequence[str]) -> bool:
    """Whether nothing is merged into the base and none of the adapters has a variant such as DoRA or a bias."""
    return not layer.merged and all(
        name not in getattr(layer, "lora_variant", {}) and layer.lora_B[name].bias is None
        for name in adapters
        if name in layer.lora_A
    )
