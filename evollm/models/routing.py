"""Several adapters in one forward pass: block m of the rows goes through the LoRA weights of member m.

The base's product is one for all rows and the adapters' are batched over the members (Punica's idea, arXiv 2310.18547,
for training). Gradients reach each adapter's own parameters.
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
from torch.nn.functional import linear, pad


class AdapterRouter:
    """Takes the LoRA layers of a model over while rows are routed, and leaves them to PEFT otherwise."""

    def __init__(self) -> None:
        self.members: tuple[str, ...] | None = None
        self._layers: dict[nn.Module, _RoutedForward] = {}

    def take_over(self, model: nn.Module) -> None:
        """Stand in for the forward pass of every layer that can be routed; call it after new layers came."""
        for module in model.modules():
            if _is_routable(module) and module not in self._layers:
                self._layers[module] = _RoutedForward(module, self)

    def can_route(self, model: nn.Module, adapters: Sequence[str]) -> bool:
        """Whether each layer that holds one of these adapters is plain LoRA on a linear layer."""
        return all(
            module in self._layers and _is_plain(module, adapters)
            for module in model.modules()
            if isinstance(module, BaseTunerLayer) and holds_any(module, adapters)
        )

    @contextmanager
    def route(self, members: tuple[str, ...] | None) -> Iterator[None]:
        """Send block m of the rows through adapter `members[m]` inside the block; None: leave the rows to PEFT."""
        before, self.members = self.members, members
        try:
            yield
        finally:
            self.members = before


class _RoutedForward:
    """A LoRA layer's forward pass."""

    def __init__(self, layer: Any, router: AdapterRouter) -> None:
        self._layer = layer
        self._router = router
        self._plain: Callable[..., Tensor] = layer.forward
        layer.forward = self

    # Compiled, the members' tensors would be guarded one by one and every other set of members compiled anew.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for the routed members, or PEFT's."""
        members = self._router.members
        if members is None:
            return self._plain(x, *args, **kwargs)
        layer = self._layer
        if not any(name in layer.lora_A for name in members):
            return self._as_tensor(layer.base_layer(x, *args, **kwargs))
        down, up = _stacked_weights(layer, members, x.dtype)
        blocks = x.reshape(len(members), -1, x.shape[-1])  # (M, n, D)
        base = layer.base_layer
        if _is_plain_linear(base) and not args and not kwargs:
            output = self._as_tensor(_LoraLinear.apply(blocks, base.weight, base.bias, down, up))  # type: ignore[no-untyped-call]
            return output.view(*x.shape[:-1], output.shape[-1])
        output = self._as_tensor(base(x, *args, **kwargs))
        change = torch.bmm(torch.bmm(blocks, down.transpose(1, 2)), up.transpose(1, 2))
        return output + change.view(output.shape).to(output.dtype)

    @staticmethod
    def _as_tensor(value: object) -> Tensor:
        assert isinstance(value, Tensor)
        return value


def _stacked_weights(layer: Any, members: Sequence[str], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The members' A (M, r, D_in) and scaled B (M, D_out, r), zero-padded to the largest rank r."""
    weight = next(iter(layer.lora_A.values())).weight
    empty = weight.new_zeros(0, layer.in_features), weight.new_zeros(layer.out_features, 0)
    pairs = [
        (layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]) if name in layer.lora_A else empty
        for name in members
    ]
    rank = max(len(down) for down, _ in pairs)
    downs = [pad(down, (0, 0, 0, rank - len(down))) if len(down) < rank else down for down, _ in pairs]
    ups = [pad(up, (0, rank - up.shape[1])) if up.shape[1] < rank else up for _, up in pairs]
    return torch.stack(downs).to(dtype), torch.stack(ups).to(dtype)


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + (x A^T) B^T, the second product added in place to the first, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        # x (M, n, D_in), weight (D_out, D_in), down (M, r, D_in), up (M, D_out, r)
        output = linear(x, weight, bias)
        inner = torch.bmm(x, down.transpose(1, 2))  # (M, n, r)
        output.baddbmm_(inner, up.transpose(1, 2))
        ctx.save_for_backward(x, weight, down, up, inner)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, inner = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_inner = torch.bmm(grad, up)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.matmul(grad, weight).baddbmm_(grad_inner, down)
        return grad_x, None, None, torch.bmm(grad_inner.transpose(1, 2), x), torch.bmm(grad.transpose(1, 2), inner)


def _is_plain_linear(layer: nn.Module) -> bool:
    """A linear layer whose product can be taken without calling it: no quantised weight, no hooks of the user's."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.is_floating_point()
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def _is_routable(module: nn.Module) -> bool:
    """LoRA on a linear layer, quantised ones included: their classes are made for each backend."""
    return isinstance(module, LoraLinear) or (
        isinstance(module, LoraLayer) and type(module).__name__.startswith("Linear")
    )


def holds_any(layer: Any, adapters: Sequence[str]) -> bool:
    """Whether a PEFT layer holds weights of one of these adapters."""
    held = set().union(*(getattr(layer, name, {}) for name in layer.adapter_layer_names))
    return any(name in held for name in adapters)


def _is_plain(layer: Any, adapters: Sequence[str]) -> bool:
    """No variant such as DoRA, no bias of the adapter's own, nothing merged into the base."""
    return not layer.merged and all(
        name not in getattr(layer, "lora_variant", {}) and layer.lora_B[name].bias is None
        for name in adapters
        if name in layer.lora_A
    )
