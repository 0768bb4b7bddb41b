"""Several adapters in one forward pass: the batch is M equal blocks of rows, and block m uses adapter m's LoRA weights.

The base's weights are multiplied once with all rows; the LoRA products are batched over the M members (as in Punica,
arXiv 2310.18547, here for training), whose weights and gradients are rows of two matrices (`stack`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from evollm.models.adapters.peft_layers import holds_any
from evollm.models.adapters.stack import Stack


class AdapterRouter:
    """Replaces the forward passes of LoRA layers while rows are routed; otherwise PEFT's own run.

    Attributes:
        stack: The weights of the adapter of each block of rows; None: rows are not routed.
        routes_all: Whether all of PEFT's layers are replaced, so that no routed row depends on the active adapter.
    """

    def __init__(self) -> None:
        self.stack: Stack | None = None
        self.routes_all = True
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
        before, self.stack = self.stack, stack
        try:
            yield
        finally:
            self.stack = before


class _RoutedForward:
    """Replacement of a LoRA layer's `forward`."""

    def __init__(self, layer: Any, path: str, router: AdapterRouter) -> None:
        self._layer = layer
        self._path = path
        self._router = router
        self._plain: Callable[..., Tensor] = layer.forward
        layer.forward = self

    # Compiled code has guards on each member's tensors and would be compiled again for each set of members.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the routed members, or of PEFT's layer if rows are not routed."""
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
        scalings = [layer.scaling.get(name) for name in stack.names]
        different = {scaling for scaling in scalings if scaling is not None}
        if len(different) == 1:
            lora = _MemberLora(stack, self._path, float(different.pop()), None)
        else:
            lora = _MemberLora(stack, self._path, 1.0, stack.factors(tuple(float(one or 0.0) for one in scalings), x))
        blocks = x.reshape(len(scalings), -1, x.shape[-1])  # (M, n, D)
        is_plain = _is_plain_linear(base) and not args and not kwargs
        weights = (base.weight, base.bias) if is_plain else (None, None)
        found = self._as_tensor(_RoutedLora.apply(blocks, stack.anchor, *weights, lora))  # type: ignore[no-untyped-call]
        found = found.view(*x.shape[:-1], found.shape[-1])
        if is_plain:
            return found
        output = self._as_tensor(base(x, *args, **kwargs))
        return output + found.to(output.dtype)

    @staticmethod
    def _as_tensor(value: object) -> Tensor:
        assert isinstance(value, Tensor)
        return value


class _RoutedLora(torch.autograd.Function):
    """x W^T + bias + s (x A^T) B^T for each member; of a base that is no plain linear layer the last term alone.

    The backward pass adds the gradients of A and B to the stack's, since autograd would add up a small tensor for each
    member and matrix.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, weight: Tensor | None, bias: Tensor | None, lora: _MemberLora
    ) -> Tensor:
        # x (M, n, D_in), weight (D_out, D_in), down (M, r, D_in), up (M, D_out, r)
        down, up = lora.stack.weights(lora.layer, x.dtype)
        inner = torch.bmm(x, down.transpose(1, 2))  # (M, n, r)
        if lora.factors is not None:
            inner.mul_(lora.factors)
        ctx.save_for_backward(x, weight, inner)
        ctx.lora = lora
        return _plus(None if weight is None else linear(x, weight, bias), inner, up.transpose(1, 2), lora.alpha)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inner = ctx.saved_tensors
        lora: _MemberLora = ctx.lora
        down, up = lora.stack.weights(lora.layer, x.dtype)
        grad = grad_outputs[0].contiguous()
        grad_inner = torch.bmm(grad, up)
        if lora.factors is not None:
            grad_inner.mul_(lora.factors)
        grad_down, grad_up = lora.stack.gradients(lora.layer)
        _add_product(grad_down, grad_inner.transpose(1, 2), x, lora.alpha)
        _add_product(grad_up, grad.transpose(1, 2), inner, lora.alpha)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _plus(None if weight is None else torch.matmul(grad, weight), grad_inner, down, lora.alpha)
        return grad_x, None, None, None, None


class _MemberLora(NamedTuple):
    """The LoRA weights of the members of a pass in one layer.

    Attributes:
        stack: The members' weights.
        layer: The layer's path.
        alpha: The scaling that all members share; 1 if they have different ones.
        factors: (M, 1, 1) the members' scalings; None: `alpha`.
    """

    stack: Stack
    layer: str
    alpha: float
    factors: Tensor | None


def _plus(output: Tensor | None, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """`output` + alpha * left @ right, in place; without an output the product alone."""
    return torch.bmm(left, right).mul_(alpha) if output is None else output.baddbmm_(left, right, alpha=alpha)


def _add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """Add alpha * left @ right to `total`, which may be of a wider type."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right, alpha=alpha)
    else:
        total.add_(torch.bmm(left, right), alpha=alpha)


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
