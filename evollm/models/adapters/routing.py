"""Several adapters in one forward pass: the batch is M equal blocks of rows, and block m uses adapter m's LoRA weights.

The base's weights are multiplied once with all rows; the LoRA products are batched over the M members (as in Punica,
arXiv 2310.18547, here for training). Each adapter's parameters get their own gradients.
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

from evollm.models.adapters.peft_layers import holds_any


class AdapterRouter:
    """Replaces the forward passes of LoRA layers while rows are routed; otherwise PEFT's own run.

    Attributes:
        members: Adapter of each block of rows; None: rows are not routed.
    """

    def __init__(self) -> None:
        self.members: tuple[str, ...] | None = None
        self._layers: dict[nn.Module, _RoutedForward] = {}

    def take_over(self, model: nn.Module) -> None:
        """Replace `forward` of every LoRA layer that is not replaced yet; to be called after each new adapter."""
        for module in model.modules():
            if _is_routable(module) and module not in self._layers:
                self._layers[module] = _RoutedForward(module, self)

    def can_route(self, model: nn.Module, adapters: Sequence[str]) -> bool:
        """Whether these adapters are plain LoRA on linear layers wherever they are."""
        return all(
            module in self._layers and _is_plain(module, adapters)
            for module in model.modules()
            if isinstance(module, BaseTunerLayer) and holds_any(module, adapters)
        )

    @contextmanager
    def route(self, members: tuple[str, ...] | None) -> Iterator[None]:
        """Route block m of the rows through adapter `members[m]` inside the block; None: PEFT's forward passes."""
        before, self.members = self.members, members
        try:
            yield
        finally:
            self.members = before


class _RoutedForward:
    """Replacement of a LoRA layer's `forward`."""

    def __init__(self, layer: Any, router: AdapterRouter) -> None:
        self._layer = layer
        self._router = router
        self._plain: Callable[..., Tensor] = layer.forward
        layer.forward = self

    # Compiled code has guards on each member's tensors and would be compiled again for each set of members.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the routed members, or of PEFT's layer if rows are not routed."""
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
    """Whether x W^T + b can be computed without calling the layer: its weight is not quantised and it has no hooks."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.is_floating_point()
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
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
