"""x W^T + bias + s (x A^T) B^T of several members at once, as a function of autograd and as an operator of graphs.

The gradients of A and B are added to the stack's, since autograd would add up a small tensor for each member and
matrix: by the function itself, and outside of graphs (`_Weights`) what the operator returns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from evollm.models.adapters.stack import Stack


class MemberLora(NamedTuple):
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


def routed_lora(x: Tensor, weight: Tensor | None, bias: Tensor | None, lora: MemberLora) -> Tensor:
    """Compute x W^T + bias + s (x A^T) B^T for each member; without a weight the last term alone.

    Args:
        x: (M, n, D_in).
        weight: (D_out, D_in) of the base's layer; None: that is no plain linear layer.
        bias: (D_out,) of the base's layer, or None.
        lora: The members' weights.

    Returns:
        (M, n, D_out).
    """
    output = _RoutedLora.apply(x, lora.stack.anchor, weight, bias, lora)  # type: ignore[no-untyped-call]
    assert isinstance(output, Tensor)
    return output


class _RoutedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, weight: Tensor | None, bias: Tensor | None, lora: MemberLora
    ) -> Tensor:
        output, inner = _forward(x, weight, bias, *lora.stack.weights(lora.layer, x.dtype), lora.factors, lora.alpha)
        ctx.save_for_backward(x, weight, inner)
        ctx.lora = lora
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inner = ctx.saved_tensors
        lora: MemberLora = ctx.lora
        weights, gradients = lora.stack.weights(lora.layer, x.dtype), lora.stack.gradients(lora.layer)
        needs_x = ctx.needs_input_grad[0]
        grad_x = _backward(
            grad_outputs[0], x, weight, inner, *weights, lora.factors, lora.alpha, *gradients, needs_x=needs_x
        )
        return grad_x, None, None, None, None


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    factors: Tensor | None,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """The output (M, n, D_out), and (M, n, r) x A^T for the backward pass."""
    inner = torch.bmm(x, down.transpose(1, 2))
    if factors is not None:
        inner.mul_(factors)
    output = None if weight is None else linear(x, weight, bias)
    return _plus(output, inner, up.transpose(1, 2), alpha), inner


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    inner: Tensor,
    down: Tensor,
    up: Tensor,
    factors: Tensor | None,
    alpha: float,
    grad_down: Tensor,
    grad_up: Tensor,
    *,
    needs_x: bool,
) -> Tensor | None:
    """Add the gradients of A and B to `grad_down` and `grad_up`; returns that of x, (M, n, D_in), if it is needed."""
    grad = grad.contiguous()
    grad_inner = torch.bmm(grad, up)
    if factors is not None:
        grad_inner.mul_(factors)
    _add_product(grad_down, grad_inner.transpose(1, 2), x, alpha)
    _add_product(grad_up, grad.transpose(1, 2), inner, alpha)
    if not needs_x:
        return None
    return _plus(None if weight is None else torch.matmul(grad, weight), grad_inner, down, alpha)


def _plus(output: Tensor | None, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """`output` + alpha * left @ right, in place; without an output the product alone."""
    return torch.bmm(left, right).mul_(alpha) if output is None else output.baddbmm_(left, right, alpha=alpha)


def _add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """Add alpha * left @ right to `total`, which may be of a wider type."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right, alpha=alpha)
    else:
        total.add_(torch.bmm(left, right), alpha=alpha)


# ---------------------------------------------------------------------------------------------- inside of graphs


class GraphLora(NamedTuple):
    """What the operator takes, as tensors: of Python objects a graph would have guards, and be compiled again for each.

    Attributes:
        down: (M, r, D_in) A, in the base's type.
        up: (M, D_out, r) B, in the base's type.
        factors: See `MemberLora`.
        alpha: See `MemberLora`.
    """

    down: Tensor
    up: Tensor
    factors: Tensor | None
    alpha: float

    @classmethod
    def of(cls, lora: MemberLora, dtype: torch.dtype) -> GraphLora:
        """The tensors of a layer of this type; the gradients of A and B are added to the stack's, outside of graphs."""
        down, up = lora.stack.weights(lora.layer, dtype)
        if lora.stack.gradient is not None:
            down, up = _Weights.apply(lora.stack.anchor, down, up, lora)  # type: ignore[no-untyped-call]
        return cls(down, up, lora.factors, lora.alpha)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output for rows x (..., D_in), in M equal blocks, of a layer of the base with this weight and bias."""
        blocks = x.reshape(self.down.shape[0], -1, x.shape[-1])
        output, _ = torch.ops.evollm.routed_lora(blocks, weight, bias, *self)
        assert isinstance(output, Tensor)
        return output.view(*x.shape[:-1], output.shape[-1])


class _Weights(torch.autograd.Function):
    """A and B; the backward pass adds their gradients to the stack's."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, down: Tensor, up: Tensor, lora: MemberLora) -> tuple[Tensor, Tensor]:
        ctx.lora = lora
        return down.detach(), up.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        for total, gradient in zip(ctx.lora.stack.gradients(ctx.lora.layer), grad_outputs, strict=True):
            total.add_(gradient)
        return None, None, None, None


@torch.library.custom_op("evollm::routed_lora", mutates_args=())
def _operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, factors: Tensor | None, alpha: float
) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, bias, down, up, factors, alpha)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:2], weight.shape[0]), x.new_empty(*x.shape[:2], down.shape[1])


@torch.library.custom_op("evollm::routed_lora_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    inner: Tensor,
    down: Tensor,
    up: Tensor,
    factors: Tensor | None,
    alpha: float,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    grad_inner = _product(grad, up, alpha)
    if factors is not None:
        grad_inner.mul_(factors)
    grad_x = torch.matmul(grad, weight).baddbmm_(grad_inner, down) if needs_x else grad.new_empty(0)
    return grad_x, torch.bmm(grad_inner.transpose(1, 2), x), _product(grad.transpose(1, 2), inner, alpha)


@_backward_operator.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, inner: Tensor, down: Tensor, up: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return grad.new_empty(x.shape if others[-1] else 0), grad.new_empty(down.shape), grad.new_empty(up.shape)


def _product(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """Alpha * left @ right in one kernel."""
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=alpha)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, down, up, factors, ctx.alpha = inputs
    ctx.save_for_backward(x, weight, output[1], down, up, factors)
    # Autograd then passes None, rather than zeros, for the second output, which no loss depends on.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    x, weight, inner, down, up, factors = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    grad_x, grad_down, grad_up = torch.ops.evollm.routed_lora_backward(
        grad, x, weight, inner, down, up, factors, ctx.alpha, needs_x
    )
    return grad_x if needs_x else None, None, None, grad_down, grad_up, None, None


_operator.register_autograd(_differentiate, setup_context=_save)
